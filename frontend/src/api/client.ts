// The typed client: one function per endpoint; errors are one line for the user.
import type {
  AskedTokens, Details,
  Answer, ExportFormat, Groups, Insight, Job, Join, Kind, QueryPage, QueryRecord, Session, Side, Sort, TextPart,
} from "./types";

/** A response other than success; status 0 means that the server did not answer. */
export class ApiError extends Error {
  constructor(readonly status: number, message: string) {
    super(message);
    this.name = "ApiError";
  }
}

/** Which queries of a run to list, and in which order. */
export interface QueryFilter {
  search: string;
  search_candidates: boolean;
  relation: string[];
  bucket: string[];
  kind: Kind[];
  model_correct: "yes" | "no" | null;
  proponent_correct: "yes" | "no" | null;
  score_min: number | null;
  score_max: number | null;
  sort: Sort;
  descending: boolean;
}

const GONE = "The server does not answer. Is trackstar explore still running?";

async function call<T>(method: string, path: string, body?: unknown, signal?: AbortSignal): Promise<T> {
  const init: RequestInit = { method, signal: signal ?? null, credentials: "same-origin" };
  if (method !== "GET") {
    init.headers = { "Content-Type": "application/json", "X-Trackstar": "1" };
    init.body = body === undefined ? null : JSON.stringify(body);
  }
  let response: Response;
  try {
    response = await fetch(path, init);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, GONE);
  }
  if (!response.ok) throw new ApiError(response.status, await detail(response));
  try {
    return (await response.json()) as T;
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, "The server's answer could not be read.");
  }
}

async function detail(response: Response): Promise<string> {
  try {
    const body: unknown = await response.json();
    if (typeof body === "object" && body !== null && "detail" in body) {
      const { detail } = body as { detail: unknown };
      if (typeof detail === "string") return detail;
      if (Array.isArray(detail)) {
        const first: unknown = detail[0];
        if (typeof first === "object" && first !== null && "msg" in first) return String((first as { msg: unknown }).msg);
      }
    }
  } catch {
    // Not JSON: only the status is shown.
  }
  return response.status === 429 ? "The server is busy. Try again in a moment." : `The server answered ${response.status}.`;
}

/** The filter and sort as the API's parameters; defaults are left out. */
export function filterParameters(filter: QueryFilter): URLSearchParams {
  const parameters = new URLSearchParams();
  if (filter.search) parameters.set("search", filter.search);
  if (filter.search && filter.search_candidates) parameters.set("search_candidates", "true");
  for (const value of filter.relation) parameters.append("relation", value);
  for (const value of filter.bucket) parameters.append("bucket", value);
  for (const value of filter.kind) parameters.append("kind", value);
  if (filter.model_correct) parameters.set("model_correct", filter.model_correct);
  if (filter.proponent_correct) parameters.set("proponent_correct", filter.proponent_correct);
  if (filter.score_min !== null) parameters.set("score_min", String(filter.score_min));
  if (filter.score_max !== null) parameters.set("score_max", String(filter.score_max));
  parameters.set("sort", filter.sort);
  if (filter.descending) parameters.set("descending", "true");
  return parameters;
}

const key = encodeURIComponent;

export const api = {
  session: (signal?: AbortSignal) => call<Session>("GET", "/api/session", undefined, signal),

  queries(run: number, filter: QueryFilter, offset: number, limit: number, signal?: AbortSignal): Promise<QueryPage> {
    const parameters = filterParameters(filter);
    parameters.set("offset", String(offset));
    parameters.set("limit", String(limit));
    return call("GET", `/api/runs/${run}/queries?${parameters}`, undefined, signal);
  },
  record: (run: number, place: number, signal?: AbortSignal) =>
    call<QueryRecord>("GET", `/api/runs/${run}/queries/${place}`, undefined, signal),
  raw: (run: number, place: number, signal?: AbortSignal) =>
    call<TextPart>("GET", `/api/runs/${run}/queries/${place}/raw`, undefined, signal),
  candidateOfRun: (run: number, place: number, side: Side, rank: number, start: number, signal?: AbortSignal) =>
    call<TextPart>("GET", `/api/runs/${run}/queries/${place}/${side}/${rank}/text?start=${start}`, undefined, signal),
  candidateOfIndex: (row: number, start: number, signal?: AbortSignal) =>
    call<TextPart>("GET", `/api/candidates/${row}/text?start=${start}`, undefined, signal),

  generate: (prompt: string, max_new_tokens: number) => call<Job>("POST", "/api/generate", { prompt, max_new_tokens }),
  attribute: (question: {
    prompt: string; completion: string; join: Join; tokens: AskedTokens | null; methods: string[]; top: number;
  }) => call<Job>("POST", "/api/answers", question),
  answer: (name: string, signal?: AbortSignal) => call<Answer>("GET", `/api/answers/${key(name)}`, undefined, signal),
  tokens: (name: string, row: number, over: "candidate" | "query") =>
    call<Job>("POST", `/api/answers/${key(name)}/tokens`, { row, over }),
  tailPatch: (name: string, row: number) => call<Job>("POST", `/api/answers/${key(name)}/tail-patch`, { row }),
  details: (name: string, signal?: AbortSignal) =>
    call<Details>("GET", `/api/answers/${key(name)}/details`, undefined, signal),
  insight: (name: string, signal?: AbortSignal) =>
    call<Insight>("GET", `/api/answers/${key(name)}/insight`, undefined, signal),
  groups(name: string, field: string, method: string, top: number, signal?: AbortSignal): Promise<Groups> {
    const parameters = new URLSearchParams({ field, method, top: String(top) });
    return call("GET", `/api/answers/${key(name)}/groups?${parameters}`, undefined, signal);
  },

  job: (job: number, signal?: AbortSignal) => call<Job>("GET", `/api/jobs/${job}`, undefined, signal),
  cancel: (job: number) => call<Job>("POST", `/api/jobs/${job}/cancel`),
};

/** Addresses of downloads. */
export const downloads = {
  run(run: number, filter: QueryFilter, format: ExportFormat): string {
    const parameters = filterParameters(filter);
    parameters.set("format", format);
    return `/api/runs/${run}/export?${parameters}`;
  },
  query(run: number, place: number, other: number | null, format: ExportFormat): string {
    const beside = other === null ? "" : `&other=${other}`;
    return `/api/runs/${run}/queries/${place}/export?format=${format}${beside}`;
  },
  answer: (name: string, format: ExportFormat): string => `/api/answers/${key(name)}/export?format=${format}`,
};
