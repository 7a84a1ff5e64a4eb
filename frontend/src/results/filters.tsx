// The filters above the list of queries.
import { useEffect, useState } from "preact/hooks";
import type { Kind, QueryPage, RunSummary } from "../api/types";
import { KINDS, refilter, type View } from "../state";
import { MultiSelect } from "../ui/multiselect";
import { kindName } from "./answer";

type Answered = "yes" | "no" | null;

export function isFiltered(view: View): boolean {
  return Boolean(
    view.search || view.relation.length || view.bucket.length || view.kind.length || view.model_correct || view.proponent_correct ||
      view.score_min !== null || view.score_max !== null,
  );
}

export function Filters({ view, run, page }: { view: View; run: RunSummary; page: QueryPage | null }) {
  const has = (field: string) => run.has.includes(field);
  return (
    <div class="filters" role="group" aria-label="Filters">
      {(has("relation") || view.relation.length > 0) && (
        <MultiSelect label="Relation" facets={page?.relations ?? []} chosen={view.relation} choose={(relation) => refilter({ relation })} />
      )}
      {(has("bucket") || view.bucket.length > 0) && (
        <MultiSelect label="Bucket" facets={page?.buckets ?? []} chosen={view.bucket} choose={(bucket) => refilter({ bucket })} />
      )}
      {(run.kinds.length > 1 || view.kind.length > 0) && (
        <MultiSelect
          label="Kind"
          facets={page?.kinds ?? []}
          chosen={view.kind}
          choose={(values) => refilter({ kind: values.filter((value): value is Kind => KINDS.some((kind) => kind === value)) })}
          say={kindName}
        />
      )}
      {(has("model_correct") || view.model_correct !== null) && (
        <Either label="Model" yes="correct" no="incorrect" value={view.model_correct} choose={(model_correct) => refilter({ model_correct })} />
      )}
      {(has("proponent_correct") || has("gold") || has("entailment") || view.proponent_correct !== null) && (
        <Either
          label="Proponents"
          yes="some correct"
          no="none correct"
          value={view.proponent_correct}
          choose={(proponent_correct) => refilter({ proponent_correct })}
        />
      )}
      <ScoreRange view={view} />
      {isFiltered(view) && (
        <button
          type="button"
          class="link clear"
          onClick={() =>
            refilter({
              search: "", relation: [], bucket: [], kind: [], model_correct: null, proponent_correct: null, score_min: null,
              score_max: null,
            })
          }
        >
          Clear filters
        </button>
      )}
    </div>
  );
}

function Either(props: { label: string; yes: string; no: string; value: Answered; choose: (value: Answered) => void }) {
  return (
    <label class={props.value ? "field active" : "field"}>
      <span class="field-name">{props.label}</span>
      <select
        aria-label={props.label}
        value={props.value ?? ""}
        onChange={(event) => {
          const value = event.currentTarget.value;
          props.choose(value === "yes" || value === "no" ? value : null);
        }}
      >
        <option value="">any</option>
        <option value="yes">{props.yes}</option>
        <option value="no">{props.no}</option>
      </select>
    </label>
  );
}

function ScoreRange({ view }: { view: View }) {
  return (
    <div class={view.score_min !== null || view.score_max !== null ? "field active" : "field"} role="group" aria-label="Top score">
      <span class="field-name">Score</span>
      <Limit label="Lowest score" placeholder="min" value={view.score_min} choose={(score_min) => refilter({ score_min })} />
      <span aria-hidden="true">–</span>
      <Limit label="Highest score" placeholder="max" value={view.score_max} choose={(score_max) => refilter({ score_max })} />
    </div>
  );
}

function Limit(props: { label: string; placeholder: string; value: number | null; choose: (value: number | null) => void }) {
  const [typed, type] = useState(props.value === null ? "" : String(props.value));
  useEffect(() => type(props.value === null ? "" : String(props.value)), [props.value]);
  const invalid = typed.trim() !== "" && !Number.isFinite(Number(typed));
  return (
    <input
      type="text"
      inputMode="decimal"
      class="limit"
      aria-label={props.label}
      aria-invalid={invalid}
      placeholder={props.placeholder}
      maxLength={20}
      value={typed}
      onInput={(event) => type(event.currentTarget.value)}
      onChange={(event) => {
        const value = event.currentTarget.value.trim();
        if (value === "") props.choose(null);
        else if (Number.isFinite(Number(value))) props.choose(Number(value));
      }}
    />
  );
}
