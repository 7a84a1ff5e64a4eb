// An influence split over tokens: a diverging heat map in the text, scrolled to the densest influence.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import type { Mark, TokenSplit } from "../api/types";
import { score, signed } from "../format";
import { toUnits } from "../candidates/codepoints";
import { STEPS, densest, limit, step, tokensOf } from "../candidates/heat";
import { cut, findAll } from "../candidates/segments";
import { className, entitySpans } from "../candidates/text";
import { brief } from "../candidates/visible";
import { Plain } from "../ui/text";
import { tipAt, tipAway } from "../ui/tip";

const heatClass = (level: number) => (level === 0 ? "" : level > 0 ? ` p${level}` : ` n${-level}`);
const STEPS_SHOWN = Array.from({ length: 2 * STEPS + 1 }, (_, index) => index - STEPS);

export function SplitView({ split, marks, highlights }: { split: TokenSplit; marks: Mark[]; highlights: string[] }) {
  const box = useRef<HTMLDivElement>(null);
  const [at, goTo] = useState<number | null>(null);
  const { text } = split;
  const tokens = useMemo(() => tokensOf(split.shares, toUnits(text)), [split]);
  const most = useMemo(() => limit(tokens), [tokens]);
  const name = (index: number) => `t-${split.row}-${split.over}-${index}`;
  const says = (index: number) => {
    const token = tokens[index];
    if (!token) return "";
    const piece = token.stop > token.start ? `“${brief(text.slice(token.start, token.stop), 40)}”` : "special token";
    return `${piece} ${signed(token.influence)}${token.tokens > 1 ? ` (${token.tokens} tokens)` : ""}`;
  };
  useEffect(() => {
    const [first, stop] = densest(tokens);
    const place = box.current;
    const middle = place?.querySelector<HTMLElement>(`[data-token="${Math.floor((first + stop - 1) / 2)}"]`);
    if (!place || !middle) return;
    const shift = middle.getBoundingClientRect().top - place.getBoundingClientRect().top;
    place.scrollTop = Math.max(0, place.scrollTop + shift - place.clientHeight / 2);
  }, [tokens]);
  const drawn = useMemo(() => {
    const entities = entitySpans(text, marks);
    const found = findAll(text, highlights);
    const inside = (from: number, to: number) =>
      cut(from, to, entities, found).map((piece) => {
        const kind = className(piece);
        const part = <Plain text={text.slice(piece.start, piece.stop)} />;
        return kind ? <span key={piece.start} class={`o ${kind}`}>{part}</span> : part;
      });
    let end = 0;
    const out = tokens.map((token, index) => {
      const gap = token.start > end ? text.slice(end, token.start) : "";
      end = Math.max(end, token.stop);
      const special = token.stop <= token.start;
      return (
        <>
          {gap && <span aria-hidden="true"><Plain text={gap} /></span>}
          <span
            id={name(index)} data-token={index} role="option" aria-selected={false} aria-label={says(index)}
            class={`t${heatClass(step(token.influence, most))}${special ? " special" : ""}`}
          >
            {special ? "◆" : inside(token.start, token.stop)}
          </span>
        </>
      );
    });
    return <>{out}{end < text.length && <span aria-hidden="true"><Plain text={text.slice(end)} /></span>}</>;
  }, [tokens, marks, highlights]);

  const focusOn = (index: number) => {
    const wanted = Math.max(0, Math.min(tokens.length - 1, index));
    box.current?.querySelector(".t.at")?.classList.remove("at");
    const element = document.getElementById(name(wanted));
    element?.classList.add("at");
    element?.scrollIntoView({ block: "nearest" });
    goTo(wanted);
    if (element) requestAnimationFrame(() => requestAnimationFrame(() => tipAt(element, says(wanted))));
  };
  const hover = (target: EventTarget | null) => {
    const token = target instanceof Element ? target.closest("[data-token]") : null;
    if (token) tipAt(token, says(Number(token.getAttribute("data-token"))));
    else tipAway();
  };
  return (
    <div class="split">
      <div class="split-head">
        <span class="scale" role="img" aria-label={`Colours from ${score(-most)} to ${signed(most)}`}>
          {score(-most)}
          <span>{STEPS_SHOWN.map((level) => <i key={level} class={heatClass(level).trim()} />)}</span>
          {signed(most)}
        </span>
        <span>The {split.over === "query" ? "query's tokens" : "candidate's tokens"} sum to {signed(split.total)} (ranked by {signed(split.influence)})</span>
      </div>
      <div
        class="heat" ref={box} tabIndex={0} role="listbox" aria-label={split.over === "query" ? "Influence per token of the query" : "Influence per token of the candidate"}
        aria-activedescendant={at === null ? undefined : name(at)}
        onPointerOver={(event) => hover(event.target)} onPointerLeave={tipAway} onBlur={tipAway}
        onKeyDown={(event) => {
          const by = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
          if (by === 0) return;
          event.preventDefault();
          focusOn((at ?? densest(tokens)[0] - by) + by);
        }}
      >
        <div class="candidate-text" dir="auto" role="presentation">{drawn}</div>
      </div>
    </div>
  );
}
