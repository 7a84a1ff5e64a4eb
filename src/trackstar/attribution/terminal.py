"""Results for a terminal. Corpora are untrusted text: control characters are shown as spaces."""

import sys
from collections.abc import Collection, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trackstar.attribution.results import QueryResult, Ranked
from trackstar.corpus import separator
from trackstar.progress import printable

# Line width if stdout is not a terminal.
_WIDTH_WITHOUT_TERMINAL = 120
_LONGEST_TEXT = 400


def print_line(line: str) -> None:
    """Print one line of plain text to stdout."""
    sys.stdout.write(printable(line) + "\n")
    sys.stdout.flush()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with its first column aligned left and all others right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(header):
        table.add_column(Text(printable(title)), justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    _console().print(table)


def print_query_result(result: QueryResult, *, gold: Collection[str] = (), title: str = "") -> None:
    """Print a query with its proponents and opponents: influence, name and text; a star marks gold
    examples.

    The query is the text as the model read it, with the completion between ⟦ and ⟧.

    Args:
        result: The query's result.
        gold: Names of the training examples that state the fact.
        title: Remark on the query, printed after it; empty prints the result's own, if it has one.
    """
    query, title = result.query, title or result.remark
    console = _console()
    prompt = _visible(query.prompt + separator(query))
    heading = Text((prompt if len(prompt) <= _LONGEST_TEXT else "…" + prompt[-_LONGEST_TEXT:]) + "⟦")
    heading.append(_visible(query.completion), style="bold")
    heading.append(f"⟧   P = {result.probability:.2%}")
    if title:
        heading.append(f"   [{printable(title)}]")
    console.print(heading)
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 1))
    for justify in ("right", "left", "left", "left"):
        table.add_column(justify=justify, no_wrap=justify == "right")
    for name, ranking in (("proponents", result.proponents), ("opponents", result.opponents)):
        table.add_row("", "", Text(name, style="italic"), "")
        for candidate in ranking:
            table.add_row(
                f"{candidate.influence:+.4f}",
                "★" if candidate.example_id in gold else " ",
                Text(_name(candidate)),
                _text(candidate),
            )
    console.print(table)
    console.print()


def _visible(text: str) -> str:
    """The text on one line, with signs for line breaks and tabulators."""
    return printable(text.replace("\r\n", "\n").replace("\n", "↵").replace("\t", "⇥"))


def _name(candidate: Ranked) -> str:
    name = printable(candidate.example_id)
    return name if len(name) <= 32 else name[:31] + "…"


def _text(candidate: Ranked) -> Text:
    text = printable(candidate.text).strip()
    return Text(text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + "…")


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL, highlight=False, emoji=False)
