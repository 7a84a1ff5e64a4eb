// A candidate's card: rank, score, labels, text, and buttons.
import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import type { Candidate, TextPart } from "../api/types";
import type { ApiError } from "../api/client";
import { count, score } from "../format";
import { asError } from "../hooks";
import { Bar, Chip, Problem } from "../ui/parts";
import { Outside } from "../ui/text";
import { countPoints } from "./codepoints";
import { CandidateText, entitySpans, range } from "./text";
import { plain } from "./visible";

export interface Twin {
  rank: number;
  column: string;
  go: () => void;
}

export function CandidateCard(props: {
  candidate: Candidate;
  id: string;
  most: number;
  highlights: string[];
  more: (start: number) => Promise<TextPart>;
  linked?: boolean;
  chosen?: boolean;
  twin?: Twin | null;
  hover?: (id: string | null) => void;
  actions?: ComponentChildren;
  /** Replaces the text. */
  instead?: ComponentChildren;
}) {
  const { candidate } = props;
  const [whole, open] = useState(false);
  const [text, extend] = useState(candidate.text);
  const [fetching, fetches] = useState(false);
  const [error, fail] = useState<ApiError | null>(null);
  const alive = useRef(true);
  useEffect(() => () => void (alive.current = false), []);
  const shown = range(text, entitySpans(text, candidate.marks), whole);
  const cutOff = shown.stop - shown.start < text.length;
  const loaded = text.length < candidate.characters * 2 ? countPoints(text) : candidate.characters;
  const fetchMore = () => {
    fetches(true);
    fail(null);
    props.more(loaded).then(
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
  const fields = Object.entries(candidate.metadata);
  return (
    <article
      id={props.id}
      class={`candidate${props.linked ? " linked" : ""}${props.chosen ? " chosen" : ""}`}
      aria-label={`Rank ${candidate.rank}: ${plain(candidate.example_id)}`}
      onMouseEnter={() => props.hover?.(candidate.example_id)}
      onMouseLeave={() => props.hover?.(null)}
      onFocusCapture={() => props.hover?.(candidate.example_id)}
      onBlurCapture={() => props.hover?.(null)}
    >
      <header class="candidate-head">
        <span class="rank">{candidate.rank}</span>
        <span class="score" title={`Score ${candidate.score}`}>
          {score(candidate.score)}
        </span>
        <Bar value={candidate.score} most={props.most} />
        <Labels candidate={candidate} />
        {props.twin && (
          <button type="button" class="chip twin" onClick={props.twin.go} title={`Go to rank ${props.twin.rank} in ${props.twin.column}`} aria-label={`⇄ ${props.twin.rank} in ${props.twin.column}`}>
            ⇄ {props.twin.rank}
          </button>
        )}
        <span class="candidate-id" title={plain(candidate.parent_id ? `${candidate.example_id}, a window of ${candidate.parent_id}` : candidate.example_id)}>
          <Outside text={candidate.example_id} />
        </span>
      </header>
      {props.instead ?? <CandidateText text={text} marks={candidate.marks} highlights={props.highlights} whole={whole} />}
      {error && <Problem error={error} retry={fetchMore} />}
      {(props.actions || cutOff || whole || loaded < candidate.characters || fields.length > 0) && (
        <footer class="candidate-foot">
          {props.actions}
          {!props.instead && (cutOff || whole) && text.length > 700 && (
            <button type="button" class="link" aria-expanded={whole} onClick={() => open(!whole)}>
              {whole ? "Show less" : `Show all ${count(candidate.characters)} characters`}
            </button>
          )}
          {!props.instead && whole && loaded < candidate.characters && (
            <button type="button" class="link" disabled={fetching} onClick={fetchMore}>
              {fetching ? "Fetching…" : `Show more (${count(candidate.characters - loaded)} characters left)`}
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
                {candidate.parent_id && (
                  <div>
                    <dt>window of</dt>
                    <dd>
                      <Outside text={candidate.parent_id} />
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

function Labels({ candidate }: { candidate: Candidate }) {
  return (
    <>
      {candidate.correct === true && (
        <Chip kind="good" title="States the fact">
          ✓ states fact
        </Chip>
      )}
      {candidate.entailment !== null && (
        <Chip kind={candidate.entailment >= 0.5 ? "good soft" : ""} title="Entailment score, from 0 to 1">
          entails {candidate.entailment.toFixed(2)}
        </Chip>
      )}
      {candidate.category && candidate.category !== "entails" && <Chip title="Entities of the fact that the text names">{plain(candidate.category)}</Chip>}
      {candidate.category === "entails" && candidate.correct !== true && <Chip kind="good soft">entails</Chip>}
    </>
  );
}
