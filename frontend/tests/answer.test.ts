// The model's own answer in words: only what the file says.
import { describe, expect, it } from "vitest";
import { confidenceOf, isOther, kindName } from "../src/results/answer";

const record = (confidence: number | null, sampled: number, completion = "Paris", groundtruth: string | null = null) => ({
  confidence, sampled, completion, groundtruth,
});

describe("the model's own answer", () => {
  it("names the kind of question", () => {
    expect(kindName("open")).toBe("Open: no right answer");
    expect(kindName("constructor")).toBe("constructor");
  });
  it("counts the right samples where the share is of their number", () => {
    expect(confidenceOf(record(1, 8))).toBe("100%: 8 of 8 sampled answers are right");
    expect(confidenceOf(record(0.125, 8))).toBe("12.5%: 1 of 8 sampled answers is right");
    expect(confidenceOf(record(0, 8))).toBe("0%: 0 of 8 sampled answers are right");
  });
  it("says the share alone where the number does not fit, is absent, or the completion is not the true answer", () => {
    expect(confidenceOf(record(0.7, 8))).toBe("70%");
    expect(confidenceOf(record(0.5, 0))).toBe("50%");
    expect(confidenceOf(record(1, 8, "Rome", "Paris"))).toBe("100%");
    expect(confidenceOf(record(null, 8))).toBeNull();
  });
  it("knows a completion that is not the true answer", () => {
    expect(isOther(record(null, 0, " Paris", "Paris"))).toBe(false);
    expect(isOther(record(null, 0, "Paris", null))).toBe(false);
    expect(isOther(record(null, 0, "Rome", "Paris"))).toBe(true);
  });
});
