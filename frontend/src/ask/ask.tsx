// The live question: the form, the work that goes on, and the answer.
import { useEffect, useState } from "preact/hooks";
import { api } from "../api/client";
import type { Answer, Generation, IndexSummary, Session } from "../api/types";
import { count } from "../format";
import { asError, useJob, useRequest } from "../hooks";
import { plain } from "../passages/visible";
import { change, currentView, useView } from "../state";
import { Empty, Problem, Waiting } from "../ui/parts";
import { AnswerView } from "./answer";
import { Form } from "./form";
import { Generated } from "./generated";
import { partOf } from "./join";
import { JobLine } from "./job";

async function known(key: string, signal: AbortSignal): Promise<Answer | null> {
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
  const [fresh, setFresh] = useState<Answer | null>(null);
  const methods = view.methods.filter((method) => index.methods.includes(method));
  const chosen = methods.length > 0 ? methods : index.methods;
  // A link names an answer; it is shown where the server has it, and never computed anew.
  const have = fresh?.key === view.key;
  const found = useRequest(view.key === null || have ? null : view.key, (signal) => known(view.key ?? "", signal));
  const answer = have ? fresh : !found.stale ? found.data : null;
  useEffect(() => {
    // A link may name an answer only: then the form says what was asked.
    if (answer && !view.prompt && !view.asked) change({ prompt: answer.prompt, asked: answer.completion }, false);
  }, [answer]);

  const generate = () =>
    generating.start(() => {
      setGeneration(null);
      return api.generate(currentView().prompt, 16);
    }, (result) => result.kind === "generation" && setGeneration(result));
  const attribute = () =>
    attributing.start(
      () => {
        const { prompt, asked, top } = currentView();
        return api.attribute({ prompt, completion: asked, methods: chosen, top });
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
          <span><b>{plain(index.name)}</b> {count(index.candidates)} candidates × {count(index.dimensions)}, {plain(index.codec)}</span>
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
                const part = partOf(generation, first, last);
                change({ prompt: part.prompt, asked: part.completion });
              }}
              close={() => setGeneration(null)}
            />
          )}
          {attributing.running && <JobLine work={attributing} />}
          {attributing.error && <div class="wide-row"><Problem error={attributing.error} retry={attribute} /></div>}
        </Form>
        {found.error && <Problem error={found.error} retry={found.retry} />}
        {view.key !== null && !answer && found.loading && <Waiting what="Looking for the answer" />}
        {view.key !== null && !answer && !found.loading && !found.error && !found.stale && (
          <Empty title="The server no longer has this answer">Press Attribute to compute it.</Empty>
        )}
        {answer && <AnswerView key={answer.key} answer={answer} index={index} view={view} />}
        {view.key === null && !attributing.running && !generation && (
          <Empty title="Ask why">
            Give a prompt and what the model says after it, or let the model answer. Attribute ranks the training examples that made it say that.
          </Empty>
        )}
      </div>
    </main>
  );
}
