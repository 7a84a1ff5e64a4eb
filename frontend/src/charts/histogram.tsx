// Histogram of all candidates' influences, on a logarithmic count axis; shown candidates are marked.
import { max } from "d3-array";
import { scaleLinear, scaleLog } from "d3-scale";
import type { Insight } from "../api/types";
import { count, score } from "../format";
import { Frame, TableOf, power, powers, type Area } from "./frame";

const AREA: Area = { width: 460, height: 230, left: 46, right: 12, top: 20, bottom: 34 };

export function Histogram({ insight }: { insight: Insight }) {
  const { edges, counts } = insight;
  const first = edges[0] ?? 0;
  const last = edges[edges.length - 1] ?? 1;
  const x = scaleLinear([first, last > first ? last : first + 1], [AREA.left, AREA.width - AREA.right]);
  const top = Math.max(10, max(counts) ?? 1);
  const floor = AREA.height - AREA.bottom;
  const y = scaleLog([0.5, top], [floor, AREA.top + 4]);
  return (
    <figure>
      <Frame
        label={`Histogram of ${count(insight.candidates)} influences, mean ${score(insight.mean)}, standard deviation ${score(insight.deviation)}`}
        area={AREA} xName="influence" yName="candidates"
        xTicks={x.ticks(5).map((value) => ({ at: x(value), label: x.tickFormat(5)(value) }))}
        yTicks={powers(1, top).map((value) => ({ at: y(value), label: power(value) }))}
      >
        {counts.map((number, bin) => number > 0 && (
          <rect key={bin} class="bin" x={x(edges[bin] ?? 0)} width={Math.max(0.8, x(edges[bin + 1] ?? 0) - x(edges[bin] ?? 0) - 0.6)} y={y(number)} height={floor - y(number)} />
        ))}
        <line class="mean" x1={x(insight.mean)} x2={x(insight.mean)} y1={AREA.top} y2={floor} />
        {insight.shown.map((value, index) => <line key={index} class="rug" x1={x(value)} x2={x(value)} y1={floor - 14} y2={floor} />)}
      </Frame>
      <figcaption class="chart-key">
        <span>mean {score(insight.mean)} ± {score(insight.deviation)}</span><span><svg width="8" height="12" aria-hidden="true"><line class="rug" x1="4" x2="4" y1="0" y2="12" /></svg>shown above</span>
      </figcaption>
      <TableOf caption="Candidates by influence" head={["from", "to", "candidates"]} rows={counts.map((number, bin) => [score(edges[bin] ?? 0), score(edges[bin + 1] ?? 0), count(number)])} />
    </figure>
  );
}
