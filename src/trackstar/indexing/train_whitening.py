"""W_train for a whitened index, from a first pass over a sample of the corpus; no gradient is computed twice (Eq. 2).

The sample's φ are kept, as an ordinary index in projected coordinates, within the index that is being made, until that
is finished: R_train is their mean of φφᵀ, and when the corpus is gone through their rows are taken from there. A corpus
no larger than the sample is its own sample. An interrupted first pass goes on where it was.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import final

from trackstar.choices import Coordinates
from trackstar.corpus import Corpus, Example
from trackstar.curvature.task import checked_matrices, stored_matrices
from trackstar.curvature.whitening import Whitening, shrinkage_damping, whitening
from trackstar.errors import DamagedIndexError, IndexMismatchError
from trackstar.indexing.shard_writing import RowWork, rows_by, write_shards
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import (
    PART_FOLDER,
    Index,
    IndexTensors,
    IndexWriter,
    Manifest,
    Place,
    WhiteningEntry,
    as_folder,
    check_same,
    load_manifest,
    tensors_digest,
)
from trackstar.workers.protocol import Workers
from trackstar.workers.setups import GradientSetup

_SHARD_EXAMPLES = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainWhitening:
    """W_train, and where it comes from.

    Attributes:
        entry: What the manifest says of it.
        whitening: W_train.
    """

    entry: WhiteningEntry
    whitening: Whitening

    @classmethod
    def of_index(cls, index: Index, *, damping: float | None, source: str) -> "TrainWhitening":
        """Of the R_train of an index in projected coordinates.

        Args:
            index: The index.
            damping: Fraction of a block's mean eigenvalue added to R_train; None is chosen by `shrinkage_damping`.
            source: Which examples these are.

        Raises:
            CurvatureError: R_train cannot be inverted.
        """
        r_train = stored_matrices(index, "autocorrelation")
        chosen = shrinkage_damping(r_train, index.rows) if damping is None else damping
        names = [block.name for block in index.manifest.layer_blocks]
        found = whitening(r_train, damping=chosen, names=names).rotated(index.manifest.projection.seed)
        digest = tensors_digest({"whitening": found.factors})
        return cls(entry=WhiteningEntry(source=source, damping=chosen, digest=digest), whitening=found)

    @classmethod
    def kept_in(cls, out: str | Place, *, damping: float | None, source: str) -> "TrainWhitening | None":
        """What an earlier run that made the index at `out` kept; None where there is none, or not of these examples.

        Args:
            out: The index's folder.
            damping: As asked for; None fits any.
            source: Which examples are asked for.
        """
        begun = load_manifest(out)
        entry = begun.whitening if begun is not None else None
        if begun is None or entry is None or entry.source != source or damping not in (None, entry.damping):
            return None
        with contextlib.suppress(DamagedIndexError):  # it is made again
            folder = as_folder(out)
            factors = checked_matrices(IndexTensors(folder).read("whitening", begun), "whitening", folder, begun)
            return cls(entry=entry, whitening=Whitening(factors=factors, triangular=False))
        return None


@final
class SampledCorpus:
    """Some examples of a corpus, with their own record numbers."""

    def __init__(self, name: str, examples: list[Example]) -> None:
        self.name = name
        self.drawn = examples

    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples of record `start` and later."""
        return (example for example in self.drawn if example.record >= start)


def sample_source(examples: int, seed: int) -> str:
    """How a manifest names the sample that R_train comes from."""
    return f"of up to {examples} records drawn with seed {seed}"


def check_begun(
    out: Place, manifest: Manifest, *, coordinates: Coordinates, source: str, damping: float | None
) -> None:
    """See that what was begun at `out` is what is asked for, before a first pass is computed for it.

    Args:
        out: Folder of the index that is to be made.
        manifest: What is asked for, in projected coordinates.
        coordinates: What is asked for.
        source: Which examples W_train is asked to come from.
        damping: As asked for; None fits any.

    Raises:
        IndexMismatchError: It is not; the message names the first field that differs.
    """
    begun = load_manifest(out)
    if begun is None:
        return
    entry = begun.whitening
    if coordinates == "whitened":
        asked = WhiteningEntry(source=source, damping=0.0, digest="") if entry is None else entry
        if entry is not None and (entry.source != source or damping not in (None, entry.damping)):
            wanted = source if damping is None else f"{source}, damping {damping:g}"
            raise IndexMismatchError(
                f"{out}: the index was made with whitening by R_train {entry.source}, damping {entry.damping:g}, but "
                f"{wanted} is asked for now; ask for the same, or choose another folder"
            )
        manifest = dataclasses.replace(manifest, coordinates=coordinates, whitening=asked)
    check_same(out, begun, manifest)


def first_pass(
    out: Place,
    manifest: Manifest,
    corpus: Corpus,
    model: LanguageModel,
    setup: GradientSetup,
    workers: Workers,
    *,
    examples: int,
    seed: int,
    note: Callable[[str], None],
    progress: bool,
) -> Index:
    """The gradients of a sample of a corpus, an index of its own; what an interrupted run has of it is taken up.

    Args:
        out: Folder of the index that is being made.
        manifest: That index's, in projected coordinates.
        corpus: Its corpus.
        model: The model.
        setup: How φ is made.
        workers: Who computes it.
        examples: How many records to draw.
        seed: Of the sample.
        note: Told what is done.
        progress: Whether progress is shown where stderr is a terminal.
    """
    source = sample_source(examples, seed)
    sample = dataclasses.replace(
        manifest, codec="float16", shard_examples=_SHARD_EXAMPLES, removed=f"all but {source}", completion=None
    )
    sampled = SampledCorpus(corpus.name, corpus.sample(examples, seed))
    folder = out / PART_FOLDER
    note(f"R_train: first pass over {len(sampled.drawn):,} records, {source}")
    with (
        Progress("First pass", unit="examples", total=len(sampled.drawn), shown=progress) as bar,
        IndexWriter.open(folder, sample, on_note=bar.note, whole=True) as writer,
    ):
        if not writer.completed:
            done = writer.resume_point.record
            bar.advance(sum(example.record < done for example in sampled.drawn))
            if setup.second_moment.kind != "none":
                writer.write_tensors("second_moment", setup.second_moment.tensors())
            make_rows = rows_by(workers, model, setup, RowWork.of(sample), bar)
            end = write_shards(writer, sampled, model, make_rows, advance=bar.advance)
            writer.finish(records=end.record, skipped=end.skipped)
    return Index.open(folder)
