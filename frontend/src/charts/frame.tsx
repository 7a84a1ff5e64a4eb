// Parts of every chart: the frame with axes, and the same data as a table.
import type { ComponentChildren } from "preact";

export interface Tick {
  at: number;
  label: string;
}

export interface Area {
  width: number;
  height: number;
  left: number;
  right: number;
  top: number;
  bottom: number;
}

export function Frame(props: {
  label: string; area: Area; xTicks: Tick[]; yTicks: Tick[]; xName: string; yName: string; children: ComponentChildren;
}) {
  const { area } = props;
  const floor = area.height - area.bottom;
  return (
    <svg class="chart" viewBox={`0 0 ${area.width} ${area.height}`} role="img" aria-label={props.label}>
      {props.yTicks.map((tick) => (
        <g key={`y${tick.at}`}>
          <line class="grid" x1={area.left} x2={area.width - area.right} y1={tick.at} y2={tick.at} />
          <text x={area.left - 6} y={tick.at + 3.5} text-anchor="end">{tick.label}</text>
        </g>
      ))}
      <line class="axis" x1={area.left} x2={area.width - area.right} y1={floor} y2={floor} />
      {props.xTicks.map((tick) => (
        <g key={`x${tick.at}`}>
          <line class="axis" x1={tick.at} x2={tick.at} y1={floor} y2={floor + 4} />
          <text x={tick.at} y={floor + 15} text-anchor="middle">{tick.label}</text>
        </g>
      ))}
      <text class="name" x={area.width - area.right} y={area.height - 3} text-anchor="end">{props.xName}</text>
      <text class="name" x={area.left} y={10}>{props.yName}</text>
      {props.children}
    </svg>
  );
}

export function TableOf(props: { caption: string; head: string[]; rows: (string | number)[][] }) {
  return (
    <details class="as-table">
      <summary>Show as table</summary>
      <div class="table-scroll" tabIndex={0} role="region" aria-label={props.caption}>
        <table class="data">
          <caption>{props.caption}</caption>
          <thead>
            <tr>{props.head.map((name) => <th scope="col" key={name}>{name}</th>)}</tr>
          </thead>
          <tbody>
            {props.rows.map((row, index) => (
              <tr key={index}>{row.map((cell, at) => <td key={at}>{cell}</td>)}</tr>
            ))}
          </tbody>
        </table>
      </div>
    </details>
  );
}

const RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹";

/** A power of ten. */
export function power(value: number): string {
  const exponent = Math.round(Math.log10(value));
  if (exponent >= 0 && exponent <= 3) return String(10 ** exponent);
  return `10${exponent < 0 ? "⁻" : ""}${[...String(Math.abs(exponent))].map((digit) => RAISED[Number(digit)]).join("")}`;
}

/** The powers of ten in a range, at most about six. */
export function powers(low: number, high: number): number[] {
  const first = Math.ceil(Math.log10(low) - 1e-9);
  const last = Math.floor(Math.log10(high) + 1e-9);
  const by = Math.max(1, Math.ceil((last - first + 1) / 6));
  const found: number[] = [];
  for (let exponent = first; exponent <= last; exponent += by) found.push(10 ** exponent);
  return found;
}
