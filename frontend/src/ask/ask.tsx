// The live question: the form, running jobs, and the answer.
import { useEffect, useState } from "preact/hooks";
import { api } from "../api/client";
import type { Answer, Generation, IndexSummary, Session } from "../api/types";
import { count } from "../format";
import { asError, useJob, useRequest } from "../hooks";
import { plain } from "../candidates/visible";
import { change, currentView, useView } from "../state";
import { Empty, Problem, Waiting } from "../ui/parts";
import { AnswerView } from "./answer";
import { Form } from "./form";
import { Generated } from "./generated";
import { type Part, partOf, tokensOf } from "./part";
import { JobLine } from "./job";

async function cachedAnswer(key: string, signal: AbortSignal): Promise<Answer | null> {
  try {
    return await api.answer(key, signal);
  } catch (error) {
    if (asError(error).status === 404) return null;
    throw error;
  }
}

export function Ask({ index }: { session: Session; index: IndexSummary }) {
  const view = useView();
  const generating = useJob();
  const attributing = useJob();
  const [generation, setGeneration] = useState<Generation | null>(null);
  const [part, setPart] = useState<Part | null>(null);
  const [fresh, setFresh] = useState<Answer | null>(null);
  const methods = view.methods.filter((method) => index.methods.includes(method));
  const chosen = methods.length > 0 ? methods : index.methods;
  // A link names an answer. It is shown if the server still has it, and never computed again.
  const current = fresh?.key === view.key;
  const linked = useRequest(view.key === null || current ? null : view.key, (signal) => cachedAnswer(view.key ?? "", signal));
  const answer = current ? fresh : !linked.stale ? linked.data : null;
  useEffect(() => {
    // A link may name only an answer; then the form shows its question.
    if (answer && !view.prompt && !view.completion) change({ prompt: answer.prompt, completion: answer.completion }, false);
  }, [answer]);

  const generate = () =>
    generating.start(() => {
      setGeneration(null);
      return api.generate(currentView().prompt, 16);
    }, (result) => result.kind === "generation" && setGeneration(result));
  const attribute = () =>
    attributing.start(
      () => {
        const { prompt, completion, join, top } = currentView();
        const tokens = tokensOf(part, prompt, completion);
        return api.attribute({ prompt, completion, join, tokens, methods: chosen, top });
      },
      (result) => {
        if (result.kind !== "answer") return;
        setFresh(result);
        change({ key: result.key, row: null, over: "candidate", side: "proponents" });
      },
    );
  return (
    <main class="ask" id="main" aria-label="Ask">
      <div class="ask-inner">
        <p class="index-line">
          <span><b>{plain(index.name)}</b> {count(index.candidates)} candidates × {count(index.dimensions)} dimensions, {plain(index.codec)}</span>
          <span>{plain(index.architecture)}, {plain(index.model)}</span>
          <span>corpus {plain(index.corpus)}</span>
          <span>{plain(index.coverage)}</span>
        </p>
        <Form view={view} index={index} methods={chosen} busy={generating.running || attributing.running} generate={generate} attribute={attribute}>
          {generating.running && <JobLine work={generating} />}
          {generating.error && <div class="wide-row"><Problem error={generating.error} retry={generate} /></div>}
          {generation && (
            <Generated
              generation={generation}
              choose={(first, last) => {
                const chosenPart = partOf(generation, first, last);
                setPart(chosenPart);
                change({ prompt: chosenPart.prompt, completion: chosenPart.completion });
              }}
              close={() => setGeneration(null)}
            />
          )}
          {attributing.running && <JobLine work={attributing} />}
          {attributing.error && <div class="wide-row"><Problem error={attributing.error} retry={attribute} /></div>}
        </Form>
        {linked.error && <Problem error={linked.error} retry={linked.retry} />}
        {view.key !== null && !answer && linked.loading && <Waiting what="Loading the answer" />}
        {view.key !== null && !answer && !linked.loading && !linked.error && !linked.stale && (
          <Empty title="The server no longer has this answer">Press Attribute to compute it again.</Empty>
        )}
        {answer && <AnswerView key={answer.key} answer={answer} index={index} view={view} />}
        {view.key === null && !attributing.running && !generation && (
          <Empty title="Ask a question">
            Enter a prompt and a completion, or let the model answer. Attribute then ranks the training examples that moved the model towards the completion.
          </Empty>
        )}
      </div>
    </main>
  );
}
