// A tooltip at the element under the pointer or focus.
import { useEffect, useState } from "preact/hooks";

interface Tip {
  text: string;
  x: number;
  y: number;
}

let show: (tip: Tip | null) => void = () => undefined;

export function tipAt(element: Element, text: string): void {
  const box = element.getClientRects()[0] ?? element.getBoundingClientRect();
  show({ text, x: box.left + box.width / 2, y: box.top });
}

export function tipAway(): void {
  show(null);
}

export function TipLayer() {
  const [tip, set] = useState<Tip | null>(null);
  useEffect(() => {
    show = set;
    const away = () => set(null);
    addEventListener("scroll", away, true);
    return () => removeEventListener("scroll", away, true);
  }, []);
  if (!tip) return null;
  const x = Math.max(90, Math.min(innerWidth - 90, tip.x));
  return (
    <div class="tip" aria-hidden="true" style={{ left: `${x}px`, top: `${Math.max(34, tip.y)}px` }}>
      {tip.text}
    </div>
  );
}
