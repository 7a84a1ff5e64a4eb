// The hash: a written view is read back, and invalid values are ignored.
import { describe, expect, it } from "vitest";
import { INITIAL, parse, serialize, type View } from "../src/state";

describe("the view in the hash", () => {
  it("is empty at its defaults", () => {
    expect(serialize(INITIAL)).toBe("");
    expect(parse("")).toEqual(INITIAL);
  });
  it("is read back as written", () => {
    const view: View = {
      ...INITIAL, tab: "results", run: 1, beside: 0, alone: true, page: 3, at: [12, null], highlights: ["a&b", "é 😀"],
      search: "x=1&y#2", search_candidates: true, relation: ["P19", "a, b"], bucket: ["10 to 100"], kind: ["fact", "open"], model_correct: "no",
      proponent_correct: "yes", score_min: -0.5, score_max: 1e-7, sort: "score", descending: true, prompt: "a\nb\u202e", completion: " c",
      methods: ["TrackStar", "BM25"], top: 25, key: "Ab_-9", side: "opponents", row: 7, over: "query", insight: true,
      spectra: true, groupField: "year", groupMethod: "BM25", groupTop: 50,
    };
    expect(parse(`#${serialize(view)}`)).toEqual(view);
  });
  it("ignores invalid values", () => {
    const view = parse("#tab=evil&page=-1&at=1.x&sort=drop&min=Infinity&max=0x10&top=100000&key=../etc&side=up&row=1e9&__proto__=1&over=all&run=1000&kind=evil");
    expect(view).toEqual(INITIAL);
  });
  it("keeps a place for each of many files", () => {
    const view: View = { ...INITIAL, run: 19, at: Array.from({ length: 40 }, (_, n) => (n % 3 ? n : null)) };
    expect(parse(`#${serialize(view)}`)).toEqual(view);
  });
  it("limits long values", () => {
    const view = parse(`#q=${"a".repeat(9999)}&hl=${"b".repeat(999)}&${Array.from({ length: 99 }, (_, n) => `hl=h${n}`).join("&")}`);
    expect(view.search.length).toBe(512);
    expect(view.highlights.length).toBe(20);
    expect(view.highlights[0]).toBe("h0");
  });
});
