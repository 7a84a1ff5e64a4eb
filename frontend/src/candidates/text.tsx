// A candidate's text with entity marks and highlights; hidden characters are shown by number.
import { useMemo } from "preact/hooks";
import type { Mark } from "../api/types";
import { Plain } from "../ui/text";
import { toUnits, wholeUnit } from "./codepoints";
import { cut, findAll, opening, type EntitySpan, type Piece, type Span } from "./segments";

const LONGEST_OPENING = 640;

export function className(piece: Piece): string {
  return [piece.subject && "subject", piece.object && "object", piece.highlighted && "highlighted"].filter(Boolean).join(" ");
}

export function entitySpans(text: string, marks: readonly Mark[]): EntitySpan[] {
  const units = toUnits(text);
  return marks.map((mark) => ({ start: units(mark.start), stop: units(mark.stop), entity: mark.entity }));
}

/** The part of a text that is drawn: the whole, or its opening. */
export function range(text: string, entities: readonly Span[], whole: boolean): Span {
  if (whole) return { start: 0, stop: text.length };
  const part = opening(text, entities, LONGEST_OPENING);
  return { start: wholeUnit(text, part.start), stop: wholeUnit(text, part.stop) };
}

const TITLES = { subject: "subject", object: "object" };

export function CandidateText(props: { text: string; marks: Mark[]; highlights: string[]; whole: boolean }) {
  const { text, marks, highlights, whole } = props;
  const drawn = useMemo(() => {
    const entities = entitySpans(text, marks);
    const shown = range(text, entities, whole);
    const pieces = cut(shown.start, shown.stop, entities, findAll(text, highlights));
    return (
      <div class="candidate-text" dir="auto">
        {shown.start > 0 && <span class="elided">… </span>}
        {pieces.map((piece) => {
          const name = className(piece);
          const inner = <Plain text={text.slice(piece.start, piece.stop)} />;
          if (!name) return inner;
          const title = piece.subject ? TITLES.subject : piece.object ? TITLES.object : undefined;
          return (
            <mark key={piece.start} class={name} title={title}>
              {inner}
            </mark>
          );
        })}
        {shown.stop < text.length && <span class="elided"> …</span>}
      </div>
    );
  }, [text, marks, highlights, whole]);
  return drawn;
}
