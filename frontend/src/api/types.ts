// Types of the API's responses, as in the server's explorer/schemas.py and question_schemas.py.

export type JobState = "queued" | "running" | "done" | "failed" | "cancelled";
export type Side = "proponents" | "opponents";
export type Sort = "file" | "prompt" | "relation" | "frequency" | "score" | "rank";
/** A fact, a choice between given completions, a free answer with a right one, or one without. */
export type Kind = "fact" | "choice" | "generation" | "open";
export type ExportFormat = "csv" | "jsonl" | "html";

export interface MixingSummary {
  value: number;
  rule: string;
  queries: number;
  rank: number;
  evaluation_value: number;
  train_value: number;
  evaluation_spectrum: number[];
  evaluation_ranks: number[];
  train_spectrum: number[];
  train_ranks: number[];
  damping: number;
  damping_rule: string;
}

export interface RunSummary {
  run: number;
  name: string;
  query_set: string;
  queries: number;
  has: string[];
  kinds: Kind[];
  mixing: MixingSummary | null;
  changed: boolean;
}

export interface IndexSummary {
  name: string;
  candidates: number;
  dimensions: number;
  codec: string;
  architecture: string;
  model: string;
  coverage: string;
  second_moment: string;
  corpus: string;
  task_queries: number;
  methods: string[];
  step: string | null;
  no_step: string | null;
  metadata: string[];
}

export interface Session {
  version: string;
  runs: RunSummary[];
  index: IndexSummary | null;
}

export interface QueryRow {
  places: (number | null)[];
  example_id: string;
  prompt: string;
  completion: string;
  relation: string | null;
  bucket: string | null;
  frequency: number | null;
  model_correct: boolean | null;
  score: number | null;
  rank: number | null;
}

export interface Estimate {
  mean: number;
  low: number;
  high: number;
  queries: number;
}

export interface Metric {
  name: string;
  explanation: string;
  unit: "share" | "number";
  estimate: Estimate | null;
}

export interface Facet {
  value: string;
  queries: number;
}

export interface QueryPage {
  total: number;
  matching: number;
  offset: number;
  items: QueryRow[];
  metrics: Metric[][];
  relations: Facet[];
  buckets: Facet[];
  kinds: Facet[];
}

export interface Mark {
  start: number;
  stop: number;
  entity: "subject" | "object";
}

export interface Candidate {
  rank: number;
  row: number | null;
  example_id: string;
  parent_id: string | null;
  score: number;
  text: string;
  characters: number;
  correct: boolean | null;
  entailment: number | null;
  category: string | null;
  marks: Mark[];
  metadata: Record<string, string>;
}

export interface QueryRecord {
  run: number;
  place: number;
  example_id: string;
  query_set: string;
  prompt: string;
  separator: string;
  completion: string;
  relation: string | null;
  bucket: string | null;
  frequency: number | null;
  kind: Kind | null;
  alternatives: string[];
  model_answer: string | null;
  model_correct: boolean | null;
  groundtruth: string | null;
  generations: string[];
  sampled: number;
  confidence: number | null;
  stated: boolean | null;
  subject: string[];
  object: string[];
  proponents: Candidate[];
  opponents: Candidate[];
}

export interface TextPart {
  text: string;
  start: number;
  characters: number;
}

export interface GeneratedToken {
  token_id: number;
  start: number;
  stop: number;
  probability: number;
}

export interface Generation {
  kind: "generation";
  prompt: string;
  text: string;
  prompt_ids: number[];
  tokens: GeneratedToken[];
}

/** Tokens to ask as they are; `first` is the first one that is explained. */
export interface AskedTokens {
  token_ids: number[];
  first: number;
}

export type Join = "auto" | "space" | "none";

export interface Ranking {
  method: string;
  score: string;
  proponents: Candidate[];
  opponents: Candidate[];
}

export interface Answer {
  kind: "answer";
  key: string;
  prompt: string;
  completion: string;
  separator: string;
  loss: number;
  probability: number;
  top: number;
  rankings: Ranking[];
  mixing: MixingSummary;
  notes: string[];
}

export interface Share {
  start: number;
  stop: number;
  influence: number;
}

export interface TokenSplit {
  kind: "tokens";
  row: number;
  over: "candidate" | "query";
  text: string;
  influence: number;
  total: number;
  shares: Share[];
}

export interface Effect {
  kind: "effect";
  row: number;
  before: number;
  after: number;
  step: string;
}

export type JobResult = Generation | Answer | TokenSplit | Effect;

export interface Details {
  splits: TokenSplit[];
  effects: Effect[];
}

export interface Job {
  job: number;
  title: string;
  state: JobState;
  done: number;
  total: number | null;
  unit: string;
  seconds: number;
  error: string | null;
  result: JobResult | null;
}

export interface Point {
  row: number;
  influence: number;
  overlap: number;
  shown: boolean;
  text: string;
}

export interface Insight {
  candidates: number;
  edges: number[];
  counts: number[];
  shown: number[];
  mean: number;
  deviation: number;
  points: Point[];
  correlation: number | null;
}

export interface Group {
  value: string;
  candidates: number;
  influence: number;
  share: number;
  in_corpus: number | null;
}

export interface Groups {
  field: string;
  method: string;
  top: number;
  groups: Group[];
}
