// Scatter of influence against lexical overlap; the pointer or arrow keys show a candidate's text.
import { extent } from "d3-array";
import { scaleLinear } from "d3-scale";
import { useState } from "preact/hooks";
import type { Insight } from "../api/types";
import { score } from "../format";
import { brief } from "../candidates/visible";
import { Frame, TableOf, type Area } from "./frame";

const AREA: Area = { width: 460, height: 260, left: 46, right: 12, top: 20, bottom: 34 };

export function Scatter({ insight }: { insight: Insight }) {
  const [at, goTo] = useState<number | null>(null);
  const points = [...insight.points].sort((a, b) => Number(a.shown) - Number(b.shown) || a.influence - b.influence);
  const shown = points.flatMap((point, index) => (point.shown ? [index] : []));
  const [x0 = 0, x1 = 1] = extent(points, (point) => point.overlap);
  const [y0 = 0, y1 = 1] = extent(points, (point) => point.influence);
  const x = scaleLinear([x0, x1 > x0 ? x1 : x0 + 1], [AREA.left + 6, AREA.width - AREA.right - 6]);
  const y = scaleLinear([y0, y1 > y0 ? y1 : y0 + 1], [AREA.height - AREA.bottom - 6, AREA.top + 6]);
  const nearest = (event: PointerEvent) => {
    if (!(event.currentTarget instanceof Element)) return;
    const svg = event.currentTarget.querySelector("svg")?.getBoundingClientRect();
    if (!svg || svg.width === 0) return;
    const px = ((event.clientX - svg.left) / svg.width) * AREA.width;
    const py = ((event.clientY - svg.top) / svg.height) * AREA.height;
    let best: number | null = null;
    let least = 200;
    points.forEach((point, index) => {
      const distance = (x(point.overlap) - px) ** 2 + (y(point.influence) - py) ** 2;
      if (distance <= least) [least, best] = [distance, index];
    });
    if (best !== null) goTo(best);
  };
  const chosen = at === null ? undefined : points[at];
  return (
    <figure>
      <div
        class="chart-keys" role="group" tabIndex={0} aria-label="Influence and overlap: arrow keys select the next shown candidate"
        onPointerMove={nearest}
        onKeyDown={(event) => {
          const by = event.key === "ArrowRight" ? 1 : event.key === "ArrowLeft" ? -1 : 0;
          if (by === 0 || shown.length === 0) return;
          event.preventDefault();
          const place = at === null ? -1 : shown.indexOf(at);
          goTo(shown[(Math.max(place, by > 0 ? -1 : 0) + by + shown.length) % shown.length] ?? null);
        }}
      >
        <Frame
          label={`Scatter of ${points.length} candidates, influence against lexical overlap`} area={AREA} xName="lexical overlap (BM25)" yName="influence"
          xTicks={x.ticks(5).map((value) => ({ at: x(value), label: x.tickFormat(5)(value) }))}
          yTicks={y.ticks(5).map((value) => ({ at: y(value), label: y.tickFormat(5)(value) }))}
        >
          {points.map((point, index) => <circle key={index} class={point.shown ? "dot shown" : "dot"} cx={x(point.overlap)} cy={y(point.influence)} r={point.shown ? 4 : 2.2} />)}
          {chosen && <circle class="dot at" cx={x(chosen.overlap)} cy={y(chosen.influence)} r="7" />}
        </Frame>
      </div>
      <figcaption>
        <p class="chart-key"><span>{insight.correlation === null ? "No rank correlation: influence or overlap is constant" : `Rank correlation (Spearman's ρ) over all candidates: ${insight.correlation.toFixed(3)}`}</span></p>
        <p class="point-text" role="status">
          {chosen ? <><b>{score(chosen.influence)}</b> overlap {score(chosen.overlap)} · <bdi>{brief(chosen.text, 220)}</bdi></> : "Point at a candidate to read its text."}
        </p>
      </figcaption>
      <TableOf caption="Shown candidates" head={["row", "influence", "overlap", "text"]} rows={shown.map((index) => points[index]).flatMap((point) => (point ? [[point.row, score(point.influence), score(point.overlap), brief(point.text, 120)]] : []))} />
    </figure>
  );
}
