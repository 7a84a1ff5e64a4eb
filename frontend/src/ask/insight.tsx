// Overview of all candidates: distribution, scatter, spectra, groups.
import { api } from "../api/client";
import type { Answer, IndexSummary } from "../api/types";
import { Histogram } from "../charts/histogram";
import { Scatter } from "../charts/scatter";
import { SpectrumPanel } from "../charts/spectrum";
import { count } from "../format";
import { useRequest } from "../hooks";
import { change, type View } from "../state";
import { Problem, Waiting } from "../ui/parts";
import { GroupsPanel } from "./groups";

export function InsightPanel({ answer, index, view }: { answer: Answer; index: IndexSummary; view: View }) {
  return (
    <details class="insight" open={view.insight} onToggle={(event) => event.currentTarget.open !== view.insight && change({ insight: event.currentTarget.open }, false)}>
      <summary><h2>Insight</h2><span class="note">all {count(index.candidates)} candidates, the correction, groups</span></summary>
      {view.insight && <Inside answer={answer} index={index} view={view} />}
    </details>
  );
}

function Inside({ answer, index, view }: { answer: Answer; index: IndexSummary; view: View }) {
  const insight = useRequest(answer.key, (signal) => api.insight(answer.key, signal));
  return (
    <div class="charts">
      {insight.error && <Problem error={insight.error} retry={insight.retry} />}
      {insight.loading && <Waiting what="Loading the overview" />}
      {insight.data && (
        <>
          <section><h3>Distribution of influence</h3><Histogram insight={insight.data} /></section>
          {insight.data.points.length > 0 && <section><h3>Influence and lexical overlap</h3><Scatter insight={insight.data} /></section>}
        </>
      )}
      <section><h3>Correction for the task</h3><SpectrumPanel mixing={answer.mixing} /></section>
      {index.metadata.length > 0 && <section><h3>Groups</h3><GroupsPanel answer={answer} index={index} view={view} /></section>}
    </div>
  );
}
