// The answer: the completion's probability, λ, one column per method, and the overview of all candidates.
import { api, downloads } from "../api/client";
import type { Answer, IndexSummary, Ranking } from "../api/types";
import { count, percent, score } from "../format";
import { useRequest } from "../hooks";
import { TaskWeight, taskWeightInWords } from "../charts/spectrum";
import { EntityLegend, HighlightBar } from "../candidates/selection";
import { brief, plain } from "../candidates/visible";
import { change, type View } from "../state";
import { ExportMenu, Segmented } from "../ui/parts";
import { Term } from "../ui/term";
import { Plain } from "../ui/text";
import type { TermName } from "../glossary";
import { LiveCandidate } from "./candidate";
import { InsightPanel } from "./insight";

const LONGEST_HEADING = 400;

/** The end of a long prompt, which the completion follows. */
function ending(prompt: string): string {
  return prompt.length > LONGEST_HEADING ? `…${prompt.slice(-LONGEST_HEADING)}` : prompt;
}

/** A completion with the white space at its ends shown. */
function spaced(completion: string): string {
  const shown = (space: string) => space.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return completion.replace(/^\s+/, shown).replace(/\s+$/, shown);
}

const SCORE_TERMS: Record<string, TermName> = { TrackStar: "influence", BM25: "bm25", embeddings: "embeddings" };

function ScoreName({ ranking }: { ranking: Ranking }) {
  const name = SCORE_TERMS[ranking.method];
  return name ? <Term name={name}>{plain(ranking.score)}</Term> : <span>{plain(ranking.score)}</span>;
}

export function AnswerView({ answer, index, view }: { answer: Answer; index: IndexSummary; view: View }) {
  // Token splits and effects that were computed before, here or by the sender of a link.
  const details = useRequest(answer.key, (signal) => api.details(answer.key, signal)).data;
  const earlier = view.prompt !== answer.prompt || view.completion !== answer.completion;
  const columns = answer.rankings.length;
  const opponents = answer.rankings.some((ranking) => ranking.opponents.length > 0);
  const side = opponents ? view.side : "proponents";
  const marked = answer.rankings.some((ranking) => ranking[side].some((candidate) => candidate.marks.length > 0));
  return (
    <section class="answer" aria-label="Answer">
      <div class="query-head">
        <h1 class="question" dir="auto">
          <Plain text={ending(answer.prompt + answer.separator)} /><span class="completion"><Plain text={spaced(answer.completion)} /></span>
        </h1>
        <div class="tools"><ExportMenu what="answer" address={(format) => downloads.answer(answer.key, format)} /></div>
      </div>
      <p class="answer-facts">
        <span title="The model's probability of the completion after the prompt"><b>P({brief(spaced(answer.completion), 40)}) = {percent(answer.probability)}</b> loss {score(answer.loss)} nats</span>
        <span><TaskWeight mixing={answer.mixing} /> {taskWeightInWords(answer.mixing)}</span>
        <span>top {count(answer.top)} of {count(index.candidates)} candidates</span>
      </p>
      {earlier && <p class="note" role="status">This answers an earlier question. Press Attribute to answer the one above.</p>}
      {answer.notes.map((note) => <p class="note" key={note}><Plain text={note} /></p>)}
      <div class="row tools-row">
        {opponents && (
          <Segmented
            label="Side" value={side}
            choices={[{ value: "proponents", label: "Proponents" }, { value: "opponents", label: "Opponents" }]}
            choose={(value) => change({ side: value })}
          />
        )}
        <span class="grow" />
        {marked && <EntityLegend />}
        <HighlightBar />
      </div>
      <div class={columns >= 3 ? "columns three" : columns === 2 ? "columns two" : "columns"}>
        {answer.rankings.map((ranking) => {
          const most = ranking[side].reduce((value, candidate) => Math.max(value, Math.abs(candidate.score)), 0);
          return (
            <section class="column" key={ranking.method} aria-label={plain(ranking.method)}>
              <div class="column-head"><h2 class="column-name"><strong>{plain(ranking.method)}</strong></h2><ScoreName ranking={ranking} /></div>
              {ranking[side].length === 0 && <p class="note">{side === "opponents" ? "This method has no opponents." : "No candidate has a positive score."}</p>}
              {ranking[side].map((candidate) => (
                <LiveCandidate
                  key={`${side}/${candidate.rank}`} candidate={candidate} most={most} answer={answer} index={index} view={view} details={details}
                  id={`a-${answer.rankings.indexOf(ranking)}-${side}-${candidate.rank}`}
                />
              ))}
            </section>
          );
        })}
      </div>
      <InsightPanel answer={answer} index={index} view={view} />
    </section>
  );
}
