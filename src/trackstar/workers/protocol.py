"""Interface of workers, which compute gradients and scan indexes, and its form in this process alone.

Work on many examples or rows is split into parts that do not depend on which worker computes them, and
results are combined in the parts' order. So one process and a hundred of the same hardware give the
same bits.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, final, runtime_checkable

from trackstar.model.language_model import LanguageModel
from trackstar.store import Index, Manifest

Advance = Callable[[int], None]
"""Callback that receives numbers of completed examples."""
GradientWork = Callable[[Any, Any, Advance], Any]
"""Function that computes one part's result, given what `Setup.opened` gives, the part and a
progress callback.

The function, parts and results are sent between processes: they hold plain data and tensors on the CPU."""
IndexWork = Callable[[Index], Any]
"""Function that computes the result of an index, or of an `Index` with some of its shards."""


def ignore(_: object) -> None:
    """Callback that does nothing."""


@runtime_checkable
class Setup(Protocol):
    """Description of what to open on a model before computing parts; it is sent between processes."""

    @property
    def manifest(self) -> Manifest:
        """Manifest that identifies the model and its layer blocks."""
        ...

    def opened(self, model: LanguageModel, note: Callable[[str], None]) -> AbstractContextManager[Any]:
        """The first argument of `GradientWork`, as a context manager.

        Args:
            model: The manifest's model.
            note: Callback that receives lines for the user, for example when memory runs out.
        """
        ...


@runtime_checkable
class Workers(Protocol):
    """Computes gradients and scans indexes."""

    def gradients(
        self,
        model: LanguageModel,
        setup: Setup,
        work: GradientWork,
        parts: Iterable[Any],
        *,
        advance: Advance = ignore,
        note: Callable[[str], None] = ignore,
    ) -> Iterator[Any]:
        """Results of all parts, in the order of the parts, which are taken as workers become free.

        Args:
            model: The model.
            setup: Opened once per worker.
            work: Computes a part's result.
            parts: The parts.
            advance: Callback that receives numbers of completed examples.
            note: Callback that receives lines for the user, for example when memory runs out.
        """
        ...

    def scan(self, index: Index, work: IndexWork, *, progress: bool = False) -> list[Any]:
        """Results of `work` for consecutive groups of shards that make up the index, in order.

        Args:
            index: The index.
            work: Computes a group's result; in this process it shows its own progress bar.
            progress: Whether to show a progress bar for other processes' work.
        """
        ...


@final
class ThisProcess:
    """Computes one part after the other with the caller's model."""

    def gradients(
        self,
        model: LanguageModel,
        setup: Setup,
        work: GradientWork,
        parts: Iterable[Any],
        *,
        advance: Advance = ignore,
        note: Callable[[str], None] = ignore,
    ) -> Iterator[Any]:
        """See `Workers`."""
        with setup.opened(model, note) as opened:
            for part in parts:
                yield work(opened, part, advance)

    def scan(self, index: Index, work: IndexWork, *, progress: bool = False) -> list[Any]:
        """See `Workers`."""
        return [work(index)]


THIS_PROCESS = ThisProcess()
