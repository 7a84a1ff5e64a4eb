// Small parts that all views use: states, dialogs, menus, toggles.
import type { ComponentChildren } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import type { ApiError } from "../api/client";
import type { ExportFormat } from "../api/types";

export function Problem({ error, retry }: { error: ApiError; retry?: () => void }) {
  return (
    <div class={error.status === 0 ? "state gone" : "state problem"} role="alert">
      <strong>{error.status === 0 ? "No answer" : error.status === 429 ? "Busy" : "Error"}</strong>
      <span>{error.message}</span>
      {retry && (
        <button type="button" class="small" onClick={retry}>
          Retry
        </button>
      )}
    </div>
  );
}

export function Waiting({ what }: { what: string }) {
  return (
    <div class="state waiting" role="status">
      {what}…
    </div>
  );
}

export function Empty({ title, children }: { title: string; children?: ComponentChildren }) {
  return (
    <div class="state empty">
      <strong>{title}</strong>
      {children && <span>{children}</span>}
    </div>
  );
}

export function Dialog(props: { title: string; close: () => void; wide?: boolean; children: ComponentChildren }) {
  const element = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    const before = document.activeElement;
    element.current?.showModal();
    return () => {
      if (before instanceof HTMLElement) before.focus();
    };
  }, []);
  return (
    <dialog
      ref={element}
      class={props.wide ? "dialog wide" : "dialog"}
      aria-label={props.title}
      onClose={props.close}
      onClick={(event) => event.target === element.current && element.current?.close()}
    >
      <div class="dialog-box">
        <div class="dialog-head">
          <h2>{props.title}</h2>
          <button type="button" class="quiet" aria-label="Close" onClick={() => element.current?.close()}>
            ✕
          </button>
        </div>
        <div class="dialog-body" tabIndex={0} role="region" aria-label={`${props.title}: content`}>
          {props.children}
        </div>
      </div>
    </dialog>
  );
}

/** State of a popover, which closes on Escape and when the focus or a click goes elsewhere. */
export function useOpen<T extends HTMLElement>() {
  const box = useRef<T>(null);
  const [open, set] = useState(false);
  // Before the popover is painted, so that a key or click that follows at once finds the listeners.
  useLayoutEffect(() => {
    if (!open) return undefined;
    const outside = (event: Event) => {
      if (event.target instanceof Node && !box.current?.contains(event.target)) set(false);
    };
    const key = (event: KeyboardEvent) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      set(false);
      box.current?.querySelector("button")?.focus();
    };
    document.addEventListener("pointerdown", outside);
    document.addEventListener("focusin", outside);
    document.addEventListener("keydown", key, true);
    return () => {
      document.removeEventListener("pointerdown", outside);
      document.removeEventListener("focusin", outside);
      document.removeEventListener("keydown", key, true);
    };
  }, [open]);
  return { box, open, set };
}

const FORMATS: [ExportFormat, string][] = [["csv", "CSV"], ["jsonl", "JSONL"], ["html", "HTML"]];

export function ExportMenu({ what, address }: { what: string; address: (format: ExportFormat) => string }) {
  const { box, open, set } = useOpen<HTMLDivElement>();
  return (
    <div class="menu" ref={box}>
      <button type="button" class="small" aria-expanded={open} aria-label={`Export ${what}`} onClick={() => set(!open)}>
        Export <span aria-hidden="true">▾</span>
      </button>
      {open && (
        <div class="pop right" role="group" aria-label={`Export ${what} as`}>
          {FORMATS.map(([format, name]) => (
            <a key={format} class="item" href={address(format)} download onClick={() => set(false)}>
              {name}
            </a>
          ))}
        </div>
      )}
    </div>
  );
}

export interface Choice<T extends string> {
  value: T;
  label: string;
  title?: string;
}

/** A row of buttons that choose one value. */
export function Segmented<T extends string>(props: {
  label: string;
  value: T;
  choices: Choice<T>[];
  choose: (value: T) => void;
}) {
  return (
    <div class="segmented" role="group" aria-label={props.label}>
      {props.choices.map((choice) => (
        <button
          key={choice.value}
          type="button"
          title={choice.title}
          aria-pressed={choice.value === props.value}
          onClick={() => props.choose(choice.value)}
        >
          {choice.label}
        </button>
      ))}
    </div>
  );
}

export function Chip(props: { kind?: string; title?: string; children: ComponentChildren }) {
  return (
    <span class={`chip ${props.kind ?? ""}`} title={props.title}>
      {props.children}
    </span>
  );
}

/** The size of a score as a bar, relative to the column's largest. */
export function Bar({ value, most }: { value: number; most: number }) {
  const part = most > 0 && Number.isFinite(value) ? Math.min(1, Math.abs(value) / most) : 0;
  return (
    <svg class={value < 0 ? "bar negative" : "bar"} viewBox="0 0 48 6" width="48" height="6" aria-hidden="true">
      <rect class="bar-ground" width="48" height="6" rx="1" />
      <rect class="bar-value" width={48 * part} height="6" rx="1" />
    </svg>
  );
}
