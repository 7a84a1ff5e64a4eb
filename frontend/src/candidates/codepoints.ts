// Offsets: the server counts Unicode code points, JavaScript counts UTF-16 units.

/** A function from an offset in code points to one in UTF-16 units; offsets outside the text are clamped. */
export function toUnits(text: string): (point: number) => number {
  if (!/[\ud800-\udbff][\udc00-\udfff]/.test(text)) {
    return (point) => Math.max(0, Math.min(point, text.length));
  }
  const starts: number[] = [];
  for (let unit = 0; unit < text.length; ) {
    starts.push(unit);
    unit += (text.codePointAt(unit) ?? 0) > 0xffff ? 2 : 1;
  }
  starts.push(text.length);
  return (point) => starts[Math.max(0, Math.min(point, starts.length - 1))] ?? text.length;
}

/** Number of code points in a text. */
export function countPoints(text: string): number {
  let count = 0;
  for (let unit = 0; unit < text.length; count += 1) unit += (text.codePointAt(unit) ?? 0) > 0xffff ? 2 : 1;
  return count;
}

/** The offset, moved back by one if it lies inside a surrogate pair. */
export function wholeUnit(text: string, unit: number): number {
  const code = text.charCodeAt(unit);
  const before = text.charCodeAt(unit - 1);
  return code >= 0xdc00 && code <= 0xdfff && before >= 0xd800 && before <= 0xdbff ? unit - 1 : unit;
}
