// Highlights: text selected in a candidate can be highlighted everywhere; the bar lists all highlights.
import { useEffect, useState } from "preact/hooks";
import { LONGEST_HIGHLIGHT, MOST_HIGHLIGHTS, change, currentView, useView } from "../state";
import { brief, plain } from "./visible";

export function addHighlight(text: string): void {
  const wanted = text.trim().slice(0, LONGEST_HIGHLIGHT);
  const { highlights } = currentView();
  if (!wanted || highlights.some((other) => other.toLowerCase() === wanted.toLowerCase())) return;
  change({ highlights: [...highlights, wanted].slice(-MOST_HIGHLIGHTS) });
}

interface Offer {
  text: string;
  x: number;
  y: number;
}

/** The button beside a selection. */
export function SelectionOffer() {
  const [offer, set] = useState<Offer | null>(null);
  useEffect(() => {
    const look = () => {
      const selection = getSelection();
      const inside = selection?.anchorNode?.parentElement?.closest(".candidate-text");
      const text = selection?.toString().trim() ?? "";
      if (!selection || !inside || !selection.rangeCount || text.length < 2 || text.length > LONGEST_HIGHLIGHT || text.includes("\n")) {
        set(null);
        return;
      }
      const box = selection.getRangeAt(0).getBoundingClientRect();
      set({ text, x: box.left + box.width / 2, y: box.bottom + 6 });
    };
    const later = () => setTimeout(look, 0);
    document.addEventListener("pointerup", later);
    document.addEventListener("keyup", later);
    addEventListener("scroll", look, true);
    return () => {
      document.removeEventListener("pointerup", later);
      document.removeEventListener("keyup", later);
      removeEventListener("scroll", look, true);
    };
  }, []);
  if (!offer) return null;
  return (
    <button
      type="button"
      class="offer primary small"
      style={{ left: `${Math.max(80, Math.min(innerWidth - 80, offer.x))}px`, top: `${offer.y}px` }}
      onPointerDown={(event) => event.preventDefault()}
      onClick={() => {
        addHighlight(offer.text);
        getSelection()?.removeAllRanges();
        set(null);
      }}
    >
      Highlight everywhere
    </button>
  );
}

export function HighlightBar() {
  const view = useView();
  const [typed, type] = useState("");
  return (
    <form
      class="highlights"
      aria-label="Highlights"
      onSubmit={(event) => {
        event.preventDefault();
        addHighlight(typed);
        type("");
      }}
    >
      {view.highlights.map((text) => (
        <button
          key={text}
          type="button"
          class="chip highlighted"
          aria-label={`Remove highlight ${plain(text)}`}
          onClick={() => change({ highlights: view.highlights.filter((other) => other !== text) })}
        >
          <bdi>{brief(text, 32)}</bdi> <span aria-hidden="true">✕</span>
        </button>
      ))}
      <input
        type="text"
        class="small"
        aria-label="Highlight"
        placeholder="Highlight…"
        maxLength={LONGEST_HIGHLIGHT}
        value={typed}
        onInput={(event) => type(event.currentTarget.value)}
      />
    </form>
  );
}

export function EntityLegend() {
  return (
    <span class="legend">
      <mark class="subject">subject</mark> <mark class="object">object</mark>
    </span>
  );
}
