// A query's kind, and the model's own answer, in words.
import type { Kind, QueryRecord } from "../api/types";
import { count } from "../format";

const KIND_NAMES: Record<Kind, string> = {
  fact: "Fact", choice: "Choice", generation: "Generation", open: "Open: no right answer",
};

export function kindName(kind: string): string {
  return Object.hasOwn(KIND_NAMES, kind) ? KIND_NAMES[kind as Kind] : kind;
}

/** Whether the explained completion is not the true answer. */
export function isOther(record: Pick<QueryRecord, "completion" | "groundtruth">): boolean {
  return record.groundtruth !== null && record.groundtruth.trim() !== record.completion.trim();
}

/** Whether two lines with one name explain different completions. */
export function explainsOther(a: QueryRecord, b: QueryRecord): boolean {
  return isOther(a) || isOther(b) || a.completion.trim() !== b.completion.trim();
}

/** The confidence in words: the share, and how many of the sampled answers that is where their number fits. */
export function confidenceOf(record: Pick<QueryRecord, "confidence" | "sampled" | "completion" | "groundtruth">): string | null {
  const { confidence, sampled } = record;
  if (confidence === null) return null;
  const share = `${Number((confidence * 100).toFixed(1))}%`;
  const right = Math.round(confidence * sampled);
  // Of a wrong prediction, files do not say whether the share is of the prediction or of the true answer.
  if (sampled === 0 || isOther(record) || Math.abs(right - confidence * sampled) > 0.01 * sampled) return share;
  return `${share}: ${count(right)} of ${count(sampled)} sampled answers ${right === 1 ? "is" : "are"} right`;
}
