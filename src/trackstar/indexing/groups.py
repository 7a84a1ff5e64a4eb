"""Groups: a corpus's windows in order, cut into the examples whose gradients are computed at once,
shard by shard.

The cuts follow from the manifest alone, so that a group's rows are the same wherever and whenever
they are computed.
"""

import dataclasses
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Protocol, final, runtime_checkable

from jaxtyping import Float32
from torch import Tensor

from trackstar.corpus import Example, TokenizedExample, tokenize_examples
from trackstar.model.language_model import LanguageModel
from trackstar.store import Index, Manifest, ResumePoint, StoredRows, WindowsEntry

# Whitening reads all of W_train, so it needs many rows at once. A worker that dies loses one group.
GROUP_EXAMPLES = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorpusPosition:
    """A position in a corpus: the next record and window, and the number of records before without
    a scorable token.
    """

    record: int
    window: int
    skipped: int


@runtime_checkable
class ExampleSource(Protocol):
    """Source of an index's examples, in the order of their records."""

    @property
    def name(self) -> str:
        """Name in error messages."""
        ...

    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples from record number `start` on."""
        ...


def tokenized_windows(
    corpus: ExampleSource, model: LanguageModel, start: CorpusPosition, windows: WindowsEntry
) -> Iterator[tuple[TokenizedExample | None, CorpusPosition]]:
    """Windows in order from `start` on, each with the position after it; None for a record without
    a window.
    """
    skipped = start.skipped
    # Each example is used twice: for its windows, and for its record number if it has none.
    first, second = itertools.tee(corpus.examples(start.record))
    tokenized = tokenize_examples(
        first, model.tokenizer, window_tokens=windows.tokens, overlap=windows.overlap, truncate=windows.truncate
    )
    for example, parts in zip(second, tokenized, strict=True):
        if not parts:
            skipped += 1
            yield None, CorpusPosition(record=example.record + 1, window=0, skipped=skipped)
        for part in parts:
            if example.record == start.record and part.window < start.window:
                continue
            after = (example.record + 1, 0) if part is parts[-1] else (example.record, part.window + 1)
            yield part, CorpusPosition(record=after[0], window=after[1], skipped=skipped)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledRows:
    """φ of those examples of a group that the first pass has computed.

    Attributes:
        places: Places of these examples in the group, ascending.
        stored: Their φ, encoded.
        losses: Their losses in nats.
    """

    places: tuple[int, ...]
    stored: StoredRows
    losses: Float32[Tensor, "places"]


@final
class SampledGradients:
    """The φ that a first pass has computed, as an index in projected coordinates."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._rows: dict[tuple[int, int], int] = {}
        for shard in index.shards:
            places = zip(shard.records.tolist(), shard.windows.tolist(), strict=True)
            self._rows |= {place: shard.first_row + row for row, place in enumerate(places)}

    def of(self, examples: Sequence[TokenizedExample]) -> SampledRows | None:
        """φ of those examples that the first pass has; None if it has none of them."""
        keys = [(example.record, example.window) for example in examples]
        places = tuple(place for place, key in enumerate(keys) if key in self._rows)
        if not places:
            return None
        rows = [self._rows[keys[place]] for place in places]
        return SampledRows(places=places, stored=self._index.some_rows(rows), losses=self._index.some_losses(rows))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Examples whose rows are computed at once.

    Attributes:
        shard: Number of their shard.
        examples: The examples, in the order of the shard's rows.
        after: The position after the last of them.
        sampled: Those that the first pass has computed.
    """

    shard: int
    examples: tuple[TokenizedExample, ...]
    after: CorpusPosition
    sampled: SampledRows | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FinishedShard:
    """A shard that is already written."""

    shard: int


@final
class ShardGroups:
    """Groups of consecutive shards, from the beginning of a shard to the end of the corpus.

    A finished shard is not tokenized again: its file holds the position at which the next one
    begins.

    Args:
        corpus: Source of the examples.
        model: The model, for its tokenizer.
        manifest: The index's manifest, for the sizes of windows and shards.
        start: The beginning of the first shard.
        finished: Returns the end of a finished shard, by number; None for a missing one.
        wanted: Whether a missing shard is to be computed; if not, its windows are passed over.
        sampled: φ of the first pass's examples.
    """

    def __init__(
        self,
        corpus: ExampleSource,
        model: LanguageModel,
        manifest: Manifest,
        start: ResumePoint,
        *,
        finished: Callable[[int], ResumePoint | None] = lambda _shard: None,
        wanted: Callable[[int], bool] = lambda _shard: True,
        sampled: SampledGradients | None = None,
    ) -> None:
        self._corpus = corpus
        self._model = model
        self._manifest = manifest
        self._finished = finished
        self._wanted = wanted
        self._sampled = sampled
        self.shards = -(-start.row // manifest.shard_examples)  # the last shard may be short
        """Number of shards passed so far; at the end, all shards of the index."""
        self.rows = start.row
        """Number of examples in these shards."""
        self.end = CorpusPosition(record=start.record, window=start.window, skipped=start.skipped)
        """The position reached; at the end, that of the end of the corpus."""

    def __iter__(self) -> Iterator[Group | FinishedShard]:
        """Missing groups and finished shards, in order."""
        end = self._finished(self.shards)
        while True:
            if end is None:
                end = yield from self._tokenized()
                if end is None:
                    return
            yield FinishedShard(shard=self.shards)
            self.shards += 1
            self.rows = end.row
            self.end = CorpusPosition(record=end.record, window=end.window, skipped=end.skipped)
            end = self._finished(self.shards)

    def _tokenized(self) -> Generator[Group, None, ResumePoint | None]:
        """Groups up to the next finished shard; returns that shard's end, or None at the end of the
        corpus.
        """
        manifest, held, after = self._manifest, list[TokenizedExample](), self.end
        windows = tokenized_windows(self._corpus, self._model, self.end, manifest.windows)
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
                end = self._finished(self.shards)
                if end is not None:
                    return end
        # Unscorable records at the end of the corpus belong to no shard.
        if held:
            yield from self._group(held, after)
        self.shards += in_shard > 0
        return None

    def _group(self, examples: list[TokenizedExample], after: CorpusPosition) -> Iterator[Group]:
        if self._wanted(self.shards):
            sampled = self._sampled.of(examples) if self._sampled is not None else None
            yield Group(shard=self.shards, examples=tuple(examples), after=after, sampled=sampled)
