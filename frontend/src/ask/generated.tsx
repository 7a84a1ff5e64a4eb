// The model's answer as tokens with probabilities; a click, drag or shift-click selects the part to attribute.
import { useEffect, useRef, useState } from "preact/hooks";
import type { Generation } from "../api/types";
import { percent } from "../format";
import { toUnits } from "../candidates/codepoints";
import { brief, plain } from "../candidates/visible";
import { Plain } from "../ui/text";

export function Generated(props: { generation: Generation; choose: (first: number, last: number) => void; close: () => void }) {
  const { generation, choose } = props;
  const [chosen, set] = useState<[number, number] | null>(null);
  const anchor = useRef<number | null>(null);
  const latest = useRef(chosen);
  latest.current = chosen;
  const dragging = useRef(false);
  useEffect(() => set(null), [generation]);
  useEffect(() => {
    const up = () => {
      if (!dragging.current) return;
      dragging.current = false;
      if (latest.current) choose(...latest.current);
    };
    addEventListener("pointerup", up);
    return () => removeEventListener("pointerup", up);
  });
  const units = toUnits(generation.text);
  const reach = (token: number) => {
    const from = anchor.current ?? token;
    const range: [number, number] = [Math.min(from, token), Math.max(from, token)];
    latest.current = range;
    set(range);
    return range;
  };
  return (
    <section class="generation" aria-label="The model's answer">
      <div class="row spread">
        <span class="note">Click a token, or drag over several, to select the part to attribute. It is attributed token for token.</span>
        <button type="button" class="quiet small" aria-label="Close the model's answer" onClick={props.close}>✕</button>
      </div>
      <div class="gen-tokens" role="group" aria-label="Tokens of the answer">
        <span class="gen-before" dir="auto"><bdi>{brief(generation.prompt, 160)}</bdi></span>
        {generation.tokens.map((token, index) => {
          const text = generation.text.slice(units(token.start), units(token.stop));
          const on = chosen !== null && index >= chosen[0] && index <= chosen[1];
          return (
            <button
              key={index} type="button" class="gen-token" aria-pressed={on}
              aria-label={`${plain(text) || "(part of a character)"}, probability ${percent(token.probability)}`}
              onPointerDown={(event) => {
                if (event.button !== 0) return;
                event.currentTarget.releasePointerCapture?.(event.pointerId);
                if (!event.shiftKey || anchor.current === null) anchor.current = index;
                dragging.current = true;
                reach(index);
              }}
              onPointerEnter={() => dragging.current && reach(index)}
              onClick={(event) => {
                if (event.detail !== 0) return;
                if (!event.shiftKey || anchor.current === null) anchor.current = index;
                choose(...reach(index));
              }}
            >
              <span class="token-text">{text.includes("\n") ? text.replaceAll("\n", "↵") : text ? <Plain text={text} /> : "◦"}</span>
              <span class="p" aria-hidden="true">{percent(token.probability)}</span>
            </button>
          );
        })}
      </div>
    </section>
  );
}
