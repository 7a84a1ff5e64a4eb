"""Progress bars on a terminal, progress callbacks for observers, and notes for both."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol, cast, runtime_checkable

from trackstar.text import printable

if TYPE_CHECKING:
    import rich.progress


@runtime_checkable
class TextStream(Protocol):
    """A stream of text to write lines to."""

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        ...

    def write(self, text: str, /) -> int:
        """Write text."""
        ...

    def flush(self) -> None:
        """Write what is buffered."""
        ...


@runtime_checkable
class ProgressObserver(Protocol):
    """Callbacks that receive progress, such as a web server's; an exception that they raise ends the work."""

    def started(self, title: str, unit: str, total: int | None) -> None:
        """Begin a stage of `total` units; None if their number is unknown."""
        ...

    def advanced(self, amount: int) -> None:
        """Count `amount` more units as done."""
        ...


_OBSERVER: ContextVar[ProgressObserver | None] = ContextVar("observer", default=None)
_WORDING: ContextVar[Callable[[str], str] | None] = ContextVar("wording", default=None)


@contextlib.contextmanager
def observed(observer: ProgressObserver) -> Iterator[None]:
    """Report all work that this thread does inside to the observer, whether or not bars are shown."""
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


@contextlib.contextmanager
def reworded(wording: Callable[[str], str]) -> Iterator[None]:
    """Pass every note that this thread prints inside through a function, such as a translation."""
    token = _WORDING.set(wording)
    try:
        yield
    finally:
        _WORDING.reset(token)


def reworded_line(line: str) -> str:
    """The line in the words of the surrounding `reworded`, without control characters."""
    wording = _WORDING.get()
    return printable(line if wording is None else wording(line))


def note(line: str) -> None:
    """Print one line on stderr, in the words of the surrounding `reworded`; a bar is drawn below it."""
    sys.stderr.write(f"{reworded_line(line)}\n")
    sys.stderr.flush()


class Progress:
    """A progress bar with rate and time left on stderr, drawn only on a terminal.

    Example:
        with Progress("Indexing", unit="tokens", total=1_000_000) as progress:
            progress.advance(4096)
            progress.note("3 records have no token to score and were skipped")

    Args:
        title: The stage's name.
        unit: The plural name of what is counted; the rate is shown in it per second.
        total: Number of units; None if unknown, and then no time left is shown.
        stream: Where to write; None is stderr.
        shown: Whether a bar may be drawn; notes are printed in any case.
    """

    def __init__(
        self, title: str, *, unit: str, total: int | None = None, stream: TextStream | None = None, shown: bool = True
    ) -> None:
        self._stream: TextStream = sys.stderr if stream is None else stream
        self._observer = _OBSERVER.get()
        self._wording = _WORDING.get()
        self._stage = (title, unit, total)
        self._bar = _bar(title, unit, total, self._stream) if shown and self._stream.isatty() else None

    def __enter__(self) -> "Progress":
        if self._observer is not None:
            self._observer.started(*self._stage)
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: int) -> None:
        """Count `amount` more units as done."""
        if self._observer is not None:
            self._observer.advanced(amount)
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], amount)

    def note(self, line: str) -> None:
        """Print one plain line, on a terminal above the bar; control characters in it become spaces."""
        plain = printable(line if self._wording is None else self._wording(line))
        if self._bar is None:
            self._stream.write(f"{plain}\n")
            self._stream.flush()
        else:
            self._bar.console.print(plain, markup=False, highlight=False, emoji=False, soft_wrap=True)


def _bar(title: str, unit: str, total: int | None, stream: TextStream) -> "rich.progress.Progress":
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.0f} {unit}/s")

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%" if total else f"{{task.completed:,.0f}} {unit}"),
        RateColumn(),
        TimeRemainingColumn(),
        console=Console(file=cast("IO[str]", stream)),
    )
    bar.add_task(title, total=total)
    return bar
