// A running job: stage, progress, rate, time left, and Cancel.
import type { Work } from "../hooks";
import { count, duration } from "../format";
import { plain } from "../candidates/visible";

export function JobLine({ work }: { work: Work }) {
  const { job, left, rate } = work;
  const total = job?.total ?? null;
  return (
    <div class="job">
      <progress aria-label="Progress" max={total && total > 0 ? total : 1} value={total && total > 0 && job ? Math.min(job.done, total) : undefined} />
      <span role="status" aria-live="polite">{job ? (job.state === "queued" ? "Queued" : plain(job.title)) : "Starting"}</span>
      {job && total !== null && total > 0 && <span>{count(job.done)} / {count(total)} {plain(job.unit)}</span>}
      {rate !== null && job && <span class="note">{rate >= 10 ? count(rate) : rate.toFixed(1)} {plain(job.unit)}/s</span>}
      {left !== null && <span class="note">{duration(left)} left</span>}
      <button type="button" class="small" disabled={!job} onClick={work.cancel}>Cancel</button>
    </div>
  );
}
