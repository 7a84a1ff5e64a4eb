// The chosen query and its candidates, one column per run.
import { useState } from "preact/hooks";
import { api, downloads } from "../api/client";
import type { Candidate, QueryRecord, RunSummary, Side } from "../api/types";
import { SpectrumPanel } from "../charts/spectrum";
import { count, plural } from "../format";
import { useRequest, type Loaded } from "../hooks";
import { CandidateCard } from "../candidates/card";
import { EntityLegend, HighlightBar } from "../candidates/selection";
import { brief, plain } from "../candidates/visible";
import { change, type View } from "../state";
import { Dialog, Empty, ExportMenu, Problem, Segmented, Waiting } from "../ui/parts";
import { Plain } from "../ui/text";
import { explainsOther } from "./answer";
import { Explained, Facts } from "./facts";

interface Props {
  view: View;
  runs: RunSummary[];
  run: number;
  other: number | null;
  places: (number | null)[];
  first: Loaded<QueryRecord>;
  second: Loaded<QueryRecord>;
  /** Whether an index is open as well. */
  index: boolean;
}

export function QueryView(props: Props) {
  const { view, runs, run, other, places, first, second } = props;
  const [raw, showRaw] = useState(false);
  const record = first.data ?? second.data;
  if (first.error && !first.data) return <Problem error={first.error} retry={first.retry} />;
  if (!record) return <Waiting what="Loading the query" />;
  const both = other !== null && !view.alone;
  return (
    <section class={first.stale && first.loading ? "query stale" : "query"} aria-label="Chosen query">
      <div class="query-head">
        <h1 class="question" dir="auto">
          <Plain text={record.prompt ? record.prompt + record.separator : "(no prompt) "} />
          <span class="completion"><Plain text={record.completion || "(no completion)"} /></span>
        </h1>
        <div class="tools">
          {props.index && (
            <button
              type="button" class="small" title="Ask the index about this query"
              onClick={() => change({
                tab: "ask", prompt: record.prompt, completion: record.completion,
                join: record.separator === " " ? "space" : "none", key: null,
              })}
            >
              Ask this
            </button>
          )}
          <button type="button" class="small" onClick={() => showRaw(true)}>
            Raw record
          </button>
          <ExportMenu
            what="query"
            address={(format) => downloads.query(run, record.place, both ? other : null, format)}
          />
        </div>
      </div>
      <Facts record={record} />
      <div class="row tools-row">
        {other !== null && <Columns view={view} runs={runs} run={run} other={other} />}
        {both && <Overlap a={first.data} b={second.data} />}
        <span class="grow" />
        {record.subject.length + record.object.length > 0 && <EntityLegend />}
        <HighlightBar />
      </div>
      <CandidateColumns {...props} both={both} />
      {runs.some((summary) => summary.mixing) && <SpectraOfRuns view={view} runs={both && other !== null ? [runs[run], runs[other]] : [runs[run]]} />}
      {raw && <RawRecord run={run} place={places[run] ?? record.place} close={() => showRaw(false)} />}
    </section>
  );
}

function Columns({ view, runs, run, other }: { view: View; runs: RunSummary[]; run: number; other: number }) {
  const name = (number: number) => brief(runs[number]?.name ?? "", 30);
  return (
    <>
      <Segmented
        label="Columns"
        value={view.alone ? "one" : "both"}
        choices={[{ value: "both", label: "Side by side" }, { value: "one", label: `Only ${name(run)}` }]}
        choose={(value) => change({ alone: value === "one" })}
      />
      {runs.length > 2 ? (
        <select aria-label="Run beside" value={String(other)} onChange={(event) => change({ beside: Number(event.currentTarget.value) })}>
          {runs.map((summary) => summary.run !== run && <option key={summary.run} value={String(summary.run)}>{name(summary.run)}</option>)}
        </select>
      ) : (
        <button
          type="button"
          class="small"
          title={`List the queries of ${name(other)} and show it first`}
          onClick={() => change({ run: other, beside: run, page: 0 })}
        >
          Swap
        </button>
      )}
    </>
  );
}

function Overlap({ a, b }: { a: QueryRecord | null; b: QueryRecord | null }) {
  if (!a || !b) return null;
  const ids = new Set(a.proponents.map((candidate) => candidate.example_id));
  const shared = b.proponents.filter((candidate) => ids.has(candidate.example_id)).length;
  const of = Math.min(a.proponents.length, b.proponents.length);
  if (of === 0) return null;
  return <span class="overlap" title="Proponents that both columns show"><b>{shared} of {of}</b> shared</span>;
}

function CandidateColumns(props: Props & { both: boolean }) {
  const { view, runs, run, other, first, second, both } = props;
  const [hovered, hover] = useState<string | null>(null);
  const columns: [number, Loaded<QueryRecord>, Loaded<QueryRecord>, number | null][] =
    both && other !== null ? [[run, first, second, other], [other, second, first, run]] : [[run, first, second, null]];
  const apart = both && first.data !== null && second.data !== null && explainsOther(first.data, second.data);
  return (
    <div class={both ? "columns two" : "columns"}>
      {columns.map(([number, loaded, twin, twinRun]) => (
        <section class="column" key={number} aria-label={`Run ${plain(runs[number]?.name ?? "")}`}>
          {(both || runs.length > 1) && (
            <h2 class="column-name" title={plain(runs[number]?.name ?? "")}>
              <bdi>{brief(runs[number]?.name ?? "", 60)}</bdi>
            </h2>
          )}
          {apart && loaded.data && <Explained record={loaded.data} />}
          {loaded.error ? (
            <Problem error={loaded.error} retry={loaded.retry} />
          ) : loaded.data ? (
            (["proponents", "opponents"] as Side[]).map((side) => (
              <CandidateList
                key={side} record={loaded.data as QueryRecord} side={side} highlights={view.highlights} hovered={hovered} hover={hover}
                twins={twinRun === null ? null : twin.data} twinName={twinRun === null ? "" : (runs[twinRun]?.name ?? "")}
                offered={side === "proponents" || (runs[number]?.has.includes("opponents") ?? false)}
              />
            ))
          ) : loaded.loading ? (
            <Waiting what="Loading the query" />
          ) : (
            <Empty title="Not in this run">This file does not have the query.</Empty>
          )}
        </section>
      ))}
    </div>
  );
}

function CandidateList(props: {
  record: QueryRecord; side: Side; highlights: string[]; hovered: string | null; hover: (id: string | null) => void;
  twins: QueryRecord | null; twinName: string; offered: boolean;
}) {
  const { record, side } = props;
  const candidates = record[side];
  if (!props.offered && candidates.length === 0) return null;
  const most = candidates.reduce((value, candidate) => Math.max(value, Math.abs(candidate.score)), 0);
  const correct = candidates.filter((candidate) => candidate.correct).length;
  const id = (number: number, rank: number) => `p-${number}-${side}-${rank}`;
  const twinOf = (candidate: Candidate) => {
    const match = props.twins?.[side].find((other) => other.example_id === candidate.example_id);
    const number = props.twins?.run;
    if (!match || number === undefined) return null;
    return {
      rank: match.rank, column: brief(props.twinName, 24),
      go: () => document.getElementById(id(number, match.rank))?.scrollIntoView({ block: "center" }),
    };
  };
  return (
    <section aria-label={`${side === "proponents" ? "Proponents" : "Opponents"}${props.twinName ? ` of run ${record.run + 1}` : ""}`}>
      <h3 class="list-name">
        {side === "proponents" ? "Proponents" : "Opponents"}
        <span class="note">{plural(candidates.length, "candidate")}{correct > 0 ? `, ${correct} correct` : ""}</span>
      </h3>
      {candidates.length === 0 && <p class="note">None in the file.</p>}
      {candidates.map((candidate) => {
        const twin = twinOf(candidate);
        return (
          <CandidateCard
            key={`${record.run}/${record.place}/${side}/${candidate.rank}`}
            id={id(record.run, candidate.rank)}
            candidate={candidate} most={most} highlights={props.highlights} twin={twin}
            linked={twin !== null && props.hovered === candidate.example_id} hover={props.twins ? props.hover : undefined}
            more={(start) => api.candidateOfRun(record.run, record.place, side, candidate.rank, start)}
          />
        );
      })}
    </section>
  );
}

function SpectraOfRuns({ view, runs }: { view: View; runs: (RunSummary | undefined)[] }) {
  return (
    <details class="panel" open={view.spectra} onToggle={(event) => event.currentTarget.open !== view.spectra && change({ spectra: event.currentTarget.open }, false)}>
      <summary><h2>Correction for the task</h2><span class="note">how much the task's own queries shape it (λ)</span></summary>
      {view.spectra && (
        <div class="columns two">
          {runs.map((summary) => summary?.mixing && (
            <div class="column" key={summary.run}>
              <h3 class="column-name"><bdi>{brief(summary.name, 60)}</bdi></h3>
              <SpectrumPanel mixing={summary.mixing} />
            </div>
          ))}
        </div>
      )}
    </details>
  );
}

function RawRecord({ run, place, close }: { run: number; place: number; close: () => void }) {
  const raw = useRequest(`${run}/${place}`, (signal) => api.raw(run, place, signal));
  return (
    <Dialog title="Raw record" close={close} wide>
      {raw.error && <Problem error={raw.error} retry={raw.retry} />}
      {!raw.data && !raw.error && <Waiting what="Loading the record" />}
      {raw.data && (
        <>
          <pre class="raw"><Plain text={raw.data.text} /></pre>
          {raw.data.text.length < raw.data.characters && (
            <p class="note">The beginning of {count(raw.data.characters)} characters. The export has the whole record.</p>
          )}
        </>
      )}
    </Dialog>
  );
}
