"""Where gradients are computed and stores are gone through: by this process alone, or by many (`cluster/`).

Whatever is computed of many examples or rows is cut into parts that do not depend on who computes them, and put
together in the parts' order: the same bits come of one process and of a hundred of the same kind.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol, final, runtime_checkable

from trackstar.model.language_model import LanguageModel
from trackstar.store import Index, Manifest

Advance = Callable[[int], None]
GradientWork = Callable[[Any, Any, Advance], Any]
"""What is done with one part: given what its setup opens and the part, and to be told of each example done, it gives
the result.

It, parts and results go from process to process, so they hold plain data and tensors on the CPU."""
IndexWork = Callable[[Index], Any]
"""What is done with an index, or with some shards of it."""


def ignore(_: object) -> None:
    """Told something that nobody wants to know."""


@runtime_checkable
class Setup(Protocol):
    """What must be known, and opened once on a model, before parts can be done; it goes from process to process."""

    @property
    def manifest(self) -> Manifest:
        """Says which model it is, and what its layer blocks are."""
        ...

    def opened(self, model: LanguageModel, note: Callable[[str], None]) -> AbstractContextManager[Any]:
        """What parts are done with.

        Args:
            model: The manifest's.
            note: Told what a user should know, such as memory that ran out.
        """
        ...


@runtime_checkable
class Workers(Protocol):
    """Who computes gradients and goes through stores."""

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
        """The results of all parts, in their order; parts are taken as there is somebody to do them.

        Args:
            model: The model.
            setup: What parts are done with.
            work: What is done with a part.
            parts: The parts.
            advance: Told of examples as they are done.
            note: Told what a user should know, such as memory that ran out.
        """
        ...

    def scan(self, index: Index, work: IndexWork, *, progress: bool = False) -> list[Any]:
        """What `work` gives for consecutive parts of an index that together are all of it, in their order.

        Args:
            index: The index.
            work: What is done with a part; it shows its own progress where this process does it.
            progress: Whether what others have done is shown.
        """
        ...


@final
class ThisProcess:
    """One part after the other, by the model that the caller has."""

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
