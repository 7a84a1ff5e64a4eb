"""W_train of a whitened index, from a first pass over a sample of the corpus (Eq. 2).

The first pass stores the sample's φ as an index in projected coordinates, inside the folder of the
index that is being built, until that index is finished. R_train is the sample's mean of φφᵀ. When
the whole corpus is indexed, the sample's φ are read from the first pass, so that no gradient is
computed twice. A corpus no larger than the sample is its own sample. An interrupted first pass is
resumed.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import final

from trackstar.corpus import Corpus, Example
from trackstar.curvature.low_rank_whitening import LowRankWhitening
from trackstar.curvature.task import checked_whitening, train_autocorrelation
from trackstar.curvature.whitening import AnyWhitening
from trackstar.errors import DamagedIndexError, IndexMismatchError
from trackstar.indexing.settings import ChosenSettings
from trackstar.indexing.shard_writing import RowWork, check_resumed, rows_by, write_shards
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import (
    Index,
    IndexTensors,
    IndexWriter,
    Manifest,
    Place,
    WhiteningEntry,
    as_folder,
    check_same,
    load_manifest,
    part_folder,
    tensors_digest,
)
from trackstar.workers.protocol import Workers
from trackstar.workers.setups import GradientSetup

_SHARD_EXAMPLES = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainWhitening:
    """W_train and its source.

    Attributes:
        entry: Its entry in the manifest.
        whitening: W_train.
    """

    entry: WhiteningEntry
    whitening: AnyWhitening

    @classmethod
    def of_index(cls, index: Index, *, damping: float | None, source: str, progress: bool = False) -> "TrainWhitening":
        """W_train from the R_train of an index in projected coordinates.

        Args:
            index: The index.
            damping: Ridge added to R_train, as a fraction of its mean eigenvalue per block; None is
                chosen by `shrinkage_damping`.
            source: Description of the examples, for the manifest.
            progress: Whether progress is shown.

        Raises:
            CurvatureError: R_train cannot be inverted.
        """
        r_train = train_autocorrelation(index)
        chosen = r_train.shrinkage() if damping is None else damping
        names = [block.name for block in index.manifest.layer_blocks]
        seed = index.manifest.projection.seed
        with Progress("Whitening", unit="layer blocks", total=len(names), shown=progress) as bar:
            found = r_train.whitening(damping=chosen, names=names, rotation=seed, advance=bar.advance)
        rank = found.rank if isinstance(found, LowRankWhitening) else None
        digest = tensors_digest(found.tensors())
        return cls(entry=WhiteningEntry(source=source, damping=chosen, digest=digest, rank=rank), whitening=found)

    @classmethod
    def written_in(cls, out: str | Place, *, damping: float | None, source: str) -> "TrainWhitening | None":
        """W_train as an earlier run wrote it at `out`; None if there is none, it is damaged, or of
        other examples.

        Args:
            out: Folder of the index.
            damping: The requested damping; None accepts any.
            source: Description of the requested examples.
        """
        begun = load_manifest(out)
        entry = begun.whitening if begun is not None else None
        if begun is None or entry is None or entry.source != source or damping not in (None, entry.damping):
            return None
        with contextlib.suppress(DamagedIndexError):
            folder = as_folder(out)
            return cls(
                entry=entry, whitening=checked_whitening(IndexTensors(folder).read("whitening", begun), folder, begun)
            )
        return None


@final
class SampledCorpus:
    """Some examples of a corpus, with their record numbers in the corpus."""

    def __init__(self, name: str, examples: list[Example]) -> None:
        self.name = name
        self.drawn = examples

    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples from record number `start` on."""
        return (example for example in self.drawn if example.record >= start)


def sample_source(examples: int, seed: int) -> str:
    """Description of the sample that R_train is computed from, for the manifest."""
    return f"of up to {examples} records drawn with seed {seed}"


def check_begun(out: Place, manifest: Manifest, settings: ChosenSettings) -> None:
    """Raise if the index begun at `out` differs from the requested one, before its first pass is
    computed.

    Args:
        out: Folder of the index.
        manifest: The requested manifest, in projected coordinates.
        settings: What the index is asked to be.

    Raises:
        IndexMismatchError: The indexes differ; the message names the first field that does.
    """
    begun = load_manifest(out)
    if begun is None:
        return
    if settings.whitened:
        source = sample_source(settings.whitening_examples, settings.seed)
        entry, damping = begun.whitening, settings.damping
        requested = WhiteningEntry(source=source, damping=0.0, digest="", rank=None) if entry is None else entry
        if entry is not None and (entry.source != source or damping not in (None, entry.damping)):
            wanted = source if damping is None else f"{source}, damping {damping!r}"
            raise IndexMismatchError(
                f"{out}: the existing index is whitened by R_train {entry.source}, damping {entry.damping!r}, but "
                f"{wanted} was requested; use the same settings, or choose another folder"
            )
        manifest = dataclasses.replace(manifest, coordinates="whitened", whitening=requested)
    check_same(out, begun, manifest)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FirstPass:
    """The pass over a sample of a corpus that W_train is computed from.

    Attributes:
        out: Folder of the index that is being built.
        manifest: That index's manifest, in projected coordinates.
        corpus: Its corpus.
        model: The model.
        setup: How φ is computed.
        workers: Where φ is computed.
        settings: What the index is asked to be: the sample's size and seed.
        progress: Whether progress is shown.
    """

    out: Place
    manifest: Manifest
    corpus: Corpus
    model: LanguageModel
    setup: GradientSetup
    workers: Workers
    settings: ChosenSettings
    progress: bool

    def run(self) -> Index:
        """Compute the sample's φ, as an index of their own; resume what an interrupted run has begun."""
        examples, seed = self.settings.whitening_examples, self.settings.seed
        source = sample_source(examples, seed)
        manifest = dataclasses.replace(
            self.manifest, codec="float16", shard_examples=_SHARD_EXAMPLES, removed=f"all but {source}", completion=None
        )
        sample = SampledCorpus(self.corpus.name, self.corpus.sample(examples, seed, progress=self.progress))
        folder = part_folder(self.out)
        with (
            Progress("First pass", unit="examples", total=len(sample.drawn), shown=self.progress) as bar,
            IndexWriter.open(folder, manifest, on_note=bar.note, whole=True) as writer,
        ):
            bar.note(f"R_train: first pass over {len(sample.drawn):,} records, {source}")
            check_resumed(writer, self.model)
            if not writer.completed:
                done = writer.resume_point.record
                bar.resume(sum(example.record < done for example in sample.drawn))
                if self.setup.second_moment.kind != "none":
                    writer.write_tensors("second_moment", self.setup.second_moment.tensors())
                make_rows = rows_by(self.workers, self.model, self.setup, RowWork.of(manifest), bar)
                end = write_shards(writer, sample, self.model, make_rows, advance=bar.advance)
                writer.finish(records=end.record, skipped=end.skipped)
        return Index.open(folder)
