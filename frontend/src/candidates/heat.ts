// Influence over tokens: steps of the diverging colour scale, tokens from shares, and the densest window.
import type { Share } from "../api/types";

export const STEPS = 5;
const THRESHOLDS = [0.02, 0.1, 0.25, 0.45, 0.7];

/** The largest absolute influence; it gets the strongest colour. */
export function limit(shares: readonly { influence: number }[]): number {
  return shares.reduce((most, share) => Math.max(most, Number.isFinite(share.influence) ? Math.abs(share.influence) : 0), 0);
}

/** The step of a value on the scale, from -STEPS to STEPS; 0 has no colour. */
export function step(value: number, most: number): number {
  if (!(most > 0) || !Number.isFinite(value)) return 0;
  const part = Math.abs(value) / most;
  const level = THRESHOLDS.filter((threshold) => part >= threshold).length;
  return value < 0 ? -level : level;
}

/** A token, or several that share a character: units [start, stop) of the text. */
export interface Token {
  start: number;
  stop: number;
  influence: number;
  tokens: number;
}

/** The shares as tokens of a text; overlapping shares become one token. Special tokens (start = stop) stay alone. */
export function tokensOf(shares: readonly Share[], units: (point: number) => number): Token[] {
  const tokens: Token[] = [];
  for (const share of shares) {
    const start = units(share.start);
    const stop = Math.max(start, units(share.stop));
    const last = tokens[tokens.length - 1];
    if (last && stop > start && last.stop > last.start && start < last.stop) {
      last.stop = Math.max(last.stop, stop);
      last.influence += share.influence;
      last.tokens += 1;
    } else {
      tokens.push({ start: Math.max(start, last?.stop ?? 0), stop: Math.max(stop, last?.stop ?? 0), influence: share.influence, tokens: 1 });
    }
  }
  return tokens;
}

/** The window of `size` tokens with the largest sum of absolute influence: first index and one after the last. */
export function densest(tokens: readonly { influence: number }[], size = 60): [number, number] {
  if (tokens.length <= size) return [0, tokens.length];
  const weight = (index: number) => Math.abs(tokens[index]?.influence ?? 0);
  let sum = 0;
  for (let index = 0; index < size; index += 1) sum += weight(index);
  let most = sum;
  let first = 0;
  for (let index = size; index < tokens.length; index += 1) {
    sum += weight(index) - weight(index - size);
    if (sum > most + 1e-12) {
      most = sum;
      first = index - size + 1;
    }
  }
  return [first, first + size];
}
