// The part of a generation to attribute, and the format of numbers.
import { describe, expect, it } from "vitest";
import { partOf, tokensOf } from "../src/ask/part";
import { percent, points, score } from "../src/format";

const generation = {
  kind: "generation" as const, prompt: "The tower is in", text: " Paris 😀, France", prompt_ids: [0, 7, 8],
  tokens: [[0, 6], [6, 8], [8, 9], [9, 16]].map(([start, stop], place) => ({
    token_id: 20 + place, start: start!, stop: stop!, probability: 0.5,
  })),
};

describe("the question", () => {
  it("takes the first token with its white space", () =>
    expect(partOf(generation, 0, 0)).toEqual({
      prompt: "The tower is in", completion: " Paris", tokens: { token_ids: [0, 7, 8, 20], first: 3 },
    }));
  it("takes later tokens after those before them", () => {
    expect(partOf(generation, 3, 3)).toEqual({
      prompt: "The tower is in Paris 😀,", completion: " France", tokens: { token_ids: [0, 7, 8, 20, 21, 22, 23], first: 6 },
    });
    expect(partOf(generation, 1, 2).completion).toBe(" 😀,");
  });
  it("asks for tokens only while the texts are theirs", () => {
    const part = partOf(generation, 0, 0);
    expect(tokensOf(part, part.prompt, part.completion)).toEqual(part.tokens);
    expect(tokensOf(part, part.prompt, "Paris")).toBeNull();
    expect(tokensOf(null, part.prompt, part.completion)).toBeNull();
  });
});

describe("numbers", () => {
  it("are short", () => {
    expect([percent(0.0412), percent(0.5), percent(0.00004)]).toEqual(["4.1%", "50.0%", "4.0e−3%"]);
    expect(points(0.041, 0.06)).toBe("+1.9 points");
    expect(score(-0.01234)).toBe("−0.0123");
  });
});
