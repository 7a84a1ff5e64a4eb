"""A table of a report: cells as text, from which Markdown and CSV are made."""

import csv
import dataclasses
import io
from collections.abc import Sequence

from trackstar.evaluation.comparisons import Estimate


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table as text.

    Attributes:
        name: A short name, for file names.
        title: Its content, and the table of the paper that it follows.
        header: Titles of the columns.
        rows: The cells.
        note: Explanation of the cells, printed below the table.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def to_markdown(self) -> str:
        """The table with its title and note."""
        lines = [f"### {self.title}", "", _row(self.header), _row(["---"] * len(self.header))]
        lines += [_row(row) for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])

    def to_csv(self) -> str:
        """Header and rows."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()


def number(value: Estimate, *, percent: bool = False) -> str:
    """A mean and its interval; one query has no interval."""
    if value.queries == 1:
        return f"{100 * value.mean:+.2f} (one query)" if percent else f"{value.mean:.3f} (one query)"
    if percent:
        return f"{100 * value.mean:+.2f} ({100 * value.low:+.2f} to {100 * value.high:+.2f})"
    return f"{value.mean:.3f} ({value.low:.3f}-{value.high:.3f})"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
