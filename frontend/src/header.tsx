// The header: name, tabs, theme, link, help.
import { useEffect, useRef, useState } from "preact/hooks";
import type { Session } from "./api/types";
import { useKeys } from "./keys";
import { change } from "./state";
import { useTheme, type Theme } from "./theme";
import { Dialog } from "./ui/parts";

const KEYS: [string, string][] = [
  ["j  ↓", "next query"], ["k  ↑", "previous query"], ["]", "next page"], ["[", "previous page"], ["/", "search"],
  ["c", "one column or side by side"], ["g r", "go to Results"], ["g a", "go to Ask"], ["← →", "next token of a split, next point of a chart"],
  ["?", "this help"], ["Esc", "close the menu or dialog"],
];

export function Header({ session, tab }: { session: Session | null; tab: "results" | "ask" }) {
  const [help, showHelp] = useState(false);
  const [theme, setTheme] = useTheme();
  const pending = useRef(0);
  const results = Boolean(session?.runs.length);
  const ask = Boolean(session?.index);
  const go = (to: "results" | "ask") => () => {
    if (Date.now() - pending.current < 1500 && (to === "results" ? results : ask)) change({ tab: to });
    pending.current = 0;
  };
  useKeys({ "?": () => showHelp(true), g: () => (pending.current = Date.now()), r: go("results"), a: go("ask") });
  return (
    <header class="header">
      <a class="skip" href="#main" onClick={(event) => {
        event.preventDefault();
        const main = document.getElementById("main");
        main?.setAttribute("tabindex", "-1");
        main?.focus();
      }}>
        Skip to content
      </a>
      <span class="brand">trackstar <span>explore</span></span>
      <nav class="tabs" aria-label="Views">
        {results && (
          <button type="button" aria-current={tab === "results" ? "page" : undefined} onClick={() => change({ tab: "results" })}>
            Results
          </button>
        )}
        {ask && (
          <button type="button" aria-current={tab === "ask" ? "page" : undefined} onClick={() => change({ tab: "ask" })}>
            Ask
          </button>
        )}
      </nav>
      <span class="grow" />
      <CopyLink />
      <select aria-label="Theme" value={theme} onChange={(event) => setTheme(event.currentTarget.value as Theme)}>
        <option value="system">System</option>
        <option value="light">Light</option>
        <option value="dark">Dark</option>
      </select>
      <button type="button" class="small" aria-label="Keyboard help" title="Keyboard help" onClick={() => showHelp(true)}>
        ?
      </button>
      {help && (
        <Dialog title="Keyboard help" close={() => showHelp(false)}>
          <dl class="keys">
            {KEYS.map(([key, what]) => (
              <div key={key}>
                <dt>{key.split(/\s+/).map((part) => <kbd key={part}>{part}</kbd>)}</dt>
                <dd>{what}</dd>
              </div>
            ))}
          </dl>
          {session && <p class="note">trackstar {session.version}</p>}
        </Dialog>
      )}
    </header>
  );
}

function CopyLink() {
  const [message, setMessage] = useState("");
  useEffect(() => {
    if (!message) return undefined;
    const timer = setTimeout(() => setMessage(""), 1600);
    return () => clearTimeout(timer);
  }, [message]);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(location.href);
      setMessage("Copied");
    } catch {
      setMessage("Copy the address from the address bar");
    }
  };
  return (
    <>
      <span role="status" class="note">{message}</span>
      <button type="button" class="small" onClick={copy}>Copy link</button>
    </>
  );
}
