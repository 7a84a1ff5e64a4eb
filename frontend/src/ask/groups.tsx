// The top candidates grouped by a field of the corpus: number, influence, and share of the corpus.
import { api } from "../api/client";
import type { Answer, IndexSummary } from "../api/types";
import { count, percent, signed } from "../format";
import { useRequest } from "../hooks";
import { plain } from "../candidates/visible";
import { MOST_TOP, change, type View } from "../state";
import { Problem, Waiting } from "../ui/parts";
import { Outside } from "../ui/text";

export function GroupsPanel({ answer, index, view }: { answer: Answer; index: IndexSummary; view: View }) {
  const field = index.metadata.includes(view.groupField) ? view.groupField : (index.metadata[0] ?? "");
  const methods = answer.rankings.map((ranking) => ranking.method);
  const method = methods.includes(view.groupMethod) ? view.groupMethod : (methods[0] ?? "");
  const groups = useRequest(JSON.stringify([answer.key, field, method, view.groupTop]), (signal) =>
    api.groups(answer.key, field, method, view.groupTop, signal),
  );
  const rows = groups.data?.groups ?? [];
  const most = rows.reduce((value, group) => Math.max(value, group.share, group.in_corpus ?? 0), 0) || 1;
  return (
    <div>
      <div class="row">
        <label class="inline"><span class="note">Field</span>
          <select aria-label="Group by" value={field} onChange={(event) => change({ groupField: event.currentTarget.value }, false)}>
            {index.metadata.map((name) => <option key={name} value={name}>{plain(name)}</option>)}
          </select>
        </label>
        <label class="inline"><span class="note">Method</span>
          <select aria-label="Group method" value={method} onChange={(event) => change({ groupMethod: event.currentTarget.value }, false)}>
            {methods.map((name) => <option key={name} value={name}>{plain(name)}</option>)}
          </select>
        </label>
        <label class="inline"><span class="note">Top</span>
          <input
            type="number" class="top-number" aria-label="Group top" min={1} max={MOST_TOP} value={String(view.groupTop)}
            onChange={(event) => {
              const top = Math.round(Number(event.currentTarget.value));
              if (top >= 1 && top <= MOST_TOP) change({ groupTop: top }, false);
            }}
          />
        </label>
      </div>
      {groups.error && <Problem error={groups.error} retry={groups.retry} />}
      {!groups.data && groups.loading && <Waiting what="Grouping" />}
      {groups.data && (
        <div class="table-scroll" tabIndex={0} role="region" aria-label="Groups">
          <table class="data">
            <caption>Bar: share of the positive influence. Line: share of the corpus.</caption>
            <thead>
              <tr><th scope="col">value</th><th scope="col" class="n">count</th><th scope="col" class="n">influence</th><th scope="col">share</th><th scope="col" class="n">share</th><th scope="col" class="n">in corpus</th></tr>
            </thead>
            <tbody>
              {rows.slice(0, 200).map((group) => (
                <tr key={group.value}>
                  <td><Outside text={group.value.slice(0, 200) || "(none)"} /></td>
                  <td class="n">{count(group.candidates)}</td>
                  <td class="n">{signed(group.influence)}</td>
                  <td>
                    <svg class="group-bar" viewBox="0 0 90 10" width="90" height="10" aria-hidden="true">
                      <rect class="bar-ground" width="90" height="10" /><rect class="bar-value" width={Math.max(0, (90 * group.share) / most)} height="10" />
                      {group.in_corpus !== null && <line class="corpus" x1={(90 * group.in_corpus) / most} x2={(90 * group.in_corpus) / most} y1="0" y2="10" />}
                    </svg>
                  </td>
                  <td class="n">{percent(group.share)}</td>
                  <td class="n">{group.in_corpus === null ? "–" : percent(group.in_corpus)}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </div>
  );
}
