// A ranked training example: rank, score, what is known about it, its text, and what can be done with it.
import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import type { Passage, TextPart } from "../api/types";
import type { ApiError } from "../api/client";
import { count, score } from "../format";
import { asError } from "../hooks";
import { Bar, Chip, Problem } from "../ui/parts";
import { Outside } from "../ui/text";
import { countPoints } from "./codepoints";
import { PassageText, entitySpans, range } from "./text";
import { plain } from "./visible";

export interface Twin {
  rank: number;
  column: string;
  go: () => void;
}

export function PassageCard(props: {
  passage: Passage;
  id: string;
  most: number;
  highlights: string[];
  more: (start: number) => Promise<TextPart>;
  linked?: boolean;
  chosen?: boolean;
  twin?: Twin | null;
  hover?: (id: string | null) => void;
  actions?: ComponentChildren;
  /** Stands in the place of the text. */
  instead?: ComponentChildren;
}) {
  const { passage } = props;
  const [whole, open] = useState(false);
  const [text, extend] = useState(passage.text);
  const [fetching, fetches] = useState(false);
  const [error, fail] = useState<ApiError | null>(null);
  const alive = useRef(true);
  useEffect(() => () => void (alive.current = false), []);
  const shown = range(text, entitySpans(text, passage.marks), whole);
  const cutOff = shown.stop - shown.start < text.length;
  const have = text.length < passage.characters * 2 ? countPoints(text) : passage.characters;
  const fetchMore = () => {
    fetches(true);
    fail(null);
    props.more(have).then(
      (part) => {
        if (!alive.current) return;
        extend(text + part.text);
        fetches(false);
      },
      (problem: unknown) => {
        if (!alive.current) return;
        fail(asError(problem));
        fetches(false);
      },
    );
  };
  const fields = Object.entries(passage.metadata);
  return (
    <article
      id={props.id}
      class={`passage${props.linked ? " linked" : ""}${props.chosen ? " chosen" : ""}`}
      aria-label={`Rank ${passage.rank}: ${plain(passage.example_id)}`}
      onMouseEnter={() => props.hover?.(passage.example_id)}
      onMouseLeave={() => props.hover?.(null)}
      onFocusCapture={() => props.hover?.(passage.example_id)}
      onBlurCapture={() => props.hover?.(null)}
    >
      <header class="passage-head">
        <span class="rank">{passage.rank}</span>
        <span class="score" title={`Score ${passage.score}`}>
          {score(passage.score)}
        </span>
        <Bar value={passage.score} most={props.most} />
        <Truth passage={passage} />
        {props.twin && (
          <button type="button" class="chip twin" onClick={props.twin.go} title={`Rank ${props.twin.rank} in ${props.twin.column}: go there`} aria-label={`⇄ ${props.twin.rank} in ${props.twin.column}`}>
            ⇄ {props.twin.rank}
          </button>
        )}
        <span class="passage-id" title={plain(passage.parent_id ? `${passage.example_id}, of ${passage.parent_id}` : passage.example_id)}>
          <Outside text={passage.example_id} />
        </span>
      </header>
      {props.instead ?? <PassageText text={text} marks={passage.marks} highlights={props.highlights} whole={whole} />}
      {error && <Problem error={error} retry={fetchMore} />}
      {(props.actions || cutOff || whole || have < passage.characters || fields.length > 0) && (
        <footer class="passage-foot">
          {props.actions}
          {!props.instead && (cutOff || whole) && text.length > 700 && (
            <button type="button" class="link" aria-expanded={whole} onClick={() => open(!whole)}>
              {whole ? "Show less" : `Show all ${count(passage.characters)} characters`}
            </button>
          )}
          {!props.instead && whole && have < passage.characters && (
            <button type="button" class="link" disabled={fetching} onClick={fetchMore}>
              {fetching ? "Fetching…" : `Show more (${count(passage.characters - have)} characters left)`}
            </button>
          )}
          {fields.length > 0 && (
            <details class="fields">
              <summary>{fields.length === 1 ? "1 field" : `${fields.length} fields`}</summary>
              <dl>
                {fields.map(([name, value]) => (
                  <div key={name}>
                    <dt>
                      <Outside text={name} />
                    </dt>
                    <dd>
                      <Outside text={value.length > 2000 ? `${value.slice(0, 2000)}…` : value} />
                    </dd>
                  </div>
                ))}
                {passage.parent_id && (
                  <div>
                    <dt>window of</dt>
                    <dd>
                      <Outside text={passage.parent_id} />
                    </dd>
                  </div>
                )}
              </dl>
            </details>
          )}
        </footer>
      )}
    </article>
  );
}

function Truth({ passage }: { passage: Passage }) {
  return (
    <>
      {passage.correct === true && (
        <Chip kind="good" title="States the fact">
          ✓ states fact
        </Chip>
      )}
      {passage.entailment !== null && (
        <Chip kind={passage.entailment >= 0.5 ? "good soft" : ""} title="Score of entailment, from 0 to 1">
          entails {passage.entailment.toFixed(2)}
        </Chip>
      )}
      {passage.category && passage.category !== "entails" && <Chip title="What of the fact it names">{plain(passage.category)}</Chip>}
      {passage.category === "entails" && passage.correct !== true && <Chip kind="good soft">entails</Chip>}
    </>
  );
}
