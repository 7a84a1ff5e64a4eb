// A filter by several values of a field, with the number of queries for each value.
import { useState } from "preact/hooks";
import type { Facet } from "../api/types";
import { count } from "../format";
import { plain } from "../candidates/visible";
import { Outside } from "./text";
import { useOpen } from "./parts";

export function MultiSelect(props: {
  label: string; facets: Facet[]; chosen: string[]; choose: (values: string[]) => void;
  /** A value in words. */
  say?: (value: string) => string;
}) {
  const say = props.say ?? ((value: string) => value);
  const { box, open, set } = useOpen<HTMLDivElement>();
  const [typed, type] = useState("");
  const chosen = new Set(props.chosen);
  const offered = new Set(props.facets.map((facet) => facet.value));
  const all = [...props.chosen.filter((value) => !offered.has(value)).map((value) => ({ value, queries: 0 })), ...props.facets];
  const shown = all.filter((facet) => say(facet.value).toLowerCase().includes(typed.toLowerCase()));
  const toggle = (value: string) =>
    props.choose(chosen.has(value) ? props.chosen.filter((other) => other !== value) : [...props.chosen, value]);
  const summary = props.chosen.length === 0 ? "any" : props.chosen.length === 1 ? plain(say(props.chosen[0] ?? "")) : `${props.chosen.length} chosen`;
  return (
    <div class="menu multi" ref={box}>
      <button
        type="button"
        class={chosen.size ? "field active" : "field"}
        aria-expanded={open}
        onClick={() => set(!open)}
      >
        <span class="field-name">{props.label}</span>{" "}
        <span class="field-value">{summary}</span>
        <span aria-hidden="true">▾</span>
      </button>
      {open && (
        <div class="pop wide" role="group" aria-label={`${props.label} values`}>
          {all.length > 8 && (
            <input
              type="search"
              class="pop-search"
              placeholder={`Find ${props.label.toLowerCase()}`}
              aria-label={`Find ${props.label.toLowerCase()}`}
              value={typed}
              onInput={(event) => type(event.currentTarget.value)}
            />
          )}
          <div class="pop-list">
            {shown.slice(0, 300).map((facet) => (
              <label key={facet.value} class="item">
                <input type="checkbox" checked={chosen.has(facet.value)} onChange={() => toggle(facet.value)} />
                <Outside text={say(facet.value) || "(none)"} class="grow" />
                <span class="number">{count(facet.queries)}</span>
              </label>
            ))}
            {shown.length === 0 && <p class="note">No value matches.</p>}
          </div>
          {chosen.size > 0 && (
            <button type="button" class="small" onClick={() => props.choose([])}>
              Any {props.label.toLowerCase()}
            </button>
          )}
        </div>
      )}
    </div>
  );
}
