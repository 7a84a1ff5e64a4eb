// The task weight λ, and the spectra of λR_eval and (1-λ)R_train, which are equal at the marked rank.
import { extent } from "d3-array";
import { scaleLog } from "d3-scale";
import { line } from "d3-shape";
import type { MixingSummary } from "../api/types";
import { count, plural, score } from "../format";
import { plain } from "../candidates/visible";
import { Term } from "../ui/term";
import { Frame, TableOf, power, powers, type Area } from "./frame";

const AREA: Area = { width: 460, height: 250, left: 46, right: 12, top: 20, bottom: 34 };
type Pair = [number, number];

function weighted(ranks: number[], values: number[], weight: number): Pair[] {
  return ranks.flatMap((rank, index): Pair[] => {
    const value = (values[index] ?? 0) * weight;
    return rank > 0 && value > 0 ? [[rank, value]] : [];
  });
}

/** λ as a label; the popover has its meaning, formula and rule. */
export function TaskWeight({ mixing }: { mixing: MixingSummary }) {
  return (
    <Term name="mixing" detail={`Here: ${plain(mixing.rule)}`}>
      <b>Task weight λ = {mixing.value.toPrecision(3)}</b>
    </Term>
  );
}

/** What λ means for this answer or run, in a few words. */
export function taskWeightInWords(mixing: MixingSummary): string {
  if (mixing.rank > 0) return `balances ${plural(mixing.queries, "task query", "task queries")} and the training corpus`;
  if (mixing.value === 0) return "the correction uses the training corpus only";
  return `as given, with ${plural(mixing.queries, "task query", "task queries")}`;
}

export function SpectrumPanel({ mixing }: { mixing: MixingSummary }) {
  return (
    <div class="spectra">
      <p class="lambda">
        <span><TaskWeight mixing={mixing} /> {taskWeightInWords(mixing)}</span>
        <span class="note">
          <Term name="damping" detail={`Here: ${plain(mixing.damping_rule)}`}>Damping {mixing.damping.toPrecision(2)}</Term>
        </span>
      </p>
      <Spectrum mixing={mixing} />
    </div>
  );
}

function Spectrum({ mixing }: { mixing: MixingSummary }) {
  // At λ = 0 or 1 one weighted spectrum is zero; then both are drawn unweighted.
  const mixes = mixing.value > 0 && mixing.value < 1;
  const evaluation = weighted(mixing.evaluation_ranks, mixing.evaluation_spectrum, mixes ? mixing.value : 1);
  const train = weighted(mixing.train_ranks, mixing.train_spectrum, mixes ? 1 - mixing.value : 1);
  const all = [...evaluation, ...train];
  if (all.length < 2) return <p class="note">No spectra: λ was not chosen from them.</p>;
  const [x0 = 1, x1 = 10] = extent(all, (pair) => pair[0]);
  const [y0 = 1, y1 = 10] = extent(all, (pair) => pair[1]);
  const floor = Math.max(y0, y1 * 1e-12);
  const x = scaleLog([x0, Math.max(x1, x0 * 1.01)], [AREA.left, AREA.width - AREA.right]);
  const y = scaleLog([floor * 0.8, Math.max(y1, floor * 1.01) * 1.3], [AREA.height - AREA.bottom, AREA.top]);
  const draw = line<Pair>((pair) => x(pair[0]), (pair) => y(Math.max(floor, pair[1])));
  const crossing = mixing.rank > 0 ? mixing.rank : null;
  const level = crossing === null ? 0 : mixing.evaluation_value * (mixes ? mixing.value : 1);
  const names = mixes ? ["task queries, λ R_eval", "training corpus, (1−λ) R_train"] : ["task queries, R_eval", "training corpus, R_train"];
  const last = (pairs: Pair[]) => pairs[pairs.length - 1];
  const late = crossing !== null && x(crossing) > AREA.width * 0.6;
  return (
    <figure>
      <Frame
        label={`Singular values of ${names.join(" and of ")} against rank, logarithmic axes${crossing ? `; equal at rank ${crossing}` : ""}`}
        area={AREA}
        xTicks={powers(x0, x1).map((value) => ({ at: x(value), label: power(value) }))}
        yTicks={powers(floor, y1).map((value) => ({ at: y(value), label: power(value) }))}
        xName="rank" yName="singular value"
      >
        <path class="line-eval" d={draw(evaluation) ?? ""} />
        <path class="line-train" d={draw(train) ?? ""} />
        {crossing !== null && (
          <g class="crossing">
            <line x1={x(crossing)} x2={x(crossing)} y1={AREA.top} y2={AREA.height - AREA.bottom} />
            {level > 0 && <circle cx={x(crossing)} cy={y(Math.max(floor, level))} r="4" />}
            <text x={x(crossing) + (late ? -6 : 6)} y={AREA.top + 10} text-anchor={late ? "end" : "start"}>equal at rank {count(crossing)}</text>
          </g>
        )}
      </Frame>
      <figcaption class="chart-key">
        {last(evaluation) && <span><i class="swatch-eval" />{names[0]}</span>}
        {last(train) && <span><i class="swatch-train" />{names[1]}</span>}
        <Term name="spectra">What the curves show</Term>
      </figcaption>
      <TableOf
        caption="Singular values by rank"
        head={["spectrum", "rank", "value"]}
        rows={[
          ...evaluation.map((pair): (string | number)[] => [names[0] ?? "", pair[0], score(pair[1])]),
          ...train.map((pair): (string | number)[] => [names[1] ?? "", pair[0], score(pair[1])]),
        ]}
      />
    </figure>
  );
}
