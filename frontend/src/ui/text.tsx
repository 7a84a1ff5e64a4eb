// Untrusted text on the page: hidden characters become chips, and nothing in it is interpreted.
import { parts } from "../candidates/visible";

export function Plain({ text, most }: { text: string; most?: number }) {
  const found = parts(text, most);
  if (found.length === 1 && found[0] && "text" in found[0]) return <>{found[0].text}</>;
  return (
    <>
      {found.map((part, index) =>
        "text" in part ? (
          part.text
        ) : (
          <span key={index} class="ctl" dir="ltr" title={part.name}>
            {part.code}
            {part.count > 1 ? `×${part.count}` : ""}
          </span>
        ),
      )}
    </>
  );
}

/** A short untrusted text, isolated from the direction of the text around it. */
export function Outside({ text, class: name }: { text: string; class?: string }) {
  return (
    <bdi class={name}>
      <Plain text={text} most={40} />
    </bdi>
  );
}
