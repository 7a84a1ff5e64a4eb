// The whole view is in the location's hash, so that links and the back button restore it; hashes are validated.
import { useEffect, useState } from "preact/hooks";
import type { QueryFilter } from "./api/client";
import type { Join, Kind, Side, Sort } from "./api/types";

export const SORTS: readonly Sort[] = ["file", "prompt", "relation", "frequency", "score", "rank"];
export const KINDS: readonly Kind[] = ["fact", "choice", "generation", "open"];
export const JOINS: readonly Join[] = ["auto", "space", "none"];
export const PAGE_SIZE = 50;
export const LONGEST_SEARCH = 512;
export const LONGEST_PROMPT = 32_768;
export const LONGEST_HIGHLIGHT = 200;
export const MOST_HIGHLIGHTS = 20;
export const MOST_TOP = 1000;
const LONGEST_VALUE = 2000;
const MOST_VALUES = 200;

export interface View extends QueryFilter {
  tab: "results" | "ask" | null;
  run: number;
  beside: number | null;
  alone: boolean;
  page: number;
  /** The chosen query's line in each run, null for a run without it; empty chooses the page's first query. */
  at: (number | null)[];
  spectra: boolean;
  highlights: string[];
  prompt: string;
  completion: string;
  /** What stands between prompt and completion: a space where writing has one, always, or never. */
  join: Join;
  methods: string[];
  top: number;
  key: string | null;
  side: Side;
  /** The candidate whose token split is open. */
  row: number | null;
  over: "candidate" | "query";
  insight: boolean;
  groupField: string;
  groupMethod: string;
  groupTop: number;
}

export const INITIAL: View = {
  tab: null, run: 0, beside: null, alone: false, page: 0, at: [], spectra: false, highlights: [],
  search: "", search_candidates: false, relation: [], bucket: [], kind: [], model_correct: null, proponent_correct: null,
  score_min: null, score_max: null, sort: "file", descending: false,
  prompt: "", completion: "", join: "auto", methods: [], top: 10, key: null, side: "proponents", row: null, over: "candidate",
  insight: false, groupField: "", groupMethod: "", groupTop: 100,
};

function text(found: string | null, longest: number): string {
  return found === null ? "" : found.slice(0, longest);
}

function whole(found: string | null, least: number, most: number): number | null {
  if (found === null || !/^\d{1,12}$/.test(found)) return null;
  const value = Number(found);
  return value >= least && value <= most ? value : null;
}

function real(found: string | null): number | null {
  if (found === null || found.length > 32 || !/^[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d{1,3})?$/i.test(found)) return null;
  const value = Number(found);
  return Number.isFinite(value) ? value : null;
}

function oneOf<T extends string>(found: string | null, allowed: readonly T[]): T | null {
  return allowed.find((value) => value === found) ?? null;
}

function many(found: string[], longest: number, most: number): string[] {
  return [...new Set(found.filter((value) => value.length > 0 && value.length <= longest))].slice(0, most);
}

function places(found: string | null): (number | null)[] {
  if (found === null || !/^(\d{1,12}|-)(\.(\d{1,12}|-)){0,99}$/.test(found)) return [];
  return found.split(".").map((part) => (part === "-" ? null : Number(part)));
}

/** The view in a hash; invalid values are ignored. */
export function parse(hash: string): View {
  const given = new URLSearchParams(hash.startsWith("#") ? hash.slice(1) : hash);
  const yes = (name: string) => given.get(name) === "1";
  const key = given.get("key");
  return {
    tab: oneOf(given.get("tab"), ["results", "ask"]),
    run: whole(given.get("run"), 0, 99) ?? 0,
    beside: whole(given.get("beside"), 0, 99),
    alone: yes("alone"),
    page: (whole(given.get("page"), 1, 1e9) ?? 1) - 1,
    at: places(given.get("at")),
    spectra: yes("spectra"),
    highlights: many(given.getAll("hl"), LONGEST_HIGHLIGHT, MOST_HIGHLIGHTS),
    search: text(given.get("q"), LONGEST_SEARCH),
    search_candidates: yes("in"),
    relation: many(given.getAll("relation"), LONGEST_VALUE, MOST_VALUES),
    bucket: many(given.getAll("bucket"), LONGEST_VALUE, MOST_VALUES),
    kind: KINDS.filter((kind) => given.getAll("kind").includes(kind)),
    model_correct: oneOf(given.get("model"), ["yes", "no"]),
    proponent_correct: oneOf(given.get("right"), ["yes", "no"]),
    score_min: real(given.get("min")),
    score_max: real(given.get("max")),
    sort: oneOf(given.get("sort"), SORTS) ?? "file",
    descending: yes("desc"),
    prompt: text(given.get("prompt"), LONGEST_PROMPT),
    completion: text(given.get("completion"), LONGEST_PROMPT),
    join: oneOf(given.get("join"), JOINS) ?? "auto",
    methods: many(given.getAll("method"), 64, 8),
    top: whole(given.get("top"), 1, MOST_TOP) ?? 10,
    key: key !== null && /^[A-Za-z0-9_-]{1,128}$/.test(key) ? key : null,
    side: oneOf(given.get("side"), ["proponents", "opponents"]) ?? "proponents",
    row: whole(given.get("row"), 0, 1e12),
    over: oneOf(given.get("over"), ["candidate", "query"]) ?? "candidate",
    insight: yes("insight"),
    groupField: text(given.get("field"), 200),
    groupMethod: text(given.get("by"), 64),
    groupTop: whole(given.get("of"), 1, MOST_TOP) ?? 100,
  };
}

/** The hash of a view; defaults are left out. */
export function serialize(view: View): string {
  const out = new URLSearchParams();
  const set = (name: string, value: string | number | null, usual: string | number | null = null) => {
    if (value !== null && value !== "" && value !== usual) out.set(name, String(value));
  };
  const flag = (name: string, value: boolean) => value && out.set(name, "1");
  const all = (name: string, values: string[]) => values.forEach((value) => out.append(name, value));
  set("tab", view.tab);
  set("run", view.run, 0);
  set("beside", view.beside);
  flag("alone", view.alone);
  set("q", view.search);
  flag("in", view.search_candidates);
  all("relation", view.relation);
  all("bucket", view.bucket);
  all("kind", view.kind);
  set("model", view.model_correct);
  set("right", view.proponent_correct);
  set("min", view.score_min);
  set("max", view.score_max);
  set("sort", view.sort, "file");
  flag("desc", view.descending);
  set("page", view.page + 1, 1);
  set("at", view.at.map((place) => (place === null ? "-" : String(place))).join("."));
  flag("spectra", view.spectra);
  all("hl", view.highlights);
  set("prompt", view.prompt);
  set("completion", view.completion);
  set("join", view.join, "auto");
  all("method", view.methods);
  set("top", view.top, 10);
  set("key", view.key);
  set("side", view.side, "proponents");
  set("row", view.row);
  set("over", view.over, "candidate");
  flag("insight", view.insight);
  set("field", view.groupField);
  set("by", view.groupMethod);
  set("of", view.groupTop, 100);
  return out.toString();
}

type Listener = (view: View) => void;
const listeners = new Set<Listener>();
let current: View = INITIAL;

function publish(view: View): void {
  current = view;
  for (const listener of listeners) listener(view);
}

/** Changes the view. `step` adds an entry to the browser's history. */
export function change(part: Partial<View>, step = true): void {
  const next = { ...current, ...part };
  const hash = serialize(next);
  if (hash !== serialize(current)) {
    const address = hash ? `#${hash}` : location.pathname + location.search;
    if (step) history.pushState(null, "", address);
    else history.replaceState(null, "", address);
  }
  publish(next);
}

/** Changes the filter and returns to the first page and its first query. */
export function refilter(part: Partial<QueryFilter>, step = true): void {
  change({ ...part, page: 0, at: [] }, step);
}

export function currentView(): View {
  return current;
}

export function followLocation(): void {
  const read = () => publish(parse(location.hash));
  addEventListener("popstate", read);
  addEventListener("hashchange", read);
  read();
}

export function useView(): View {
  const [view, set] = useState(current);
  useEffect(() => {
    set(current);
    listeners.add(set);
    return () => void listeners.delete(set);
  }, []);
  return view;
}
