// A label whose definition and formula are one click away, in a popover.
import type { ComponentChildren } from "preact";
import { GLOSSARY, type Definition, type TermName } from "../glossary";
import { useOpen } from "./parts";

export function Term({ name, detail, children }: { name: TermName; detail?: string; children: ComponentChildren }) {
  const { box, open, set } = useOpen<HTMLSpanElement>();
  const { meaning, formula }: Definition = GLOSSARY[name];
  return (
    <span class="menu" ref={box}>
      <button type="button" class="term" title={meaning} aria-expanded={open} onClick={() => set(!open)}>
        {children}
      </button>
      {open && (
        <span class="pop wide definition" role="note">
          <span>{meaning}</span>
          {formula && <span class="formula">{formula}</span>}
          {detail && <span>{detail}</span>}
        </span>
      )}
    </span>
  );
}
