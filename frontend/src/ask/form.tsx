// The question's form: prompt, completion, methods, number of candidates.
import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import type { IndexSummary, Join } from "../api/types";
import { useDebounced } from "../hooks";
import { plain } from "../candidates/visible";
import { JOINS, LONGEST_PROMPT, MOST_TOP, change, currentView, type View } from "../state";

const JOIN_LABELS: Record<Join, string> = { auto: "as written", space: "with a space", none: "without a space" };

export function Form(props: {
  view: View; index: IndexSummary; methods: string[]; busy: boolean; generate: () => void; attribute: () => void; children: ComponentChildren;
}) {
  const { view, index, methods } = props;
  return (
    <form class="ask-form" aria-label="Question" onSubmit={(event) => {
      event.preventDefault();
      // The view already has the latest input; the props may still be those of the last rendering.
      if (!props.busy && currentView().completion.trim()) props.attribute();
    }}>
      <Area label="Prompt" value={view.prompt} placeholder="The Eiffel Tower is in" set={(prompt) => change({ prompt }, false)} />
      <Area label="Completion" value={view.completion} placeholder="Paris" set={(completion) => change({ completion }, false)} />
      <div class="wide-row">
        <button type="button" disabled={props.busy} onClick={props.generate}>Let the model answer</button>
        <fieldset aria-label="Methods">
          {index.methods.map((method) => (
            <label class="check" key={method}>
              <input
                type="checkbox"
                checked={methods.includes(method)}
                onChange={(event) => {
                  const wanted = event.currentTarget.checked;
                  const next = index.methods.filter((other) => (other === method ? wanted : methods.includes(other)));
                  if (next.length > 0) change({ methods: next }, false);
                  else event.currentTarget.checked = true;
                }}
              />
              {plain(method)}
            </label>
          ))}
        </fieldset>
        <label class="inline" title="What stands between the prompt and the completion">
          <span>Join</span>
          <select
            aria-label="Join" value={view.join}
            onChange={(event) => change({ join: JOINS.find((join) => join === event.currentTarget.value) ?? "auto" }, false)}
          >
            {JOINS.map((join) => <option key={join} value={join}>{JOIN_LABELS[join]}</option>)}
          </select>
        </label>
        <label class="inline">
          <span>Top</span>
          <input
            type="number" class="top-number" aria-label="Number of candidates" min={1} max={MOST_TOP} value={String(view.top)}
            onChange={(event) => {
              const top = Math.round(Number(event.currentTarget.value));
              if (top >= 1 && top <= MOST_TOP) change({ top }, false);
              else event.currentTarget.value = String(view.top);
            }}
          />
        </label>
        <span class="grow" />
        <button type="submit" class="primary" disabled={props.busy || !view.completion.trim()}>Attribute</button>
      </div>
      {props.children}
    </form>
  );
}

function Area(props: { label: string; value: string; placeholder: string; set: (value: string) => void }) {
  const [typed, type] = useState(props.value);
  const sent = useRef(props.value);
  const pending = useRef(false);
  const send = useDebounced<string>(120, (value) => {
    if (!pending.current) return;
    pending.current = false;
    sent.current = value;
    props.set(value);
  });
  useEffect(() => {
    if (props.value === sent.current) return;
    pending.current = false;
    sent.current = props.value;
    type(props.value);
  }, [props.value]);
  return (
    <label class="labelled">
      <span>{props.label}</span>
      <textarea
        aria-label={props.label} dir="auto" rows={2} maxLength={LONGEST_PROMPT} placeholder={props.placeholder} value={typed}
        onInput={(event) => {
          pending.current = true;
          type(event.currentTarget.value);
          send(event.currentTarget.value);
        }}
        onBlur={(event) => {
          if (!pending.current) return;
          pending.current = false;
          sent.current = event.currentTarget.value;
          props.set(event.currentTarget.value);
        }}
        onKeyDown={(event) => {
          if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
          event.currentTarget.blur();
          event.currentTarget.form?.requestSubmit();
        }}
      />
    </label>
  );
}
