"""An index job: the decisions that are made once for an index, then its shards, in one process or
several (Eq. 2-4).

`prepare` computes what is computed once for an index: V, and W_train for whitened coordinates.
`IndexJob.begin` writes what every shard depends on. `IndexJob.fill` writes the shards and completes
the index.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from trackstar.corpus import Corpus, TokenizedExample
from trackstar.corpus.marked_text import first_example
from trackstar.errors import DamagedIndexError, IncompleteIndexError
from trackstar.gradients.estimated_moment import SquaredGradients, SummedSquares, estimate_parts, mean_of_squares
from trackstar.gradients.projection import floored_entries
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, SecondMoment
from trackstar.indexing.groups import SampledGradients
from trackstar.indexing.machine import release_memory
from trackstar.indexing.provenance import make_manifest, second_moment_entry
from trackstar.indexing.second_moment import second_moment_for
from trackstar.indexing.settings import ChosenSettings
from trackstar.indexing.shard_writing import RowWork, rows_by, write_shards
from trackstar.indexing.train_whitening import FirstPass, TrainWhitening, check_begun, sample_source
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import (
    PART_FOLDER,
    Index,
    IndexWriter,
    Manifest,
    Place,
    load_manifest,
    refuse_foreign_folder,
    row_bytes,
)
from trackstar.workers.protocol import Advance, Workers
from trackstar.workers.setups import GradientSetup, SquaresSetup


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IndexJob:
    """An index whose rows are ready to be computed.

    Attributes:
        out: Folder of the index.
        corpus: Its examples.
        model: The model.
        manifest: Everything that decides its content.
        setup: How φ is computed.
        train: W_train; None for projected coordinates.
        first_pass: The pass that W_train comes from; None for projected coordinates.
        workers: Where φ is computed.
    """

    out: Place
    corpus: Corpus
    model: LanguageModel
    manifest: Manifest
    setup: GradientSetup
    train: TrainWhitening | None
    first_pass: FirstPass | None
    workers: Workers

    @property
    def row_work(self) -> RowWork:
        """Converts groups of examples to stored rows."""
        return RowWork.of(self.manifest, self.train.whitening if self.train is not None else None)

    def sampled(
        self, exclusive: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    ) -> SampledGradients | None:
        """The first pass's φ, which is not computed again; None for projected coordinates.

        Rows coded from a first pass's φ are equal to the bit only to rows coded from the same φ. So
        a missing or damaged first pass is repeated before any row is computed.

        Args:
            exclusive: Context that is held while it is repeated, if several processes build the
                same index.
        """
        if self.first_pass is None:
            return None
        with contextlib.suppress(DamagedIndexError, IncompleteIndexError):
            part = self.out / PART_FOLDER
            if load_manifest(part) is not None:
                index = Index.open(part)
                index.check()
                return SampledGradients(index)
        with exclusive():
            return SampledGradients(self.first_pass.run())

    def begin(self, writer: IndexWriter, bar: Progress) -> None:
        """Write what all shards depend on, and describe the index in notes."""
        moment = self.setup.second_moment
        bar.note(f"model: {self.model.architecture}, {self.model.described_coverage}")
        bar.note(f"second moment: {moment.source if moment.kind == 'none' else f'{moment.kind}, {moment.source}'}")
        manifest = self.manifest
        blocks = len(manifest.layer_blocks)
        kib = row_bytes(manifest.codec, manifest.dimensions, blocks) / 1024
        if self.train is None:
            r_train = f"R: at most {blocks * manifest.projection.side**4 * 4 / 2**20:,.1f} MiB"
        else:
            stored = sum(tensor.nbytes for tensor in self.train.whitening.tensors().values())
            r_train = f"W_train: {stored / 2**20:,.1f} MiB"
        bar.note(
            f"{manifest.coordinates}: {manifest.dimensions:,} dimensions, {manifest.codec}, {kib:,.1f} KiB per "
            f"example; {r_train}"
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
            writer.write_tensors("whitening", self.train.whitening.tensors())

    def fill(self, writer: IndexWriter, bar: Progress) -> None:
        """Write every missing shard, and complete the index."""
        make_rows = rows_by(self.workers, self.model, self.setup, self.row_work, bar)
        end = write_shards(writer, self.corpus, self.model, make_rows, sampled=self.sampled(), advance=bar.advance)
        if end.skipped:
            bar.note(f"{end.skipped} of {end.record} records have no token to score and were left out")
        writer.finish(records=end.record, skipped=end.skipped)


def prepare(
    out: Place,
    corpus: Corpus,
    model: LanguageModel,
    settings: ChosenSettings,
    *,
    workers: Workers,
    bar: Progress,
    progress: bool,
) -> IndexJob:
    """Compute V and W_train, or read them if an interrupted run has written them.

    Args:
        out: Folder of the index.
        corpus: Its examples.
        model: The model.
        settings: What the index is asked to be.
        workers: Where gradients are computed.
        bar: Receives notes.
        progress: Whether reading the corpus, V, the first pass and whitening show their own bars.

    Raises:
        StoreError: `out` is not empty, and not an index.
        IndexMismatchError: The index begun at `out` differs from the requested one.
        TrackstarError: V or R_train cannot be computed; see `trackstar.errors`.
    """
    refuse_foreign_folder(out)
    corpus.survey(progress=progress)
    manifest = make_manifest(model, corpus, NO_SECOND_MOMENT, settings, out=out)
    for line in corpus.survey().notes(corpus.name):
        bar.note(line)
    shown = first_example(corpus, model.tokenizer, manifest.windows.tokens, truncate=manifest.windows.truncate)
    if shown is not None:
        bar.note(shown)
    batch_tokens = settings.batch_tokens
    squares = SquaresSetup(manifest=manifest, kind=settings.second_moment_kind, batch_tokens=batch_tokens)
    moment = second_moment_for(
        settings, model, corpus, manifest.windows, out=out, note=bar.note,
        estimate=functools.partial(_estimated, model, squares, workers, bar.note), progress=progress,
    )  # fmt: skip
    manifest = dataclasses.replace(manifest, second_moment=second_moment_entry(moment))
    setup = GradientSetup(manifest=manifest, second_moment=moment, batch_tokens=batch_tokens)
    check_begun(out, manifest, settings)
    train, first_pass = None, None
    if settings.whitened:
        first_pass = FirstPass(
            out=out, manifest=manifest, corpus=corpus, model=model, setup=setup, workers=workers, settings=settings,
            progress=progress,
        )  # fmt: skip
        source = sample_source(settings.whitening_examples, settings.seed)
        train = TrainWhitening.written_in(out, damping=settings.damping, source=source)
        if train is None:
            sample = first_pass.run()
            release_memory()
            train = TrainWhitening.of_index(sample, damping=settings.damping, source=source, progress=progress)
            release_memory()
        manifest = dataclasses.replace(manifest, coordinates="whitened", whitening=train.entry)
    return IndexJob(
        out=out, corpus=corpus, model=model, manifest=manifest, setup=setup, train=train, first_pass=first_pass,
        workers=workers,
    )  # fmt: skip


def _estimated(
    model: LanguageModel,
    setup: SquaresSetup,
    workers: Workers,
    note: Callable[[str], None],
    examples: Sequence[TokenizedExample],
    advance: Advance,
) -> SecondMoment:
    """V estimated from examples by the workers."""
    parts = estimate_parts(examples, setup.kind)
    sums = workers.gradients(model, setup, _squares, parts, advance=advance, note=note)
    return mean_of_squares(sums, kind=setup.kind)


def _squares(squares: SquaredGradients, part: Sequence[TokenizedExample], advance: Advance) -> SummedSquares:
    return squares.sums(part, advance)
