"""W_train for a whitened index, from a first pass over a sample of the corpus; no gradient is computed twice (Eq. 2).

The sample's φ are kept, as an ordinary index in projected coordinates, within the index that is being made, until that
is
finished: R_train is their mean of φφᵀ, and when the corpus is gone through their rows are taken from there. A corpus no
larger than the sample is its own sample. An interrupted first pass goes on where it was.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import final

from trackstar.curvature import Whitening, shrinkage_damping, whitening
from trackstar.errors import DamagedIndexError
from trackstar.examples import Corpus, Example
from trackstar.indexing import GradientProjector, RowMaker, write_shards
from trackstar.model import LanguageModel
from trackstar.progress import Progress
from trackstar.second_moment import SecondMoment
from trackstar.store import (
    PART_FOLDER,
    Index,
    IndexTensors,
    IndexWriter,
    Manifest,
    WhiteningEntry,
    load_manifest,
    tensors_digest,
)

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
        r_train = index.tensors("autocorrelation")["autocorrelation"]
        chosen = shrinkage_damping(r_train, index.rows) if damping is None else damping
        names = [block.name for block in index.manifest.layer_blocks]
        found = whitening(r_train, damping=chosen, names=names).rotated(index.manifest.projection.seed)
        digest = tensors_digest({"whitening": found.factors})
        return cls(entry=WhiteningEntry(source=source, damping=chosen, digest=digest), whitening=found)


@final
class SampledCorpus:
    """Some examples of a corpus, with their own record numbers."""

    def __init__(self, name: str, examples: list[Example]) -> None:
        self.name = name
        self.drawn = examples

    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples of record `start` and later."""
        return (example for example in self.drawn if example.record >= start)


def whitening_of_sample(
    out: Path,
    manifest: Manifest,
    corpus: Corpus,
    model: LanguageModel,
    moment: SecondMoment,
    projector: Callable[[], GradientProjector],
    *,
    examples: int,
    seed: int,
    damping: float | None,
    note: Callable[[str], None],
    progress: bool,
) -> TrainWhitening:
    """W_train from a sample of a corpus; what an interrupted run has of it is taken up.

    Args:
        out: Folder of the index that is being made.
        manifest: That index's, in projected coordinates.
        corpus: Its corpus.
        model: The model.
        moment: V.
        projector: Gives φ.
        examples: How many records to draw.
        seed: Of the sample.
        damping: See `TrainWhitening.of_index`.
        note: Told what is done.
        progress: Whether progress is shown where stderr is a terminal.
    """
    source = f"of up to {examples} records drawn with seed {seed}"
    begun = load_manifest(out)
    entry = begun.whitening if begun is not None else None
    if begun is not None and entry is not None and entry.source == source and damping in (None, entry.damping):
        with contextlib.suppress(DamagedIndexError):  # it is made again
            kept = IndexTensors(out).read("whitening", begun)
            return TrainWhitening(entry=entry, whitening=Whitening(factors=kept["whitening"], triangular=False))
    sample = dataclasses.replace(
        manifest, codec="float16", shard_examples=_SHARD_EXAMPLES, removed=f"all but {source}", completion=None
    )
    sampled = SampledCorpus(corpus.name, corpus.sample(examples, seed))
    folder = out / PART_FOLDER
    note(f"R_train: first pass over {len(sampled.drawn):,} records, {source}")
    with (
        Progress("First pass", unit="examples", total=len(sampled.drawn), shown=progress) as bar,
        IndexWriter.open(folder, sample, on_note=bar.note) as writer,
    ):
        if not writer.completed:
            done = writer.resume_point.record
            bar.advance(sum(example.record < done for example in sampled.drawn))
            if moment.kind != "none":
                writer.write_tensors("second_moment", moment.tensors())
            with projector() as opened:
                end = write_shards(writer, sampled, model, RowMaker(opened, sample), advance=bar.advance)
            writer.finish(records=end.record, skipped=end.skipped)
    return TrainWhitening.of_index(Index.open(folder), damping=damping, source=source)
