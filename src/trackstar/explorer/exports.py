"""Queries with their rankings as files: CSV for spreadsheets, JSON lines, or one self-contained HTML page."""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from trackstar.attribution.markup import plain
from trackstar.explorer.question_schemas import Answer
from trackstar.explorer.schemas import Candidate

ExportFormat = Literal["csv", "jsonl", "html"]
MEDIA_TYPES: dict[ExportFormat, str] = {
    "csv": "text/csv; charset=utf-8",
    "jsonl": "application/x-ndjson",
    "html": "text/html; charset=utf-8",
}
MOST_IN_HTML = 500
_COLUMNS = (
    "query_id", "prompt", "completion", "method", "role", "rank", "score", "example_id", "correct", "entailment",
    "category", "text",
)  # fmt: skip

_STYLE = (
    ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
    "padding:0 1rem}h1{font-size:1.3rem}h2{font-size:1rem;margin:2rem 0 .3rem}h3{font-size:.85rem;margin:.8rem 0 "
    ".2rem;text-transform:uppercase;letter-spacing:.05em}table{border-collapse:collapse;width:100%}td{vertical-align:"
    "top;padding:.2rem .5rem;border-top:1px solid #8884}td.n{text-align:right;font-variant-numeric:tabular-nums;"
    "white-space:nowrap}td.t{overflow-wrap:anywhere;white-space:pre-wrap;unicode-bidi:isolate}b{font-weight:600}"
    "small{opacity:.75}"
)


class ExportedQuery:
    """A query with its rankings, to be written to a file.

    Args:
        query_id: The query's name.
        prompt: The query's prompt.
        completion: The query's completion.
        separator: What stands between prompt and completion.
        rankings: Method, role and candidates of each list.
        heading: A further line about the query, such as its relation.
    """

    def __init__(
        self,
        query_id: str,
        prompt: str,
        completion: str,
        rankings: Sequence[tuple[str, str, Sequence[Candidate]]],
        heading: str = "",
        separator: str = " ",
    ) -> None:
        self.query_id = query_id
        self.prompt = prompt
        self.completion = completion
        self.rankings = rankings
        self.heading = heading
        self.separator = separator

    @classmethod
    def of_answer(cls, answer: Answer) -> "ExportedQuery":
        """The query and rankings of a live answer."""
        return cls(
            query_id=answer.key,
            prompt=answer.prompt,
            completion=answer.completion,
            rankings=[
                (ranking.method, role, candidates)
                for ranking in answer.rankings
                for role, candidates in (("proponent", ranking.proponents), ("opponent", ranking.opponents))
                if candidates
            ],
            separator=answer.separator,
            heading=f"P = {answer.probability:.2%}, λ = {answer.mixing.value:.4f}",
        )

    def release(self) -> dict[str, Any]:
        """The first method's ranking in the release's format, with further fields for the other methods."""
        methods = list(dict.fromkeys(method for method, _, _ in self.rankings))
        lists = {(method, role): candidates for method, role, candidates in self.rankings}
        first = methods[0] if methods else ""
        return {
            "example_id": self.query_id,
            "query_set": "explorer",
            "inputs_plaintext": self.prompt,
            "separator": self.separator,
            "targets_plaintext": self.completion,
            **{
                f"{role}{suffix}": [value(candidate) for candidate in lists.get((first, role), ())]
                for role in ("proponent", "opponent")
                for suffix, value in (
                    ("s", lambda candidate: candidate.text),
                    ("_ids", lambda candidate: candidate.example_id),
                    ("_scores", lambda candidate: candidate.score),
                )
            },
            "method": first,
            "other_methods": {
                method: [
                    {"example_id": candidate.example_id, "score": candidate.score, "text": candidate.text}
                    for candidate in lists.get((method, "proponent"), ())
                ]
                for method in methods[1:]
            },
        }


def to_csv(queries: Iterable[ExportedQuery]) -> Iterator[str]:
    """A header, then one row per candidate.

    A cell that a spreadsheet would run as a formula begins with an apostrophe.
    """
    yield _row(_COLUMNS)
    for query in queries:
        for method, role, candidates in query.rankings:
            for candidate in candidates:
                yield _row(
                    (
                        query.query_id,
                        query.prompt,
                        query.completion,
                        method,
                        role,
                        candidate.rank,
                        candidate.score,
                        candidate.example_id,
                        "" if candidate.correct is None else int(candidate.correct),
                        "" if candidate.entailment is None else candidate.entailment,
                        candidate.category or "",
                        candidate.text,
                    )
                )


def to_jsonl(queries: Iterable[ExportedQuery]) -> Iterator[str]:
    """One line per query."""
    for query in queries:
        yield json.dumps(query.release(), ensure_ascii=False, allow_nan=False) + "\n"


def to_html(queries: Iterable[ExportedQuery], title: str) -> Iterator[str]:
    """One page to pass on; it has no script, and its own content security policy lets nothing else load."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    yield (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{digest}'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{plain(title)}</title><style>{_STYLE}</style></head><body><h1>{plain(title)}</h1>\n"
    )
    for query in queries:
        yield (
            f"<h2 dir=auto>{plain(query.prompt + query.separator)}<b>{plain(query.completion)}</b></h2>"
            f"<p><small>{plain(query.query_id)} {plain(query.heading)}</small></p>\n"
        )
        for method, role, candidates in query.rankings:
            yield f"<h3>{plain(method)}: {plain(role)}s</h3><table>"
            for candidate in candidates:
                star = "★" if candidate.correct else ""
                yield (
                    f"<tr><td class=n>{candidate.rank}</td><td class=n>{candidate.score:+.4f} {star}</td>"
                    f"<td class=t dir=auto>{plain(candidate.text)} "
                    f"<small>{plain(candidate.example_id)}</small></td></tr>"
                )
            yield "</table>\n"
    yield "</body></html>\n"


def _row(cells: Sequence[object]) -> str:
    out = io.StringIO()
    csv.writer(out).writerow([_cell(cell) for cell in cells])
    return out.getvalue()


def _cell(cell: object) -> object:
    if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + cell
    return cell.replace("\0", "\ufffd") if isinstance(cell, str) else cell
