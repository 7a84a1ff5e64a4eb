// The spacing rule, the part of a generation to attribute, and the format of numbers.
import { describe, expect, it } from "vitest";
import { between, partOf, wordStart } from "../src/ask/join";
import { percent, points, score } from "../src/format";

const generation = {
  kind: "generation" as const, prompt: "The tower is in", text: " Paris 😀, France",
  tokens: [[0, 6], [6, 8], [8, 9], [9, 16]].map(([start, stop]) => ({ start: start!, stop: stop!, probability: 0.5 })),
};

describe("the question", () => {
  it("has one space between, unless there is white space", () => {
    expect([between("a", "b"), between("a ", "b"), between("a", "\nb"), between("", "b")]).toEqual([" ", "", "", ""]);
  });
  it("takes the first token", () => expect(partOf(generation, 0, 0)).toEqual({ prompt: "The tower is in", completion: "Paris" }));
  it("takes later tokens", () => {
    expect(partOf(generation, 3, 3)).toEqual({ prompt: "The tower is in Paris 😀,", completion: "France" });
    expect(partOf(generation, 1, 2)).toEqual({ prompt: "The tower is in Paris", completion: "😀," });
  });
  it("begins with a word", () => {
    const tokens = [[0, 1], [1, 3], [3, 5], [5, 6]].map(([start, stop]) => ({ start: start!, stop: stop!, probability: 1 }));
    const broken = { ...generation, text: "Par is", tokens };
    expect([0, 1, 2, 3].map((token) => wordStart(broken, token))).toEqual([0, 0, 2, 2]);
    expect([0, 1, 2, 3].map((token) => wordStart(generation, token))).toEqual([0, 1, 1, 3]);
  });
});

describe("numbers", () => {
  it("are short", () => {
    expect([percent(0.0412), percent(0.5), percent(0.00004)]).toEqual(["4.1%", "50.0%", "4.0e−3%"]);
    expect(points(0.041, 0.06)).toBe("+1.9 points");
    expect(score(-0.01234)).toBe("−0.0123");
  });
});
