// Result files: the list of queries at the side, metrics above, the chosen query below them.
import { useEffect } from "preact/hooks";
import { api, filterParameters } from "../api/client";
import type { QueryPage, QueryRecord, RunSummary, Session } from "../api/types";
import { brief } from "../candidates/visible";
import { remembered, useRequest, type Loaded } from "../hooks";
import { useKeys } from "../keys";
import { PAGE_SIZE, change, useView, type View } from "../state";
import { Empty, Waiting } from "../ui/parts";
import { Metrics } from "./metrics";
import { QueryView } from "./query";
import { Sidebar } from "./sidebar";

const pages = remembered<QueryPage>(30);
const records = remembered<QueryRecord>(40);

/** The shown runs: the run whose queries are listed, and the run beside it. */
export function shownRuns(view: View, runs: RunSummary[]): { run: number; other: number | null } {
  const run = view.run < runs.length ? view.run : 0;
  if (runs.length < 2) return { run, other: null };
  const wished = view.beside !== null && view.beside < runs.length && view.beside !== run ? view.beside : run === 0 ? 1 : 0;
  return { run, other: wished };
}

function useRecord(run: number, place: number | null | undefined): Loaded<QueryRecord> {
  const name = place === null || place === undefined ? null : `${run}/${place}`;
  return useRequest(name, (signal) => records(name ?? "", () => api.record(run, place ?? 0, signal)));
}

export function Results({ session }: { session: Session }) {
  const view = useView();
  const { runs } = session;
  const { run, other } = shownRuns(view, runs);
  const name = `${run}?${filterParameters(view)}&${view.page}`;
  const page = useRequest(name, (signal) =>
    pages(name, () => api.queries(run, view, view.page * PAGE_SIZE, PAGE_SIZE, signal)),
  );
  const items = page.data?.items ?? [];
  const places = view.at.length > 0 ? view.at : (items[0]?.places ?? []);
  const place = places[run] ?? null;
  const first = useRecord(run, place);
  const second = useRecord(other ?? 0, other === null || view.alone ? null : places[other]);

  const move = (by: number) => {
    if (page.stale) return;
    const at = items.findIndex((row) => row.places[run] === place);
    const next = items[at + by];
    if (next) change({ at: next.places });
    else if (by > 0 && page.data && page.data.offset + items.length < page.data.matching) change({ page: view.page + 1, at: [] });
    else if (by < 0 && view.page > 0) change({ page: view.page - 1, at: [] });
  };
  const turn = (by: number) => {
    const last = page.data ? Math.ceil(page.data.matching / PAGE_SIZE) - 1 : 0;
    const wanted = Math.max(0, Math.min(last, view.page + by));
    if (wanted !== view.page) change({ page: wanted, at: [] });
  };
  useKeys({
    j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
    "]": () => turn(1), "[": () => turn(-1),
    "/": () => document.getElementById("search-queries")?.focus(),
    c: () => other !== null && change({ alone: !view.alone }),
  });
  // Prefetch the next query, so that it is shown at once.
  useEffect(() => {
    const at = items.findIndex((row) => row.places[run] === place);
    const next = items[at + 1]?.places[run];
    if (at < 0 || next === null || next === undefined || first.loading) return undefined;
    const controller = new AbortController();
    const timer = setTimeout(() => {
      records(`${run}/${next}`, () => api.record(run, next, controller.signal)).catch(() => undefined);
    }, 250);
    return () => {
      clearTimeout(timer);
      controller.abort();
    };
  }, [place, page.data, first.loading]);

  // A link may name a page beyond the last, for example with a shorter file.
  useEffect(() => {
    const last = page.data ? Math.max(0, Math.ceil(page.data.matching / PAGE_SIZE) - 1) : null;
    if (!page.stale && last !== null && view.page > last) change({ page: last, at: [] }, false);
  }, [page.data, page.stale]);

  const summary = runs[run];
  if (!summary) return <Empty title="No result file is open">Start trackstar explore with a result file.</Empty>;
  const nothing = page.data && page.data.matching === 0 && view.at.length === 0;
  return (
    <div class="results">
      <Sidebar view={view} run={summary} page={page} chosen={place} />
      <main class="main" id="main" aria-label="Query">
        {runs.filter((each) => each.changed).map((each) => (
          <p class="note" role="status" key={each.run}>
            <bdi>{brief(each.name, 60)}</bdi> has changed since it was opened. Restart trackstar explore to see it as it is now.
          </p>
        ))}
        {page.data && (
          <Metrics
            metrics={page.data.metrics}
            runs={runs}
            shown={other === null ? [run] : [run, other]}
            stale={page.stale}
            matching={page.data.matching}
            total={page.data.total}
          />
        )}
        {nothing ? (
          <Empty title="No query matches">Shorten the search or remove a filter.</Empty>
        ) : place === null && !page.data ? (
          !page.error && <Waiting what="Loading" />
        ) : (
          <QueryView view={view} runs={runs} run={run} other={other} places={places} first={first} second={second} index={session.index !== null} />
        )}
      </main>
    </div>
  );
}
