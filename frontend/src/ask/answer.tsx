// The answer: the completion's probability, λ, a column a method, and what all candidates look like.
import { api, downloads } from "../api/client";
import type { Answer, IndexSummary } from "../api/types";
import { count, percent, score } from "../format";
import { useRequest } from "../hooks";
import { EntityLegend, HighlightBar } from "../passages/selection";
import { brief, plain } from "../passages/visible";
import { change, type View } from "../state";
import { ExportMenu, Segmented } from "../ui/parts";
import { Plain } from "../ui/text";
import { Candidate } from "./candidate";
import { InsightPanel } from "./insight";

const LONGEST_HEADING = 400;

/** A long prompt's end, which the completion goes on from. */
function ending(prompt: string): string {
  return prompt.length > LONGEST_HEADING ? `…${prompt.slice(-LONGEST_HEADING)}` : prompt;
}

/** A completion with the spaces at its beginning shown, where they are not the one that the spacing rule puts there. */
function spaced(completion: string): string {
  return completion.replace(/^ {2,}/, (spaces) => "␣".repeat(spaces.length)).replace(/^ /, "");
}

export function AnswerView({ answer, index, view }: { answer: Answer; index: IndexSummary; view: View }) {
  // What was split and measured before, here or by whom a link comes from.
  const details = useRequest(answer.key, (signal) => api.details(answer.key, signal)).data;
  const earlier = view.prompt !== answer.prompt || view.asked !== answer.completion;
  const columns = answer.rankings.length;
  const opponents = answer.rankings.some((ranking) => ranking.opponents.length > 0);
  const side = opponents ? view.side : "proponents";
  const marked = answer.rankings.some((ranking) => ranking[side].some((passage) => passage.marks.length > 0));
  return (
    <section class="answer" aria-label="Answer">
      <div class="query-head">
        <h1 class="question" dir="auto">
          <Plain text={ending(answer.prompt)} /> <span class="completion"><Plain text={spaced(answer.completion)} /></span>
        </h1>
        <div class="tools"><ExportMenu what="answer" address={(format) => downloads.answer(answer.key, format)} /></div>
      </div>
      <p class="answer-facts">
        <span><b>P({brief(spaced(answer.completion), 40)}) = {percent(answer.probability)}</b> loss {score(answer.loss)} nats</span>
        <span><b>λ = {answer.mixing.value.toPrecision(3)}</b> {plain(answer.mixing.rule)}</span>
        <span>top {count(answer.top)} of {count(index.candidates)}</span>
      </p>
      {earlier && <p class="note" role="status">This answers an earlier question; press Attribute for the one above.</p>}
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
          const most = ranking[side].reduce((value, passage) => Math.max(value, Math.abs(passage.score)), 0);
          return (
            <section class="column" key={ranking.method} aria-label={plain(ranking.method)}>
              <h2 class="column-name"><strong>{plain(ranking.method)}</strong> {plain(ranking.score)}</h2>
              {ranking[side].length === 0 && <p class="note">{side === "opponents" ? "This method has no opponents." : "No candidate was found."}</p>}
              {ranking[side].map((passage) => (
                <Candidate
                  key={`${side}/${passage.rank}`} passage={passage} most={most} answer={answer} index={index} view={view} details={details}
                  id={`a-${answer.rankings.indexOf(ranking)}-${side}-${passage.rank}`}
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
