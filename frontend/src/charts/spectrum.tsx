// λ and the spectra of λR_eval and (1-λ)R_train on logarithmic axes; they are equal at the marked rank.
import { extent } from "d3-array";
import { scaleLog } from "d3-scale";
import { line } from "d3-shape";
import type { MixingSummary } from "../api/types";
import { count, score } from "../format";
import { plain } from "../passages/visible";
import { Frame, TableOf, power, powers, type Area } from "./frame";

const AREA: Area = { width: 460, height: 250, left: 46, right: 12, top: 20, bottom: 34 };
type Pair = [number, number];

function weighted(ranks: number[], values: number[], weight: number): Pair[] {
  return ranks.flatMap((rank, index): Pair[] => {
    const value = (values[index] ?? 0) * weight;
    return rank > 0 && value > 0 ? [[rank, value]] : [];
  });
}

export function SpectrumPanel({ mixing }: { mixing: MixingSummary }) {
  return (
    <div class="spectra">
      <p class="lambda">
        <b>λ = {mixing.value.toPrecision(3)}</b> <span>{plain(mixing.rule)}</span>
        <span class="note">
          R<sub>eval</sub> from {count(mixing.queries)} queries; damping {mixing.damping.toPrecision(2)} ({plain(mixing.damping_rule)})
        </span>
      </p>
      <Spectrum mixing={mixing} />
    </div>
  );
}

function Spectrum({ mixing }: { mixing: MixingSummary }) {
  // Where λ is 0 or 1 one spectrum would vanish: then both are drawn as they are.
  const mixes = mixing.value > 0 && mixing.value < 1;
  const evaluation = weighted(mixing.evaluation_ranks, mixing.evaluation_spectrum, mixes ? mixing.value : 1);
  const train = weighted(mixing.train_ranks, mixing.train_spectrum, mixes ? 1 - mixing.value : 1);
  const all = [...evaluation, ...train];
  if (all.length < 2) return <p class="note">The spectra were not computed.</p>;
  const [x0 = 1, x1 = 10] = extent(all, (pair) => pair[0]);
  const [y0 = 1, y1 = 10] = extent(all, (pair) => pair[1]);
  const floor = Math.max(y0, y1 * 1e-12);
  const x = scaleLog([x0, Math.max(x1, x0 * 1.01)], [AREA.left, AREA.width - AREA.right]);
  const y = scaleLog([floor * 0.8, Math.max(y1, floor * 1.01) * 1.3], [AREA.height - AREA.bottom, AREA.top]);
  const draw = line<Pair>((pair) => x(pair[0]), (pair) => y(Math.max(floor, pair[1])));
  const crossing = mixing.rank > 0 ? mixing.rank : null;
  const level = crossing === null ? 0 : mixing.evaluation_value * (mixes ? mixing.value : 1);
  const names = mixes ? ["λ R_eval", "(1−λ) R_train"] : ["R_eval", "R_train"];
  const last = (pairs: Pair[]) => pairs[pairs.length - 1];
  const late = crossing !== null && x(crossing) > AREA.width * 0.6;
  return (
    <figure>
      <Frame
        label={`Singular values of ${names.join(" and ")} against rank, logarithmic axes${crossing ? `; equal at rank ${crossing}` : ""}`}
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
