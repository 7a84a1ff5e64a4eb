// The sidebar: search, filters, sort order, and one page of the matching queries.
import { useEffect, useRef, useState } from "preact/hooks";
import { downloads } from "../api/client";
import type { QueryPage, QueryRow, RunSummary, Sort } from "../api/types";
import { count, plural, score } from "../format";
import { useDebounced, type Loaded } from "../hooks";
import { brief } from "../candidates/visible";
import { PAGE_SIZE, change, refilter, type View } from "../state";
import { Empty, ExportMenu, Problem, Waiting } from "../ui/parts";
import { Filters } from "./filters";

const SORT_NAMES: Record<Sort, string> = {
  file: "File order", prompt: "Prompt", relation: "Relation", frequency: "Frequency", score: "Top score", rank: "Rank of first correct",
};

export function Sidebar(props: {
  view: View;
  run: RunSummary;
  page: Loaded<QueryPage>;
  chosen: number | null;
}) {
  const { view, run, page } = props;
  const data = page.data;
  const last = data ? Math.max(0, Math.ceil(data.matching / PAGE_SIZE) - 1) : 0;
  const to = (number: number) => change({ page: number, at: [] });
  const sorts = (Object.keys(SORT_NAMES) as Sort[]).filter(
    (sort) => sort === view.sort || ((sort !== "relation" && sort !== "frequency") || run.has.includes(sort)),
  );
  return (
    <nav class="sidebar" aria-label="Queries">
      <div class="sidebar-top">
        <SearchBox view={view} />
        <Filters view={view} run={run} page={data} />
        <div class="row">
          <label class="grow inline">
            <span class="note">Sort by</span>
            <select
              class="grow"
              aria-label="Sort by"
              value={view.sort}
              onChange={(event) => refilter({ sort: event.currentTarget.value as Sort })}
            >
              {sorts.map((sort) => (
                <option key={sort} value={sort}>
                  {SORT_NAMES[sort]}
                </option>
              ))}
            </select>
          </label>
          <button
            type="button"
            class="small toggle"
            aria-label="Descending"
            title={view.descending ? "Descending" : "Ascending"}
            aria-pressed={view.descending}
            onClick={() => refilter({ descending: !view.descending })}
          >
            {view.descending ? "↓" : "↑"}
          </button>
        </div>
        <div class="row spread">
          <span class="found" role="status" aria-live="polite">
            {data ? (data.matching === data.total ? plural(data.total, "query", "queries") : `${count(data.matching)} of ${count(data.total)} queries`) : "Loading queries"}
          </span>
          <ExportMenu what="queries" address={(format) => downloads.run(run.run, view, format)} />
        </div>
      </div>
      {page.error && <Problem error={page.error} retry={page.retry} />}
      <Rows view={view} page={page} chosen={props.chosen} run={run.run} />
      {data && last > 0 && (
        <div class="pager" role="group" aria-label="Pages">
          <button type="button" class="small" aria-label="Previous page" disabled={view.page <= 0} onClick={() => to(view.page - 1)}>
            ‹
          </button>
          <span>
            Page{" "}
            <input
              type="text"
              inputMode="numeric"
              class="small page-number"
              aria-label="Page number"
              value={String(view.page + 1)}
              onChange={(event) => {
                const wanted = Number.parseInt(event.currentTarget.value, 10);
                if (Number.isFinite(wanted)) to(Math.max(0, Math.min(last, wanted - 1)));
              }}
            />{" "}
            of {count(last + 1)}
          </span>
          <button type="button" class="small" aria-label="Next page" disabled={view.page >= last} onClick={() => to(view.page + 1)}>
            ›
          </button>
        </div>
      )}
    </nav>
  );
}

function SearchBox({ view }: { view: View }) {
  const [typed, type] = useState(view.search);
  const sent = useRef(view.search);
  const send = useDebounced<string>(80, (search) => {
    sent.current = search;
    refilter({ search }, false);
  });
  useEffect(() => {
    if (view.search !== sent.current) {
      sent.current = view.search;
      type(view.search);
    }
  }, [view.search]);
  return (
    <div class="search">
      <input
        id="search-queries"
        type="search"
        aria-label="Search queries"
        placeholder="Search queries   /"
        maxLength={512}
        value={typed}
        onInput={(event) => {
          type(event.currentTarget.value);
          send(event.currentTarget.value);
        }}
      />
      <label class="check">
        <input type="checkbox" checked={view.search_candidates} onChange={(event) => refilter({ search_candidates: event.currentTarget.checked })} />
        In candidates' texts too
      </label>
    </div>
  );
}

function Rows({ view, page, chosen, run }: { view: View; page: Loaded<QueryPage>; chosen: number | null; run: number }) {
  const list = useRef<HTMLOListElement>(null);
  useEffect(() => {
    list.current?.querySelector('[aria-current="true"]')?.scrollIntoView({ block: "nearest" });
  }, [chosen, page.data]);
  if (!page.data) return page.error ? null : <Waiting what="Loading queries" />;
  if (page.data.items.length === 0) {
    return page.data.total === 0 ? (
      <Empty title="No queries">This file has no lines.</Empty>
    ) : (
      <Empty title="No query matches">Shorten the search or remove a filter.</Empty>
    );
  }
  return (
    <ol class={page.stale ? "rows stale" : "rows"} ref={list} start={page.data.offset + 1} aria-busy={page.loading}>
      {page.data.items.map((row, index) => (
        <li key={`${row.places[run]}-${index}`}>
          <Row row={row} current={chosen !== null && row.places[run] === chosen} sort={view.sort} />
        </li>
      ))}
    </ol>
  );
}

function Row({ row, current, sort }: { row: QueryRow; current: boolean; sort: Sort }) {
  return (
    <button type="button" class="query-row" aria-current={current ? "true" : undefined} onClick={() => change({ at: row.places })}>
      <span class="query-line" dir="auto">
        {brief(row.prompt, 110)} <b>{brief(row.completion, 50)}</b>
      </span>
      <span class="query-facts">
        <ModelMark correct={row.model_correct} />
        {row.relation && <span class="clip">{brief(row.relation, 60)}</span>}
        {sort === "frequency" && row.frequency !== null ? <span class="number">×{count(row.frequency)}</span> : row.bucket && <span>{brief(row.bucket, 20)}</span>}
        <span class="grow" />
        {row.rank !== null && <span class="number" title="Rank of the first correct proponent">✓ at {row.rank}</span>}
        {row.score !== null && <span class="number">{score(row.score)}</span>}
      </span>
    </button>
  );
}

function ModelMark({ correct }: { correct: boolean | null }) {
  if (correct === null) return null;
  return correct ? (
    <span class="right" role="img" title="The model answers correctly" aria-label="model correct">
      ●
    </span>
  ) : (
    <span class="wrong" role="img" title="The model answers incorrectly" aria-label="model incorrect">
      ○
    </span>
  );
}
