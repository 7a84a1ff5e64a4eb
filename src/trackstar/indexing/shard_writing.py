"""Write shards: φ of each group of examples is computed, encoded and stored, and R_train is summed
over the shards.

An interrupted run resumes at the first missing shard, and ends with the same bytes as an
undisturbed one.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float32
from torch import Tensor

from trackstar.choices import CodecName
from trackstar.corpus import TokenizedExample
from trackstar.curvature.autocorrelation import Autocorrelation
from trackstar.curvature.whitening import AnyWhitening
from trackstar.errors import CorpusError
from trackstar.gradients.projector import GradientProjector
from trackstar.indexing.groups import CorpusPosition, ExampleSource, FinishedShard, Group, SampledGradients, ShardGroups
from trackstar.indexing.machine import release_memory
from trackstar.model.devices import float64_device
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import (
    Index,
    IndexWriter,
    Manifest,
    Shard,
    ShardContent,
    StoredRows,
    encode,
    have_shapes,
    stores_autocorrelation,
)
from trackstar.workers.protocol import Workers
from trackstar.workers.setups import GradientSetup
from trackstar.workers.stored_losses import check_sample

# Seconds between saves of R_train's sums, which spare a resumed run to add up all shards again.
_SAVE_PROGRESS_EVERY = 600.0
# Rows added to R_train at once. A shard is cut at the same rows whether it was just written or is
# read again, so that a resumed run's sums equal those of an undisturbed run bit for bit.
_ROWS_AT_ONCE = 512
# Rows that are whitened and encoded at once.
_WHITENED_AT_ONCE = 256

Rows = tuple[StoredRows, Float32[Tensor, "_rows"]]
"""A group's rows as they are stored, and their losses in nats."""

MakeRows = Callable[[Iterable[Group]], Iterator[Rows]]
"""Converts groups to rows, in the groups' order; it may take several groups before it returns the
first rows.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowWork:
    """Converts a group of examples to stored rows: φ, or u = W_train φ in whitened coordinates,
    encoded.

    Attributes:
        codec: The codec of the rows.
        blocks: Number of layer blocks.
        train: W_train; None for projected coordinates.
        moved: Copies of W_train on the devices that compute gradients: 1 GiB each in the paper's
            setting.
    """

    codec: CodecName
    blocks: int
    train: AnyWhitening | None
    moved: dict[torch.device, AnyWhitening] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest, train: AnyWhitening | None = None) -> "RowWork":
        """The work for an index with this manifest."""
        return cls(codec=manifest.codec, blocks=len(manifest.layer_blocks), train=train)

    def __call__(
        self, projector: GradientProjector, group: Group, advance: Callable[[int], None] = lambda _examples: None
    ) -> Rows:
        """A group's rows and losses.

        Args:
            projector: Computes φ.
            group: At least one example.
            advance: Callback that receives the number of finished documents.
        """
        examples, sampled = group.examples, group.sampled
        losses = torch.empty(len(examples))
        stored = StoredRows.empty(self.codec, len(examples), projector.dimensions, self.blocks)
        phi = torch.empty(len(examples), projector.dimensions) if self.train is not None else None
        missing = list(range(len(examples)))
        if sampled is not None:
            assert phi is not None, "only whitened rows have a first pass"
            places = torch.tensor(sampled.places)
            phi[places], losses[places] = sampled.stored.decode(), sampled.losses
            missing = sorted({*missing} - {*sampled.places})
            advance(_documents(examples, sampled.places))
        for batch, batch_phi, batch_losses in projector.batches([examples[place] for place in missing]):
            rows = torch.tensor([missing[place] for place in batch])
            if phi is None:
                stored[rows] = self._encoded(batch_phi)
            else:
                phi[rows] = batch_phi.cpu()
            losses[rows] = batch_losses.cpu()
            advance(_documents(examples, rows.tolist()))
        if phi is not None and self.train is not None:
            device = float64_device(projector.device)  # which W_train's low-rank form and norms are computed in
            if device not in self.moved:
                self.moved[device] = self.train.to(device)
            for first in range(0, len(phi), _WHITENED_AT_ONCE):
                part = slice(first, first + _WHITENED_AT_ONCE)
                stored[part] = self._encoded(self.moved[device].apply(phi[part].to(device)))
        return stored, losses

    def _encoded(self, coordinates: Tensor) -> StoredRows:
        """Rows on the CPU, encoded on their device if it has float64, which norms are computed in."""
        return encode(coordinates.to(float64_device(coordinates.device)), self.codec, self.blocks).to("cpu")


def rows_by(workers: Workers, model: LanguageModel, setup: GradientSetup, work: RowWork, bar: Progress) -> MakeRows:
    """Rows computed by workers, with progress per document."""
    return lambda groups: workers.gradients(model, setup, work, groups, advance=bar.advance, note=bar.note)


def check_resumed(writer: IndexWriter, model: LanguageModel) -> None:
    """Raise if the model does not give the losses of the examples that an earlier run has written.

    Raises:
        IndexMismatchError: A loss differs, so that the index would mix two networks.
    """
    if writer.shards_done:
        check_sample(Index.open(writer.path, allow_incomplete=True), model)


def write_shards(
    writer: IndexWriter,
    corpus: ExampleSource,
    model: LanguageModel,
    make_rows: MakeRows,
    *,
    sampled: SampledGradients | None = None,
    advance: Callable[[int], None],
) -> CorpusPosition:
    """Write every missing shard.

    Args:
        writer: The open index.
        corpus: Source of the examples.
        model: The model, for its tokenizer.
        make_rows: Converts groups to rows.
        sampled: φ of the first pass's examples.
        advance: Callback that receives the number of documents in each shard that is already
            finished.

    Returns:
        The position at the end of the corpus.

    Raises:
        CorpusError: No record of the corpus has a token to score.
    """
    manifest = writer.manifest
    projected = manifest.coordinates == "projected"
    r_train = RunningAutocorrelation(writer, device=float64_device(model.device)) if projected else None
    groups = ShardGroups(corpus, model, manifest, writer.resume_point, finished=writer.end_of, sampled=sampled)
    waiting: collections.deque[Group | FinishedShard] = collections.deque()

    def missing_groups() -> Iterator[Group]:
        for group in groups:
            waiting.append(group)
            if isinstance(group, Group):
                yield group

    def adopt() -> None:
        """Add the finished shards that come next in order."""
        while waiting and isinstance(waiting[0], FinishedShard):
            waiting.popleft()
            shard = writer.adopt_shard()
            assert shard is not None, "its end was read from it"
            advance(int((shard.windows == 0).sum()))
            if r_train is not None:
                r_train.add(shard)

    def write(parts: list[tuple[Group, Rows]]) -> None:
        shard = writer.write_shard(shard_content(parts))
        if r_train is not None:
            r_train.add(shard)

    parts: list[tuple[Group, Rows]] = []
    for rows in make_rows(missing_groups()):
        adopt()
        group = waiting.popleft()
        assert isinstance(group, Group), "finished shards were adopted before"
        parts.append((group, rows))
        release_memory()
        if sum(len(of.examples) for of, _ in parts) == manifest.shard_examples:
            write(parts)
            parts = []
            adopt()
    if parts:
        write(parts)
    adopt()
    if not writer.shards_done:
        raise no_example_error(corpus, groups.end)
    if r_train is not None:
        r_train.write()
    return groups.end


def no_example_error(corpus: ExampleSource, end: CorpusPosition) -> CorpusError:
    """The error for a corpus without a scorable example."""
    return CorpusError(
        f"{corpus.name}: none of its {end.record} records has a token to score; expected texts of two tokens or "
        "more, with targets among them"
    )


def shard_content(parts: Sequence[tuple[Group, Rows]]) -> ShardContent:
    """A shard's content: its groups' rows, with the tokens and texts that show and recompute its examples."""
    after = parts[-1][0].after
    return ShardContent(
        stored=StoredRows.concatenated([stored for _, (stored, _) in parts]),
        losses=torch.cat([losses for _, (_, losses) in parts]),
        examples=[example for group, _ in parts for example in group.examples],
        next_record=after.record,
        next_window=after.window,
        skipped=after.skipped,
    )


def _documents(examples: Sequence[TokenizedExample], places: Iterable[int]) -> int:
    """Number of documents that begin among some examples."""
    return sum(examples[place].window == 0 for place in places)


class RunningAutocorrelation:
    """R_train summed over shards as stored, so that it is a function of the finished shards alone.

    Nothing is summed until the index has so many examples that it stores R_train
    (`stores_autocorrelation`).

    Args:
        writer: The open index.
        device: Device of the sums, which take 1.1 GiB in the paper's setting.
    """

    def __init__(self, writer: IndexWriter, *, device: torch.device | str = "cpu") -> None:
        self._writer = writer
        self._device = device
        self._rows = sum(shard.rows for shard in writer.shards_done)
        self._sums: Autocorrelation | None = None
        self._saved = time.monotonic()
        if self._are_many:
            self._begin(writer.load_progress())

    @property
    def _are_many(self) -> bool:
        return stores_autocorrelation(self._rows, self._writer.manifest.projection.side)

    def add(self, shard: Shard) -> None:
        """Add a shard that the writer has just written or adopted; save the sums every ten minutes."""
        self._rows += shard.rows
        if self._sums is None:
            if self._are_many:
                self._begin((0, {}))
            return
        self._add_rows(self._sums, shard)
        if time.monotonic() - self._saved > _SAVE_PROGRESS_EVERY:
            self._writer.save_progress({name: sums.cpu() for name, sums in _named(self._sums).items()})
            self._saved = time.monotonic()

    def write(self) -> None:
        """Write R_train into the index, unless its few examples stand for it; nothing is added later."""
        if self._sums is not None:
            mean = self._sums.final_mean().cpu()
            self._writer.write_tensors("autocorrelation", {"autocorrelation": mean})

    def _begin(self, progress: tuple[int, dict[str, Tensor]]) -> None:
        """Sum all shards so far, from saved sums on."""
        manifest = self._writer.manifest
        sums = Autocorrelation(len(manifest.layer_blocks), manifest.projection.side**2, device=self._device)
        counted, saved = progress
        named = _named(sums)
        if not have_shapes(saved, **{name: tuple(part.shape) for name, part in named.items()}):
            counted = 0
        if counted:
            for name, part in named.items():
                part.copy_(saved[name])
            sums.examples = sum(shard.rows for shard in self._writer.shards_done[:counted])
        for shard in self._writer.shards_done[counted:]:
            self._add_rows(sums, shard)
        self._sums = sums

    def _add_rows(self, sums: Autocorrelation, shard: Shard) -> None:
        stored = shard.stored
        for first in range(0, shard.rows, _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            sums.add(stored[rows].to(self._device).decode())


def _named(sums: Autocorrelation) -> dict[str, Tensor]:
    return {f"sums.{number}": part for number, part in enumerate(sums.sums)}
