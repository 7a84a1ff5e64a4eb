// What a result file says about a query: its kind, the model's own answer, the true one, and the fact's frequency.
import type { ComponentChildren } from "preact";
import type { QueryRecord } from "../api/types";
import { count, plural } from "../format";
import { brief } from "../candidates/visible";
import { Chip } from "../ui/parts";
import { Outside, Plain } from "../ui/text";
import { confidenceOf, isOther, kindName } from "./answer";

const LONGEST = 120;

export function Facts({ record }: { record: QueryRecord }) {
  const { alternatives, model_answer, model_correct, generations, sampled, stated } = record;
  return (
    <dl class="facts">
      <Fact name="kind">{record.kind && kindName(record.kind)}</Fact>
      <Fact name="rather than">
        {alternatives.length > 0 && alternatives.map((text, index) => (
          <span key={index}>
            {index > 0 && <span class="or"> or </span>}
            <Words text={text} />
          </span>
        ))}
      </Fact>
      <Fact name={model_answer === null ? "model" : "the model's answer"}>
        {(model_answer !== null || model_correct !== null) && (
          <>
            {model_answer !== null && <Words text={model_answer} />}
            {model_answer !== null && model_correct !== null && " "}
            {model_correct !== null && (model_correct ? <Chip kind="good">✓ correct</Chip> : <Chip kind="bad">✗ incorrect</Chip>)}
          </>
        )}
      </Fact>
      <Fact name="the true answer">{record.groundtruth && <Words text={record.groundtruth} />}</Fact>
      <Fact name="confidence">{confidenceOf(record)}</Fact>
      <Fact name="samples">
        {generations.length > 0 && (
          <details>
            <summary>{plural(sampled, "sampled answer")}</summary>
            <ol class="samples" tabIndex={0} aria-label="Sampled answers">
              {generations.map((text, index) => <li key={index}><Outside text={text || "(empty)"} /></li>)}
            </ol>
            {generations.length < sampled && <span class="note">The first {count(generations.length)} are shown.</span>}
          </details>
        )}
      </Fact>
      <Fact name="corpus">{stated !== null && (stated ? "a sentence states the fact" : "no sentence states the fact")}</Fact>
      <TextFact name="relation" text={record.relation} />
      <TextFact name="subject" text={record.subject.join(" · ")} />
      <TextFact name="object" text={record.object.join(" · ")} />
      <TextFact name="bucket" text={record.bucket} />
      <TextFact name="frequency" text={record.frequency === null ? null : count(record.frequency)} />
      <TextFact name="id" text={record.example_id} />
      <TextFact name="query set" text={record.query_set} />
    </dl>
  );
}

/** A column's own completion, where the columns explain different ones. */
export function Explained({ record }: { record: QueryRecord }) {
  return (
    <div class="explained">
      <span class="note">explains</span> <b><Words text={record.completion || "(no completion)"} /></b>{" "}
      {isOther(record) && (
        <>
          <Chip kind="bad">✗ not the true answer</Chip> <span class="note">which is</span> <Words text={record.groundtruth ?? ""} />
        </>
      )}
    </div>
  );
}

function TextFact({ name, text }: { name: string; text: string | null }) {
  return <Fact name={name}>{text && <Words text={text} />}</Fact>;
}

function Fact({ name, children }: { name: string; children: ComponentChildren }) {
  if (children === null || children === false || children === "") return null;
  return (
    <div>
      <dt>{name}</dt>
      <dd>{children}</dd>
    </div>
  );
}

/** An untrusted text; a long one opens on a click. */
function Words({ text }: { text: string }) {
  if (text.length <= LONGEST) return <Outside text={text} />;
  return (
    <details>
      <summary><bdi>{brief(text, LONGEST)}</bdi></summary>
      <p dir="auto" tabIndex={0} role="group" aria-label="Whole text"><Plain text={text.slice(0, 2000)} /></p>
    </details>
  );
}
