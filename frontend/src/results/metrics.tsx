// Metrics over the matching queries: one column per run, each value with its 95% interval as a small bar.
import type { Metric, RunSummary } from "../api/types";
import { count, figure } from "../format";
import { brief, plain } from "../candidates/visible";

interface Line {
  name: string;
  explanation: string;
  unit: "share" | "number";
  values: (Metric | null)[];
}

function lines(metrics: Metric[][]): Line[] {
  const found = new Map<string, Line>();
  metrics.forEach((list, run) => {
    for (const metric of list) {
      const line = found.get(metric.name) ?? {
        name: metric.name, explanation: metric.explanation, unit: metric.unit, values: metrics.map(() => null),
      };
      line.values[run] = metric;
      found.set(metric.name, line);
    }
  });
  return [...found.values()].filter((line) => line.values.some((metric) => metric?.estimate));
}

export function Metrics(props: { metrics: Metric[][]; runs: RunSummary[]; shown: number[]; stale: boolean; matching: number; total: number }) {
  const all = lines(props.metrics);
  if (all.length === 0) return null;
  const wide = all.length > 3;
  const half = wide ? Math.ceil(all.length / 2) : all.length;
  const over = props.matching === props.total ? (props.total === 1 ? "the only query" : `all ${count(props.total)} queries`) : `${count(props.matching)} matching queries`;
  return (
    <details class="metrics" open>
      <summary>
        <h2>Metrics</h2>
        <span class="note">over {over}, with 95% intervals</span>
      </summary>
      <div class={props.stale ? "metric-tables stale" : "metric-tables"}>
        <Table {...props} lines={all.slice(0, half)} />
        {wide && <Table {...props} lines={all.slice(half)} />}
      </div>
    </details>
  );
}

function Table(props: { lines: Line[]; runs: RunSummary[]; shown: number[] }) {
  return (
    <table class="metric-table">
      <thead>
        <tr>
          <th scope="col" class="hidden-text">
            Metric
          </th>
          {props.shown.map((run) => (
            <th scope="col" key={run} title={plain(props.runs[run]?.name ?? "")}>
              <bdi>{brief(props.runs[run]?.name ?? "", 36)}</bdi>
            </th>
          ))}
        </tr>
      </thead>
      <tbody>
        {props.lines.map((line) => (
          <tr key={line.name}>
            <th scope="row" title={line.explanation}>
              {line.name}
            </th>
            {props.shown.map((run) => (
              <Value key={run} metric={line.values[run] ?? null} span={spanOf(line)} />
            ))}
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function spanOf(line: Line): [number, number] {
  if (line.unit === "share") return [0, 1];
  const estimates = line.values.flatMap((metric) => (metric?.estimate ? [metric.estimate] : []));
  const low = Math.min(0, ...estimates.map((estimate) => estimate.low));
  const high = Math.max(0, ...estimates.map((estimate) => estimate.high));
  return high > low ? [low, high] : [0, 1];
}

const WIDTH = 64;

function Value({ metric, span }: { metric: Metric | null; span: [number, number] }) {
  const estimate = metric?.estimate;
  if (!metric || !estimate) return <td class="metric-value none">–</td>;
  const x = (value: number) => 2 + ((value - span[0]) / (span[1] - span[0])) * (WIDTH - 4);
  const say = (value: number) => figure(value, metric.unit);
  return (
    <td class="metric-value" title={`${say(estimate.mean)}, 95% interval ${say(estimate.low)} to ${say(estimate.high)}, ${count(estimate.queries)} queries`}>
      <span class="metric-cell">
        <b>{say(estimate.mean)}</b>
        <svg class="interval" viewBox={`0 0 ${WIDTH} 12`} width={WIDTH} height="12" aria-hidden="true">
          <line class="interval-ground" x1="2" x2={WIDTH - 2} y1="6" y2="6" />
          {span[0] < 0 && <line class="interval-zero" x1={x(0)} x2={x(0)} y1="1" y2="11" />}
          <rect class="interval-range" x={x(estimate.low)} y="3" width={Math.max(1.5, x(estimate.high) - x(estimate.low))} height="6" rx="1" />
          <line class="interval-mean" x1={x(estimate.mean)} x2={x(estimate.mean)} y1="1" y2="11" />
        </svg>
        <span class="note">
          {say(estimate.low).replace("%", "")}–{say(estimate.high)}
        </span>
      </span>
    </td>
  );
}
