"""Progress bars on a terminal, lines elsewhere, progress callbacks for observers, and notes for all."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol, cast, final, runtime_checkable

from trackstar.text import duration, printable

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


LINE_EVERY = 30.0
"""Seconds between lines of progress where there is no terminal."""

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
    """The progress of a stage on stderr: a bar with rate and time left on a terminal, elsewhere a plain line
    every 30 seconds, the first after 30 seconds, so that short work stays quiet.

    The clock of a stage begins when its context is entered. Notes can be printed before.

    Example:
        with Progress("Indexing", unit="tokens", total=1_000_000) as progress:
            progress.advance(4096)
            progress.note("3 records have no token to score and were skipped")

    Args:
        title: The stage's name.
        unit: The plural name of what is counted; the rate is shown in it per second.
        total: Number of units; None if unknown, and then no time left is shown.
        stream: Where to write; None is stderr.
        shown: Whether a bar or lines may be shown; notes are printed in any case.
        clock: Returns the time in seconds, of which lines are a function.
    """

    def __init__(
        self,
        title: str,
        *,
        unit: str,
        total: int | None = None,
        stream: TextStream | None = None,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream: TextStream = sys.stderr if stream is None else stream
        self._observer = _OBSERVER.get()
        self._wording = _WORDING.get()
        self._stage = (title, unit, total)
        terminal = self._stream.isatty()
        self._bar = _bar(title, unit, total, self._stream) if shown and terminal else None
        self._lines = _Lines(title, unit, total, self._stream, clock) if shown and not terminal else None

    def __enter__(self) -> "Progress":
        if self._observer is not None:
            self._observer.started(*self._stage)
        if self._bar is not None:
            self._bar.start()
        if self._lines is not None:
            self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._lines is not None and error is None:
            self._lines.end()

    def advance(self, amount: int) -> None:
        """Count `amount` more units as done."""
        if self._observer is not None:
            self._observer.advanced(amount)
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0], amount)
        if self._lines is not None:
            self._lines.advance(amount)

    def resume(self, amount: int) -> None:
        """Count `amount` units as done by an earlier run, which the rate leaves out."""
        if self._observer is not None:
            self._observer.advanced(amount)
        if self._bar is not None:
            self._bar.reset(self._bar.task_ids[0], completed=amount)
        if self._lines is not None:
            self._lines.resume(amount)

    def note(self, line: str) -> None:
        """Print one plain line, on a terminal above the bar; control characters in it become spaces."""
        plain = printable(line if self._wording is None else self._wording(line))
        if self._bar is None:
            self._stream.write(f"{plain}\n")
            self._stream.flush()
        else:
            self._bar.console.print(plain, markup=False, highlight=False, emoji=False, soft_wrap=True)


@final
class _Lines:
    """Plain lines, one every `LINE_EVERY` seconds: the stage, what is done, the rate and the time left."""

    def __init__(
        self, title: str, unit: str, total: int | None, stream: TextStream, clock: Callable[[], float]
    ) -> None:
        self._title, self._unit, self._total = title, unit, total
        self._stream, self._clock = stream, clock
        self._done = self._resumed = 0
        self._printed: float | None = None
        self.start()

    def start(self) -> None:
        """Begin to count time."""
        self._begun = self._clock()

    def advance(self, amount: int) -> None:
        """Count units, and print a line if it is time for one."""
        self._done += amount
        now = self._clock()
        if now - (self._begun if self._printed is None else self._printed) >= LINE_EVERY:
            self._printed = now
            self._print(self._line(now - self._begun))

    def resume(self, amount: int) -> None:
        """Count units of an earlier run."""
        self._done += amount
        self._resumed += amount

    def end(self) -> None:
        """Say how long the stage took, if it has printed a line before."""
        if self._printed is not None:
            self._print(f"{self._title}: {self._done:,} {self._unit}, done in {duration(self._clock() - self._begun)}")

    def _line(self, elapsed: float) -> str:
        rate = (self._done - self._resumed) / elapsed
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        if self._total is None:
            return f"{self._title}: {self._done:,} {self._unit}, {shown} {self._unit}/s"
        left = f", {duration(max(0, self._total - self._done) / rate)} left" if rate > 0 else ""
        return (
            f"{self._title}: {self._done:,} of {self._total:,} {self._unit} ({self._done / max(1, self._total):.0%}), "
            f"{shown} {self._unit}/s{left}"
        )

    def _print(self, line: str) -> None:
        self._stream.write(f"{printable(line)}\n")
        self._stream.flush()


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
