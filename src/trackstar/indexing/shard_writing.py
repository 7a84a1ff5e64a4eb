"""From groups of examples to shards: gradients, projected, encoded, stored; R_train summed over them; resumable."""

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
from trackstar.curvature.whitening import Whitening
from trackstar.errors import CorpusError
from trackstar.gradients.projector import GradientProjector
from trackstar.indexing.groups import CorpusPosition, ExampleSource, Group, KnownGradients, Present, ShardGroups
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import IndexWriter, Manifest, Shard, ShardContent, StoredRows, encode, have_shapes
from trackstar.workers.protocol import Workers
from trackstar.workers.setups import GradientSetup

# How often, in seconds, the sums of R_train are put aside, so that a resumed run need not add up all shards again.
_SAVE_PROGRESS_EVERY = 600.0
# Rows added to R_train at once: each shard is cut at the same rows whether it has just been made or is read again, so
# that a resumed run's sums are those of an undisturbed one, bit for bit.
_ROWS_AT_ONCE = 512

Rows = tuple[StoredRows, Float32[Tensor, "_rows"]]
"""Rows of a group as they are stored, and their losses in nats."""

MakeRows = Callable[[Iterable[Group]], Iterator[Rows]]
"""Makes rows of groups, in the groups' order; it may ask for some groups before it gives the first rows."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowWork:
    """From a group to stored rows: φ, in whitened coordinates u = W_train φ, and encoded.

    Attributes:
        codec: Encodes them.
        blocks: Number of layer blocks.
        train: W_train; None for projected coordinates.
        moved: W_train where gradients are computed, once it has been needed there: a gibibyte in the paper's setting.
    """

    codec: CodecName
    blocks: int
    train: Whitening | None
    moved: dict[torch.device, Whitening] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, manifest: Manifest, train: Whitening | None = None) -> "RowWork":
        """Rows of an index with this manifest."""
        return cls(codec=manifest.codec, blocks=len(manifest.layer_blocks), train=train)

    def __call__(
        self, projector: GradientProjector, group: Group, advance: Callable[[int], None] = lambda _examples: None
    ) -> Rows:
        """The rows of a group's examples, and their losses.

        Args:
            projector: Gives φ.
            group: At least one example.
            advance: Told how many documents have been done.
        """
        examples, known = group.examples, group.known
        losses = torch.empty(len(examples))
        stored = StoredRows.empty(self.codec, len(examples), projector.dimensions, self.blocks)
        phi = torch.empty(len(examples), projector.dimensions) if self.train is not None else None
        missing = list(range(len(examples)))
        if known is not None:
            assert phi is not None, "what a first pass knows are whitened rows' φ"
            places = torch.tensor(known.places)
            phi[places], losses[places] = known.stored.decode(), known.losses
            missing = sorted({*missing} - {*known.places})
            advance(_documents(examples, known.places))
        for batch, batch_phi, batch_losses in projector.batches([examples[place] for place in missing]):
            rows = torch.tensor([missing[place] for place in batch])
            if phi is None:
                stored[rows] = encode(batch_phi, self.codec, self.blocks).to("cpu")
            else:
                phi[rows] = batch_phi.cpu()
            losses[rows] = batch_losses.cpu()
            advance(_documents(examples, rows.tolist()))
        if phi is not None and self.train is not None:
            device = projector.device
            if device not in self.moved:
                self.moved[device] = dataclasses.replace(self.train, factors=self.train.factors.to(device))
            stored = encode(self.moved[device].apply(phi.to(device)), self.codec, self.blocks).to("cpu")
        return stored, losses


def rows_by(workers: Workers, model: LanguageModel, setup: GradientSetup, work: RowWork, bar: Progress) -> MakeRows:
    """Rows made by workers, the bar told of each document."""
    return lambda groups: workers.gradients(model, setup, work, groups, advance=bar.advance, note=bar.note)


def write_shards(
    writer: IndexWriter,
    corpus: ExampleSource,
    model: LanguageModel,
    make_rows: MakeRows,
    *,
    known: KnownGradients | None = None,
    advance: Callable[[int], None],
) -> CorpusPosition:
    """Write every shard that is still missing.

    Args:
        writer: The open index.
        corpus: Where the examples come from.
        model: Whose tokenizer splits them.
        make_rows: Makes rows of examples.
        known: Has some examples' φ.
        advance: Told how many documents a shard that is there already holds.

    Returns:
        The position at the corpus's end.

    Raises:
        CorpusError: No record of the corpus has a token to score.
    """
    manifest = writer.manifest
    projected = manifest.coordinates == "projected"
    r_train = RunningAutocorrelation(writer, device=model.device) if projected else None
    groups = ShardGroups(corpus, model, manifest, writer.resume_point, there=writer.end_of, known=known)
    waiting: collections.deque[Group | Present] = collections.deque()

    def to_be_made() -> Iterator[Group]:
        for group in groups:
            waiting.append(group)
            if isinstance(group, Group):
                yield group

    def adopt() -> None:
        """Take the shards that are there and whose turn it is."""
        while waiting and isinstance(waiting[0], Present):
            waiting.popleft()
            shard = writer.adopt_shard()
            assert shard is not None, "seen to be good"
            advance(int((shard.windows == 0).sum()))
            if r_train is not None:
                r_train.add(shard)

    def write(parts: list[tuple[Group, Rows]]) -> None:
        shard = writer.write_shard(shard_content(parts))
        if r_train is not None:
            r_train.add(shard)

    parts: list[tuple[Group, Rows]] = []
    for rows in make_rows(to_be_made()):
        adopt()
        group = waiting.popleft()
        assert isinstance(group, Group), "others have been adopted"
        parts.append((group, rows))
        if sum(len(of.examples) for of, _ in parts) == manifest.shard_examples:
            write(parts)
            parts = []
            adopt()
    if parts:
        write(parts)
    adopt()
    if not writer.shards_done:
        raise no_example(corpus, groups.end)
    if r_train is not None:
        writer.write_tensors("autocorrelation", {"autocorrelation": r_train.mean()})
    return groups.end


def no_example(corpus: ExampleSource, end: CorpusPosition) -> CorpusError:
    """The error of a corpus without any example."""
    return CorpusError(
        f"{corpus.name}: none of its {end.record} records has a token to score, expected texts of two tokens or more"
    )


def shard_content(parts: Sequence[tuple[Group, Rows]]) -> ShardContent:
    """A shard of its groups, in their order, with what is needed to show and recompute its examples."""
    after = parts[-1][0].after
    return ShardContent(
        stored=StoredRows.joined([stored for _, (stored, _) in parts]),
        losses=torch.cat([losses for _, (_, losses) in parts]),
        examples=[example for group, _ in parts for example in group.examples],
        next_record=after.record,
        next_window=after.window,
        skipped=after.skipped,
    )


def _documents(examples: Sequence[TokenizedExample], places: Iterable[int]) -> int:
    """How many documents begin among some examples."""
    return sum(examples[place].window == 0 for place in places)


class RunningAutocorrelation:
    """R_train over the shards as stored, so that it is a function of the finished shards and nothing else.

    Args:
        writer: The open index.
        device: Where the sums are kept and added to: blocks × side⁴ × 8 bytes (2 GiB in the paper's setting).
    """

    def __init__(self, writer: IndexWriter, *, device: torch.device | str = "cpu") -> None:
        manifest = writer.manifest
        self._writer = writer
        blocks = len(manifest.layer_blocks)
        self._sums = Autocorrelation(blocks, manifest.projection.side**2, device=device)
        counted, kept = writer.load_progress()
        if not have_shapes(kept, sums=tuple(self._sums.sums.shape)):
            counted = 0
        if counted:
            self._sums.sums.copy_(kept["sums"])
            self._sums.examples = sum(shard.rows for shard in writer.shards_done[:counted])
        self._saved = time.monotonic()
        for shard in writer.shards_done[counted:]:
            self._add_rows(shard)

    def add(self, shard: Shard) -> None:
        """Add a shard that has just been written; now and then put the sums aside."""
        self._add_rows(shard)
        if time.monotonic() - self._saved > _SAVE_PROGRESS_EVERY:
            self._writer.save_progress({"sums": self._sums.sums.cpu()})
            self._saved = time.monotonic()

    def mean(self) -> Tensor:
        """R_train."""
        return self._sums.mean().cpu()

    def _add_rows(self, shard: Shard) -> None:
        stored = shard.stored
        for first in range(0, shard.rows, _ROWS_AT_ONCE):
            rows = slice(first, first + _ROWS_AT_ONCE)
            device = self._sums.sums.device
            self._sums.add(stored[rows].to(device).decode())
