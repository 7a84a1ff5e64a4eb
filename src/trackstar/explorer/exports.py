"""What is on the screen as a file: CSV for spreadsheets, JSON lines, and one HTML page that needs nothing else."""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from trackstar.attribution.markup import plain
from trackstar.explorer.schemas import Answer, Passage

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


class Shown:
    """A query with its rankings, as it is written out.

    Args:
        query_id: Its name.
        prompt: Its prompt.
        completion: Its completion.
        rankings: Method, role and passages of each list.
        heading: What else is said of it.
    """

    def __init__(
        self,
        query_id: str,
        prompt: str,
        completion: str,
        rankings: Sequence[tuple[str, str, Sequence[Passage]]],
        heading: str = "",
    ) -> None:
        self.query_id = query_id
        self.prompt = prompt
        self.completion = completion
        self.rankings = rankings
        self.heading = heading

    @classmethod
    def of_answer(cls, answer: Answer) -> "Shown":
        """A live answer."""
        return cls(
            query_id=answer.key,
            prompt=answer.prompt,
            completion=answer.completion,
            rankings=[
                (ranking.method, role, passages)
                for ranking in answer.rankings
                for role, passages in (("proponent", ranking.proponents), ("opponent", ranking.opponents))
                if passages
            ],
            heading=f"P = {answer.probability:.2%}, λ = {answer.mixing.value:.4f}",
        )

    def release(self) -> dict[str, Any]:
        """A line a method would have in the release's format, with the method beside it."""
        methods = list(dict.fromkeys(method for method, _, _ in self.rankings))
        lists = {(method, role): passages for method, role, passages in self.rankings}
        first = methods[0] if methods else ""
        return {
            "example_id": self.query_id,
            "query_set": "explorer",
            "inputs_plaintext": self.prompt,
            "targets_plaintext": self.completion,
            **{
                f"{role}{suffix}": [value(passage) for passage in lists.get((first, role), ())]
                for role in ("proponent", "opponent")
                for suffix, value in (
                    ("s", lambda passage: passage.text),
                    ("_ids", lambda passage: passage.example_id),
                    ("_scores", lambda passage: passage.score),
                )
            },
            "method": first,
            "other_methods": {
                method: [
                    {"example_id": passage.example_id, "score": passage.score, "text": passage.text}
                    for passage in lists.get((method, "proponent"), ())
                ]
                for method in methods[1:]
            },
        }


def to_csv(shown: Iterable[Shown]) -> Iterator[str]:
    """A row a passage, with a header; a cell that a spreadsheet would run as a formula begins with an apostrophe."""
    yield _row(_COLUMNS)
    for query in shown:
        for method, role, passages in query.rankings:
            for passage in passages:
                yield _row(
                    (
                        query.query_id,
                        query.prompt,
                        query.completion,
                        method,
                        role,
                        passage.rank,
                        passage.score,
                        passage.example_id,
                        "" if passage.correct is None else int(passage.correct),
                        "" if passage.entailment is None else passage.entailment,
                        passage.category or "",
                        passage.text,
                    )
                )


def to_jsonl(shown: Iterable[Shown]) -> Iterator[str]:
    """A line a query."""
    for query in shown:
        yield json.dumps(query.release(), ensure_ascii=False) + "\n"


def to_html(shown: Iterable[Shown], title: str) -> Iterator[str]:
    """One page without a script, whose own policy lets nothing else load: to be sent to somebody."""
    allowed = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    yield (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{allowed}'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{plain(title)}</title><style>{_STYLE}</style></head><body><h1>{plain(title)}</h1>\n"
    )
    for query in shown:
        yield (
            f"<h2 dir=auto>{plain(query.prompt)} <b>{plain(query.completion)}</b></h2>"
            f"<p><small>{plain(query.query_id)} {plain(query.heading)}</small></p>\n"
        )
        for method, role, passages in query.rankings:
            yield f"<h3>{plain(method)}: {plain(role)}s</h3><table>"
            for passage in passages:
                star = "★" if passage.correct else ""
                yield (
                    f"<tr><td class=n>{passage.rank}</td><td class=n>{passage.score:+.4f} {star}</td>"
                    f"<td class=t dir=auto>{plain(passage.text)} <small>{plain(passage.example_id)}</small></td></tr>"
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
