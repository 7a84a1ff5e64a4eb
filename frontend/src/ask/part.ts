// Prompt and completion as the model reads them, and the part of a generation to attribute.
import type { Generation } from "../api/types";
import { toUnits } from "../candidates/codepoints";

/** The text between prompt and completion: one space, unless either has white space there or is empty. */
export function between(before: string, after: string): string {
  return !before || !after || /\s$/.test(before) || /^\s/.test(after) ? "" : " ";
}

/** The first token of a token's word, because a prompt and a completion can only meet between words. */
export function wordStart(generation: Generation, token: number): number {
  const units = toUnits(generation.text);
  const begins = (at: number) => {
    const start = units(generation.tokens[at]?.start ?? 0);
    return start === 0 || /\s/.test(generation.text.slice(start - 1, start)) || /^\s/.test(generation.text.slice(start));
  };
  let first = token;
  while (first > 0 && !begins(first)) first -= 1;
  return first;
}

/** Prompt and completion if tokens [first, last] of the generation are the completion. */
export function partOf(generation: Generation, first: number, last: number): { prompt: string; completion: string } {
  const { prompt, text, tokens } = generation;
  const units = toUnits(text);
  const start = units(tokens[first]?.start ?? 0);
  const stop = units(tokens[last]?.stop ?? 0);
  const before = text.slice(0, start);
  const lead = prompt + (before ? between(prompt, before) : "") + before;
  let completion = text.slice(start, stop);
  // `between` inserts this space anyway.
  if (completion.startsWith(" ") && lead && !/\s$/.test(lead) && /^\S/.test(completion.slice(1))) {
    completion = completion.slice(1);
  }
  return { prompt: lead, completion };
}
