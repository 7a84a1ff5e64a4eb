"""An index that is to be made: all that decides it, settled once; then its shards, by one process or several (Eq. 2-4).

`prepare` is what must be done once for an index: V, and for whitened coordinates R_train's first pass. `begin` writes
what every shard depends on, `IndexJob.fill` the shards, and finishes.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from trackstar.corpus import Corpus, TokenizedExample
from trackstar.errors import DamagedIndexError, IncompleteIndexError
from trackstar.gradients.estimated_moment import SquaredGradients, SummedSquares, estimate_parts, mean_of_squares
from trackstar.gradients.projection import floored_entries
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, SecondMoment
from trackstar.indexing.groups import KnownGradients
from trackstar.indexing.provenance import make_manifest, second_moment_entry
from trackstar.indexing.settings import IndexSettings, chosen_second_moment
from trackstar.indexing.shard_writing import RowWork, rows_by, write_shards
from trackstar.indexing.train_whitening import TrainWhitening, check_begun, first_pass, sample_source
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import PART_FOLDER, Index, IndexWriter, Manifest, Place, WindowsEntry, load_manifest, row_bytes
from trackstar.workers.protocol import Advance, Workers
from trackstar.workers.setups import GradientSetup, SquaresSetup


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IndexJob:
    """An index whose rows can be made.

    Attributes:
        out: Its folder.
        corpus: Its examples.
        model: The model.
        manifest: All that decides its content.
        setup: How φ is made.
        train: W_train; None for projected coordinates.
        first_pass: Gives its first pass's gradients, made again as far as they are missing; None for projected
            coordinates.
        workers: Who computes.
    """

    out: Place
    corpus: Corpus
    model: LanguageModel
    manifest: Manifest
    setup: GradientSetup
    train: TrainWhitening | None
    first_pass: Callable[[], Index] | None
    workers: Workers

    @property
    def row_work(self) -> RowWork:
        """From groups of examples to stored rows."""
        return RowWork.of(self.manifest, self.train.whitening if self.train is not None else None)

    def known(
        self, alone: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    ) -> KnownGradients | None:
        """The first pass's gradients, which need not be computed again; None for projected coordinates.

        Rows that were coded from a first pass's gradients are those of no others, to the bit: where that is missing or
        damaged, it is mended first.

        Args:
            alone: Held while it is mended, where several processes make the same index.
        """
        if self.first_pass is None:
            return None
        with contextlib.suppress(DamagedIndexError, IncompleteIndexError):
            part = self.out / PART_FOLDER
            if load_manifest(part) is not None:
                index = Index.open(part)
                index.check()
                return KnownGradients(index)
        with alone():
            return KnownGradients(self.first_pass())

    def begin(self, writer: IndexWriter, bar: Progress) -> None:
        """Write what all shards depend on, and say what the index will be."""
        moment = self.setup.second_moment
        bar.note(f"model: {self.model.architecture}, {self.model.coverage}")
        bar.note(f"second moment: {moment.source if moment.kind == 'none' else f'{moment.kind}, {moment.source}'}")
        manifest = self.manifest
        blocks = len(manifest.layer_blocks)
        kib = row_bytes(manifest.codec, manifest.dimensions, blocks) / 1024
        mib = blocks * manifest.projection.side**4 * 4 / 2**20
        bar.note(
            f"{manifest.coordinates}: {manifest.dimensions:,} dimensions, {manifest.codec}, {kib:,.1f} KiB an example; "
            f"R: {mib:,.1f} MiB (--side)"
        )
        raised = floored_entries(moment)
        if raised:
            bar.note(
                f"second moment: {sum(raised.values())} entries of {len(raised)} matrices below {moment.floor:g} of "
                "their mean were raised to it"
            )
        if moment.kind != "none":
            writer.write_tensors("second_moment", moment.tensors())
        if self.train is not None:
            writer.write_tensors("whitening", {"whitening": self.train.whitening.factors})

    def fill(self, writer: IndexWriter, bar: Progress) -> None:
        """Make every shard that is missing, and finish the index."""
        make_rows = rows_by(self.workers, self.model, self.setup, self.row_work, bar)
        end = write_shards(writer, self.corpus, self.model, make_rows, known=self.known(), advance=bar.advance)
        if end.skipped:
            bar.note(f"{end.skipped} of {end.record} records have no token to score and were left out")
        writer.finish(records=end.record, skipped=end.skipped)


def prepare(
    out: Place,
    corpus: Corpus,
    model: LanguageModel,
    windows: WindowsEntry,
    settings: IndexSettings,
    *,
    batch_tokens: int,
    workers: Workers,
    bar: Progress,
    progress: bool,
) -> IndexJob:
    """Settle what decides an index: V and W_train are computed, or taken from what an earlier run kept.

    Args:
        out: Its folder.
        corpus: Its examples.
        model: The model.
        windows: How documents are split.
        settings: What it is asked to be.
        batch_tokens: Most tokens of a batch, padding included.
        workers: Who computes.
        bar: Told what is done.
        progress: Whether the first pass may show a bar of its own.

    Raises:
        IndexMismatchError: What was begun there is something else.
        TrackstarError: V or R_train cannot be computed; see `trackstar.errors`.
    """
    manifest = make_manifest(
        model, corpus, windows, NO_SECOND_MOMENT, seed=settings.seed, side=settings.side, codec=settings.codec,
        shard_examples=settings.shard_examples, output=settings.output, projection=settings.projection,
    )  # fmt: skip
    squares = SquaresSetup(manifest=manifest, kind=settings.second_moment_kind, batch_tokens=batch_tokens)
    moment = chosen_second_moment(
        settings.second_moment,
        model,
        corpus,
        windows,
        kind=settings.second_moment_kind,
        examples=settings.second_moment_examples,
        seed=settings.seed,
        batch_tokens=batch_tokens,
        out=out,
        note=bar.note,
        estimate=functools.partial(_estimated, model, squares, workers, bar.note),
    )
    manifest = dataclasses.replace(manifest, second_moment=second_moment_entry(moment))
    setup = GradientSetup(manifest=manifest, second_moment=moment, batch_tokens=batch_tokens)
    source = sample_source(settings.whitening_examples, settings.seed)
    check_begun(out, manifest, coordinates=settings.coordinates, source=source, damping=settings.damping)
    train, sampled = None, None
    if settings.coordinates == "whitened":
        sampled = functools.partial(
            first_pass, out, manifest, corpus, model, setup, workers,
            examples=settings.whitening_examples, seed=settings.seed, note=bar.note, progress=progress,
        )  # fmt: skip
        train = TrainWhitening.kept_in(out, damping=settings.damping, source=source)
        if train is None:
            train = TrainWhitening.of_index(sampled(), damping=settings.damping, source=source)
        manifest = dataclasses.replace(manifest, coordinates=settings.coordinates, whitening=train.entry)
    return IndexJob(
        out=out, corpus=corpus, model=model, manifest=manifest, setup=setup, train=train, first_pass=sampled,
        workers=workers,
    )  # fmt: skip


def _estimated(
    model: LanguageModel,
    setup: SquaresSetup,
    workers: Workers,
    note: Callable[[str], None],
    examples: Sequence[TokenizedExample],
) -> SecondMoment:
    """V estimated from examples, by whoever computes."""
    parts = estimate_parts(examples, setup.kind)
    return mean_of_squares(workers.gradients(model, setup, _squares, parts, note=note), kind=setup.kind)


def _squares(squares: SquaredGradients, part: Sequence[TokenizedExample], advance: Advance) -> SummedSquares:
    return squares.sums(part)
