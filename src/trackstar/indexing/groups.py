"""A corpus in the order of its windows, cut into the groups that gradients are taken of at once, shard by shard.

How it is cut follows from the manifest alone, so that a group's rows are the same wherever and whenever they are made.
"""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol, final, runtime_checkable

from jaxtyping import Float32
from torch import Tensor

from trackstar.corpus import Example, TokenizedExample, tokenize_examples
from trackstar.model.language_model import LanguageModel
from trackstar.store import Index, Manifest, ResumePoint, StoredRows

# Whitening reads a W_train of the size of R_train: many rows at once. A group is what is lost where a worker dies.
GROUP_EXAMPLES = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorpusPosition:
    """Where reading stands: the record and window that come next, and how many records had nothing to score."""

    record: int
    window: int
    skipped: int


@runtime_checkable
class ExampleSource(Protocol):
    """What an index is made of: examples in the order of their records."""

    @property
    def name(self) -> str:
        """What errors call it."""
        ...

    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples of record `start` and later."""
        ...


def tokenized_windows(
    corpus: ExampleSource, model: LanguageModel, start: CorpusPosition, *, window_tokens: int, overlap: int
) -> Iterator[tuple[TokenizedExample | None, CorpusPosition]]:
    """Windows in the corpus's order from `start` on, each with the position after it; None for a record without any."""
    skipped = start.skipped
    # Examples are needed twice: for their windows and, where there are none, for their place.
    first, second = itertools.tee(corpus.examples(start.record))
    tokenized = tokenize_examples(first, model.tokenizer, window_tokens=window_tokens, overlap=overlap)
    for example, windows in zip(second, tokenized, strict=True):
        if not windows:
            skipped += 1
            yield None, CorpusPosition(record=example.record + 1, window=0, skipped=skipped)
        for number, window in enumerate(windows):
            if example.record == start.record and number < start.window:
                continue
            last = number + 1 == len(windows)
            after = (example.record + 1, 0) if last else (example.record, number + 1)
            yield window, CorpusPosition(record=after[0], window=after[1], skipped=skipped)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KnownRows:
    """φ of some examples of a group that a first pass has computed.

    Attributes:
        places: Which of the group's examples they are, ascending.
        stored: Their φ, encoded.
        losses: Their losses in nats.
    """

    places: tuple[int, ...]
    stored: StoredRows
    losses: Float32[Tensor, "places"]


@final
class KnownGradients:
    """An index in projected coordinates that has some examples' φ already."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._rows: dict[tuple[int, int], int] = {}
        for shard in index.shards:
            places = zip(shard.records.tolist(), shard.windows.tolist(), strict=True)
            self._rows |= {place: shard.first_row + row for row, place in enumerate(places)}

    def of(self, examples: Sequence[TokenizedExample]) -> KnownRows | None:
        """What is known of these examples, in the corpus's order; None where that is nothing."""
        keys = [(example.record, example.window) for example in examples]
        places = tuple(place for place, key in enumerate(keys) if key in self._rows)
        if not places:
            return None
        rows = [self._rows[keys[place]] for place in places]
        return KnownRows(places=places, stored=self._index.some_rows(rows), losses=self._index.some_losses(rows))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Examples whose rows are made at once.

    Attributes:
        shard: Number of the shard that they belong to.
        examples: In the order of its rows.
        after: The position after the last.
        known: What is known of them.
    """

    shard: int
    examples: tuple[TokenizedExample, ...]
    after: CorpusPosition
    known: KnownRows | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """A shard that is there already: nothing of it is to be made."""

    shard: int


@final
class ShardGroups:
    """Groups of one shard after the other, from a place where a shard begins to the end of the corpus.

    A shard that is there is not tokenized: it says where the next one begins.

    Args:
        corpus: Where the examples come from.
        model: Whose tokenizer splits them.
        manifest: How long windows and shards are.
        start: Where the first shard begins.
        there: The end of a shard that need not be made, by number; None for one that must be.
        wanted: Whether a shard is to be made at all; one that is not is gone over.
        known: Has some of the examples' φ.
    """

    def __init__(
        self,
        corpus: ExampleSource,
        model: LanguageModel,
        manifest: Manifest,
        start: ResumePoint,
        *,
        there: Callable[[int], ResumePoint | None] = lambda _shard: None,
        wanted: Callable[[int], bool] = lambda _shard: True,
        known: KnownGradients | None = None,
    ) -> None:
        self._corpus = corpus
        self._model = model
        self._manifest = manifest
        self._there = there
        self._wanted = wanted
        self._known = known
        self.shards = -(-start.row // manifest.shard_examples)  # the corpus's last shard may be a short one
        """How many shards have been gone through, the last of the corpus included."""
        self.rows = start.row
        """How many examples these hold."""
        self.end = CorpusPosition(record=start.record, window=start.window, skipped=start.skipped)
        """The position reached; once all groups have been taken, the corpus's end."""

    def __iter__(self) -> Iterator[Group | Present]:
        """Groups that are to be made and, in their places, shards that are there."""
        found = self._there(self.shards)
        while True:
            if found is None:
                found = yield from self._tokenized()
                if found is None:
                    return
            yield Present(shard=self.shards)
            self.shards += 1
            self.rows = found.row
            self.end = CorpusPosition(record=found.record, window=found.window, skipped=found.skipped)
            found = self._there(self.shards)

    def _tokenized(self) -> Generator[Group, None, ResumePoint | None]:
        """Groups up to a shard that is there; gives its end, None where the corpus ends before one."""
        manifest, held, after = self._manifest, list[TokenizedExample](), self.end
        windows = tokenized_windows(
            self._corpus, self._model, self.end, window_tokens=manifest.windows.tokens, overlap=manifest.windows.overlap
        )
        in_shard = 0
        for window, self.end in windows:
            if window is None:
                continue
            held.append(window)
            in_shard, self.rows, after = in_shard + 1, self.rows + 1, self.end
            full = in_shard == manifest.shard_examples
            if full or len(held) == GROUP_EXAMPLES:
                yield from self._group(held, after)
                held = []
            if full:
                self.shards, in_shard = self.shards + 1, 0
                found = self._there(self.shards)
                if found is not None:
                    return found
        # Records without a token to score that end the corpus belong to no shard.
        if held:
            yield from self._group(held, after)
        self.shards += in_shard > 0
        return None

    def _group(self, examples: list[TokenizedExample], after: CorpusPosition) -> Iterator[Group]:
        if self._wanted(self.shards):
            known = self._known.of(examples) if self._known is not None else None
            yield Group(shard=self.shards, examples=tuple(examples), after=after, known=known)
