// Requests and jobs as hooks; stale requests are aborted, and old data stays until new data arrives.
import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { ApiError, api } from "./api/client";
import type { Job, JobResult } from "./api/types";

export interface Loaded<T> {
  data: T | null;
  error: ApiError | null;
  loading: boolean;
  /** Whether `data` belongs to an earlier request. */
  stale: boolean;
  retry: () => void;
}

export function asError(error: unknown): ApiError {
  return error instanceof ApiError ? error : new ApiError(0, error instanceof Error ? error.message : String(error));
}

/** Fetches whenever `name` changes; null fetches nothing. */
export function useRequest<T>(name: string | null, ask: (signal: AbortSignal) => Promise<T>): Loaded<T> {
  const [state, set] = useState<{ name: string | null; data: T | null; error: ApiError | null; loading: boolean }>({
    name: null, data: null, error: null, loading: name !== null,
  });
  const [attempt, setAttempt] = useState(0);
  const latest = useRef(ask);
  latest.current = ask;
  useEffect(() => {
    if (name === null) {
      set({ name: null, data: null, error: null, loading: false });
      return undefined;
    }
    const controller = new AbortController();
    set((before) => ({ ...before, loading: true, error: null }));
    latest.current(controller.signal).then(
      (data) => !controller.signal.aborted && set({ name, data, error: null, loading: false }),
      (error: unknown) => {
        if (!controller.signal.aborted) set((before) => ({ ...before, error: asError(error), loading: false }));
      },
    );
    return () => controller.abort();
  }, [name, attempt]);
  const retry = useCallback(() => setAttempt((value) => value + 1), []);
  return { data: state.data, error: state.error, loading: state.loading, stale: state.name !== name, retry };
}

/** A cache of a request's latest results, so that going back and forth is instant. */
export function remembered<T>(most: number): (name: string, ask: () => Promise<T>) => Promise<T> {
  const cache = new Map<string, T>();
  return async (name, ask) => {
    const cached = cache.get(name);
    if (cached !== undefined) {
      cache.delete(name);
      cache.set(name, cached);
      return cached;
    }
    const data = await ask();
    cache.set(name, data);
    if (cache.size > most) cache.delete(cache.keys().next().value as string);
    return data;
  };
}

export interface Progress {
  job: Job | null;
  /** Seconds left in the current stage; null if unknown. */
  left: number | null;
  rate: number | null;
}

export interface Work extends Progress {
  error: ApiError | null;
  running: boolean;
  start: (ask: () => Promise<Job>, done: (result: JobResult) => void) => void;
  cancel: () => void;
}

const POLL = 150;

/** Submits a job and polls it to its end. */
export function useJob(): Work {
  const [progress, set] = useState<Progress>({ job: null, left: null, rate: null });
  const [error, fail] = useState<ApiError | null>(null);
  const [running, run] = useState(false);
  const turn = useRef(0);
  const number = useRef<number | null>(null);
  useEffect(() => () => {
    turn.current += 1;
    if (number.current !== null) api.cancel(number.current).catch(() => undefined);
  }, []);

  const start = useCallback((ask: () => Promise<Job>, done: (result: JobResult) => void) => {
    const mine = ++turn.current;
    const stage = { title: "", seconds: 0, done: 0 };
    fail(null);
    run(true);
    set({ job: null, left: null, rate: null });
    const follow = async () => {
      let job = await ask();
      let missed = 0;
      while (turn.current === mine) {
        number.current = job.job;
        if (job.title !== stage.title || job.done < stage.done) Object.assign(stage, { title: job.title, seconds: job.seconds, done: job.done });
        const spent = job.seconds - stage.seconds;
        const rate = spent > 0.3 && job.done > stage.done ? (job.done - stage.done) / spent : null;
        const left = rate && job.total !== null && job.total > 0 ? Math.max(0, (job.total - job.done) / rate) : null;
        set({ job, left, rate });
        if (job.state === "done" || job.state === "failed" || job.state === "cancelled") break;
        await new Promise((resolve) => setTimeout(resolve, POLL));
        try {
          job = await api.job(job.job);
          missed = 0;
        } catch (problem) {
          missed += 1;
          if (missed > 3 || asError(problem).status === 404) throw problem;
        }
      }
      if (turn.current !== mine) {
        if (job.state === "queued" || job.state === "running") api.cancel(job.job).catch(() => undefined);
        return;
      }
      number.current = null;
      run(false);
      if (job.state === "failed") fail(new ApiError(500, job.error ?? "The job failed."));
      else if (job.state === "done" && job.result) done(job.result);
    };
    follow().catch((problem: unknown) => {
      if (turn.current !== mine) return;
      number.current = null;
      run(false);
      fail(asError(problem));
    });
  }, []);

  const cancel = useCallback(() => {
    if (number.current === null) return;
    api.cancel(number.current).catch((problem: unknown) => fail(asError(problem)));
  }, []);

  return { ...progress, error, running, start, cancel };
}

/** Calls `act` with the latest value once it has not changed for `wait` milliseconds. */
export function useDebounced<T>(wait: number, act: (value: T) => void): (value: T) => void {
  const timer = useRef<ReturnType<typeof setTimeout> | null>(null);
  const latest = useRef(act);
  latest.current = act;
  useEffect(() => () => void (timer.current !== null && clearTimeout(timer.current)), []);
  return useCallback((value: T) => {
    if (timer.current !== null) clearTimeout(timer.current);
    timer.current = setTimeout(() => latest.current(value), wait);
  }, [wait]);
}
