// A candidate of a live answer, with its split over tokens and its measured effect.
import { useEffect, useState } from "preact/hooks";
import { api } from "../api/client";
import type { Answer, Details, Effect, IndexSummary, Candidate, TokenSplit } from "../api/types";
import { percent, points } from "../format";
import { useJob } from "../hooks";
import { CandidateCard } from "../candidates/card";
import { brief } from "../candidates/visible";
import { change, type View } from "../state";
import { Problem } from "../ui/parts";
import { JobLine } from "./job";
import { SplitView } from "./split";

type Over = "candidate" | "query";

export function LiveCandidate(props: { candidate: Candidate; id: string; most: number; answer: Answer; index: IndexSummary; view: View; details: Details | null }) {
  const { candidate, answer, index, view } = props;
  const [splits, keep] = useState<Partial<Record<Over, TokenSplit>>>({});
  const [over, turn] = useState<Over | null>(null);
  const [effect, measured] = useState<Effect | null>(null);
  const splitting = useJob();
  const measuring = useJob();
  const row = candidate.row;
  const { details } = props;
  useEffect(() => {
    if (!details || row === null) return;
    const earlier = details.splits.filter((split) => split.row === row);
    keep((before) => ({ ...Object.fromEntries(earlier.map((split) => [split.over, split])), ...before }));
    measured((before) => before ?? details.effects.find((measurement) => measurement.row === row) ?? null);
    if (view.row === row && earlier.some((split) => split.over === view.over)) turn(view.over);
  }, [details]);
  const show = (side: Over) => {
    if (row === null) return;
    turn(side);
    change({ row, over: side }, false);
    if (splits[side]) return;
    splitting.start(() => api.tokens(answer.key, row, side), (result) => {
      if (result.kind === "tokens") keep((before) => ({ ...before, [side]: result }));
    });
  };
  const measure = () =>
    row !== null && measuring.start(() => api.tailPatch(answer.key, row), (result) => result.kind === "effect" && measured(result));
  const split = over ? splits[over] : undefined;
  const actions = row !== null && (
    <>
      <button
        type="button" class="small" aria-pressed={over !== null} disabled={splitting.running}
        onClick={() => (over ? (turn(null), change({ row: null }, false)) : show(view.row === row ? view.over : "candidate"))}
      >
        Tokens
      </button>
      {over && (
        <button type="button" class="small" aria-pressed={over === "query"} disabled={splitting.running} onClick={() => show(over === "query" ? "candidate" : "query")}>
          Over the query
        </button>
      )}
      <button
        type="button" class="small" disabled={index.step === null || measuring.running}
        title={index.step === null ? (index.no_step ?? "No training step can be made") : `Measure the effect of one training step on this candidate (tail-patch): ${index.step}`}
        onClick={measure}
      >
        Measure
      </button>
      {effect && <EffectLine effect={effect} completion={answer.completion} />}
      {splitting.running && <JobLine work={splitting} />}
      {measuring.running && <JobLine work={measuring} />}
      {splitting.error && <Problem error={splitting.error} retry={() => show(over ?? "candidate")} />}
      {measuring.error && <Problem error={measuring.error} retry={measure} />}
    </>
  );
  return (
    <CandidateCard
      candidate={candidate} id={props.id} most={props.most} highlights={view.highlights} chosen={row !== null && view.row === row}
      more={(start) => api.candidateOfIndex(row ?? 0, start)} actions={actions}
      instead={split && <SplitView split={split} marks={split.text.startsWith(candidate.text) ? candidate.marks : []} highlights={view.highlights} />}
    />
  );
}

function EffectLine({ effect, completion }: { effect: Effect; completion: string }) {
  const up = effect.after >= effect.before;
  return (
    <span class="effect" role="status" title={effect.step}>
      P({brief(completion, 24)}): {percent(effect.before)} → {percent(effect.after)} <b class={up ? "up" : "down"}>({points(effect.before, effect.after)})</b>
    </span>
  );
}
