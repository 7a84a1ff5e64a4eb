// The part of a generation to attribute, token for token.
import type { AskedTokens, Generation } from "../api/types";
import { toUnits } from "../candidates/codepoints";

/** A question about a generation: its texts, for people, and its tokens, which are asked as they are. */
export interface Part {
  prompt: string;
  completion: string;
  tokens: AskedTokens;
}

/** The question if tokens [first, last] of the generation are the completion. */
export function partOf(generation: Generation, first: number, last: number): Part {
  const { prompt, text, prompt_ids, tokens } = generation;
  const units = toUnits(text);
  const start = units(tokens[first]?.start ?? 0);
  const stop = units(tokens[last]?.stop ?? 0);
  const said = tokens.slice(0, last + 1).map((token) => token.token_id);
  return {
    prompt: prompt + text.slice(0, start),
    completion: text.slice(start, stop),
    tokens: { token_ids: [...prompt_ids, ...said], first: prompt_ids.length + first },
  };
}

/** The tokens of a part, as long as the question is still that part's. */
export function tokensOf(part: Part | null, prompt: string, completion: string): AskedTokens | null {
  return part !== null && part.prompt === prompt && part.completion === completion ? part.tokens : null;
}
