// The frame: the header and the chosen view of what is open.
import { Component, type ComponentChildren } from "preact";
import { useEffect } from "preact/hooks";
import { ApiError, api } from "./api/client";
import { Ask } from "./ask/ask";
import { Header } from "./header";
import { useRequest } from "./hooks";
import { SelectionOffer } from "./candidates/selection";
import { Results } from "./results/results";
import { useView } from "./state";
import { Empty, Problem, Waiting } from "./ui/parts";
import { TipLayer } from "./ui/tip";

/** Shows a defect in a view and keeps the header working. */
class Boundary extends Component<{ name: string; children: ComponentChildren }, { error: string | null; name: string }> {
  override state = { error: null as string | null, name: this.props.name };
  override componentDidCatch(error: unknown) {
    this.setState({ error: String(error), name: this.props.name });
  }
  render() {
    if (this.state.error === null || this.state.name !== this.props.name) return this.props.children;
    return (
      <main class="alone" id="main">
        <Problem
          error={new ApiError(500, `A defect of the page, please report it: ${this.state.error}`)}
          retry={() => this.setState({ error: null })}
        />
      </main>
    );
  }
}

export function App() {
  const view = useView();
  const session = useRequest("session", (signal) => api.session(signal));
  const data = session.data;
  const wanted = view.tab ?? (data && data.runs.length === 0 && data.index ? "ask" : "results");
  const tab = data && wanted === "results" && data.runs.length === 0 && data.index ? "ask" : data && wanted === "ask" && !data.index ? "results" : wanted;
  useEffect(() => {
    document.title = `${tab === "ask" ? "Ask" : "Results"} – trackstar explore`;
  }, [tab]);
  return (
    <>
      <Header session={data} tab={tab} />
      {session.error && (
        <main class="alone" id="main">
          <Problem error={session.error} retry={session.retry} />
        </main>
      )}
      {!data && !session.error && (
        <main class="alone" id="main">
          <Waiting what="Opening" />
        </main>
      )}
      <Boundary name={tab}>
        {data &&
        (tab === "ask" && data.index ? (
          <Ask session={data} index={data.index} />
        ) : data.runs.length > 0 ? (
          <Results session={data} />
        ) : (
          <main class="alone" id="main">
            <Empty title="Nothing is open">Start trackstar explore with a result file or an index.</Empty>
          </main>
        ))}
      </Boundary>
      <SelectionOffer />
      <TipLayer />
    </>
  );
}
