// Offsets, hidden characters, pieces of text, and the heat scale.
import { describe, expect, it } from "vitest";
import { countPoints, toUnits, wholeUnit } from "../src/candidates/codepoints";
import { STEPS, densest, limit, step, tokensOf } from "../src/candidates/heat";
import { cut, findAll, opening } from "../src/candidates/segments";
import { brief, parts, plain } from "../src/candidates/visible";

describe("offsets", () => {
  it("count code points", () => {
    const text = "a😀b𝒳c";
    const units = toUnits(text);
    expect([0, 1, 2, 3, 4, 5, 99, -1].map(units)).toEqual([0, 1, 3, 4, 6, 7, 7, 0]);
    expect(countPoints(text)).toBe(5);
    expect(wholeUnit(text, 2)).toBe(1);
  });
  it("count a lone surrogate once", () => {
    expect(countPoints("a\ud800b")).toBe(3);
    expect(toUnits("a\ud800b😀")(3)).toBe(3);
  });
});

describe("hidden characters", () => {
  it("are shown by their number", () => {
    expect(parts("a\u202eb\u0000\u0000c")).toEqual([
      { text: "a" }, { code: "U+202E", name: "right-to-left override", count: 1 }, { text: "b" },
      { code: "U+0000", name: "null", count: 2 }, { text: "c" },
    ]);
  });
  it.each(["\u001b", "\u200b", "\ufeff", "\u2066", "\u061c", "\u0085", "\u200f", "\u{e0041}", "\r"])("%j is hidden", (character) => {
    expect(plain(character)).toMatch(/^\[U\+[0-9A-F]{4,5}\]$/);
  });
  it("leave newline, tab and emoji alone", () => {
    expect(parts("a\n\tb ❤️")).toEqual([{ text: "a\n\tb ❤️" }]);
  });
  it("are not numbered without end", () => {
    expect(parts("\u0000\u0001".repeat(10_000), 50).length).toBeLessThan(110);
  });
  it("are cut to one line", () => expect(brief("a\nb\u202e".repeat(50), 12).length).toBe(12));
});

describe("pieces", () => {
  it("overlap", () => {
    const pieces = cut(0, 10, [{ start: 1, stop: 5, entity: "subject" }, { start: 3, stop: 8, entity: "object" }], [{ start: 4, stop: 20 }]);
    expect(pieces.map(({ start, stop }) => [start, stop])).toEqual([[0, 1], [1, 3], [3, 4], [4, 5], [5, 8], [8, 10]]);
    expect(pieces[3]).toMatchObject({ subject: true, object: true, highlighted: true });
  });
  it("find needles as they are written, whatever the case", () => {
    expect(findAll("a.B a.b aXb", ["A.b"])).toEqual([{ start: 0, stop: 3 }, { start: 4, stop: 7 }]);
    expect(findAll("aaaa", [""])).toEqual([]);
  });
  it("open before the first mark", () => {
    const text = "word ".repeat(2000);
    const part = opening(text, [{ start: 5000, stop: 5004 }], 600);
    expect(part.start).toBeGreaterThan(4800);
    expect(part.stop).toBeLessThan(5600);
  });
});

describe("heat", () => {
  it("diverges", () => {
    expect([1, -1, 0, 0.01, 0.3, Number.NaN].map((value) => step(value, 1))).toEqual([STEPS, -STEPS, 0, 0, 3, 0]);
    expect(step(1, 0)).toBe(0);
    expect(limit([{ influence: -3 }, { influence: 2 }, { influence: Number.NaN }])).toBe(3);
  });
  it("joins tokens of one character", () => {
    const units = toUnits("😀a");
    expect(tokensOf([{ start: 0, stop: 1, influence: 1 }, { start: 0, stop: 1, influence: 2 }, { start: 1, stop: 2, influence: 5 }], units)).toEqual([
      { start: 0, stop: 2, influence: 3, tokens: 2 }, { start: 2, stop: 3, influence: 5, tokens: 1 },
    ]);
  });
  it("finds the densest window", () => {
    const tokens = Array.from({ length: 200 }, (_, index) => ({ influence: index >= 100 && index < 110 ? -1 : 0 }));
    const [first, stop] = densest(tokens, 10);
    expect([first, stop]).toEqual([100, 110]);
    expect(densest(tokens.slice(0, 5), 10)).toEqual([0, 5]);
  });
});
