// Numbers and times for users.

const MINUS = "\u2212";
const sign = (text: string) => text.replaceAll("-", MINUS);

export function count(value: number): string {
  return Math.round(value).toLocaleString("en-US");
}

/** A score, with enough digits to tell scores apart. */
export function score(value: number): string {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e5) return sign(value.toExponential(2));
  return sign(size >= 100 ? value.toFixed(1) : size >= 10 ? value.toFixed(2) : value.toFixed(4));
}

export function signed(value: number): string {
  return value > 0 ? `+${score(value)}` : score(value);
}

/** A probability in percent, with two significant digits. */
export function percent(value: number): string {
  const part = value * 100;
  if (!Number.isFinite(part)) return "–";
  const size = Math.abs(part);
  if (size === 0) return "0%";
  if (size < 0.01) return `${sign(part.toExponential(1))}%`;
  return sign(`${size >= 10 ? part.toFixed(1) : size >= 1 ? part.toFixed(1) : part.toFixed(2)}%`);
}

/** A change of a probability, in percentage points. */
export function points(before: number, after: number): string {
  const change = (after - before) * 100;
  const size = Math.abs(change);
  const digits = size >= 0.1 ? 1 : size >= 0.01 ? 2 : 4;
  return `${change > 0 ? "+" : ""}${sign(change.toFixed(digits))} points`;
}

export function figure(value: number, unit: "share" | "number"): string {
  if (unit === "share") return `${(value * 100).toFixed(1)}%`;
  const size = Math.abs(value);
  return sign(size >= 100 ? value.toFixed(0) : size >= 10 ? value.toFixed(1) : size >= 0.1 || size === 0 ? value.toFixed(3) : value.toPrecision(2));
}

export function duration(seconds: number): string {
  if (seconds < 1) return "under 1 s";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

export function plural(value: number, one: string, several = `${one}s`): string {
  return `${count(value)} ${value === 1 ? one : several}`;
}
