// Cuts a text where marks, highlights and token shares begin and end, to draw it piece by piece.

/** Units [start, stop) of a text. */
export interface Span {
  start: number;
  stop: number;
}

export interface EntitySpan extends Span {
  entity: "subject" | "object";
}

/** A piece of text with the same marks and highlights throughout. */
export interface Piece extends Span {
  subject: boolean;
  object: boolean;
  highlighted: boolean;
}

/** Where any of the needles occurs, in any case; at most `most` places. */
export function findAll(text: string, needles: readonly string[], most = 2000): Span[] {
  const escaped = needles.filter(Boolean).map((needle) => needle.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&"));
  if (!escaped.length) return [];
  const found: Span[] = [];
  for (const match of text.matchAll(new RegExp(escaped.sort((a, b) => b.length - a.length).join("|"), "gi"))) {
    found.push({ start: match.index, stop: match.index + match[0].length });
    if (found.length >= most) break;
  }
  return found;
}

/** The pieces of `text` between `from` and `to`. */
export function cut(from: number, to: number, entities: readonly EntitySpan[], highlights: readonly Span[]): Piece[] {
  if (to <= from) return [];
  interface Change {
    at: number;
    layer: 0 | 1 | 2;
    by: 1 | -1;
  }
  const changes: Change[] = [];
  const add = (span: Span, layer: 0 | 1 | 2) => {
    const start = Math.max(from, span.start);
    const stop = Math.min(to, span.stop);
    if (stop > start) changes.push({ at: start, layer, by: 1 }, { at: stop, layer, by: -1 });
  };
  for (const span of entities) add(span, span.entity === "subject" ? 0 : 1);
  for (const span of highlights) add(span, 2);
  changes.sort((a, b) => a.at - b.at);
  const depth: [number, number, number] = [0, 0, 0];
  const pieces: Piece[] = [];
  let start = from;
  const flush = (stop: number) => {
    if (stop <= start) return;
    pieces.push({ start, stop, subject: depth[0] > 0, object: depth[1] > 0, highlighted: depth[2] > 0 });
    start = stop;
  };
  for (const change of changes) {
    flush(change.at);
    depth[change.layer] += change.by;
  }
  flush(to);
  return pieces;
}

/** The part of a long text that is shown first: from its beginning, or from shortly before the first mark. */
export function opening(text: string, entities: readonly Span[], longest: number): Span {
  if (text.length <= longest * 1.3) return { start: 0, stop: text.length };
  const first = entities.reduce((least, span) => Math.min(least, span.start), Number.POSITIVE_INFINITY);
  let start = 0;
  if (Number.isFinite(first) && first > longest * 0.75) {
    start = Math.max(0, first - Math.floor(longest / 4));
    const space = text.slice(start, start + 40).search(/\s/);
    if (space > 0 && start + space < first) start += space + 1;
  }
  let stop = Math.min(text.length, start + longest);
  if (stop < text.length) {
    const space = text.slice(stop - 40, stop).search(/\s\S*$/);
    if (space > 0 && stop - 40 + space > start) stop = stop - 40 + space;
  }
  return { start, stop };
}
