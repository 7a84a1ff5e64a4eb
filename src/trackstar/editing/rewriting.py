"""An index made from indexes that are there, without computing a gradient: joined, thinned, coded anew.

Rows are copied shard by shard into a new folder, in the order of the sources, so that the old indexes stay as they are
and an interrupted run goes on after its last whole shard. R_train of projected coordinates is summed over the new rows;
in whitened coordinates W_train stays what it was.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from trackstar.corpus import TokenizedExample
from trackstar.curvature.task import train_whitening
from trackstar.curvature.whitening import Whitening
from trackstar.editing.duplicates import records_of
from trackstar.errors import OptionError
from trackstar.indexing.shard_writing import RunningAutocorrelation
from trackstar.progress import Progress
from trackstar.store import (
    Index,
    IndexWriter,
    Manifest,
    Place,
    Shard,
    ShardContent,
    StoredRows,
    lies_in,
)

# Rows decoded, changed and coded at once.
_ROWS_AT_ONCE = 512
Recode = Callable[[StoredRows], StoredRows]


def rewrite_shards(
    index: Index, out: str | Place, manifest: Manifest, recode: Recode, *, title: str, progress: bool
) -> Index:
    """The index that a manifest describes, each row of another index recoded."""
    return rewrite([index], out, manifest, recode=recode, title=title, progress=progress)


def check_apart(out: str | Place, sources: Sequence[Index]) -> None:
    """See that a new index's folder is none of the indexes that it is made from, and in none of them.

    Raises:
        OptionError: It is.
    """
    for index in sources:
        if lies_in(out, index.path):
            raise OptionError(
                f"--out {out}: is the index itself or lies in it ({index.path}), expected another folder; the old one "
                "is left as it is"
            )


def rewrite(
    sources: Sequence[Index],
    out: str | Place,
    manifest: Manifest,
    *,
    recode: Recode | None = None,
    keep: Callable[[TokenizedExample], bool] | None = None,
    train: Whitening | None = None,
    rows: int | None = None,
    title: str,
    progress: bool,
) -> Index:
    """The index that a manifest describes, made of the sources' rows, all of them or those that are kept."""
    check_apart(out, sources)
    total = sum(index.rows for index in sources) if rows is None else rows
    with (
        Progress(title, unit="examples", total=total, shown=progress) as bar,
        IndexWriter.open(out, manifest, on_note=bar.note) as writer,
    ):
        if not writer.completed:
            bar.advance(writer.resume_point.row)
            write_rows_of(writer, sources, recode=recode, keep=keep, train=train, bar=bar)
    return Index.open(out)


def write_rows_of(
    writer: IndexWriter,
    sources: Sequence[Index],
    *,
    recode: Recode | None = None,
    keep: Callable[[TokenizedExample], bool] | None = None,
    train: Whitening | None = None,
    bar: Progress,
) -> None:
    """Write and finish an index of the rows of others, from the first shard that is missing.

    Args:
        writer: The new index.
        sources: Whose rows it gets, one index after the other.
        recode: Changes rows; None keeps their codes.
        keep: Which examples it gets; None is all.
        train: W_train, where the sources do not have it.
        bar: Told of each row.
    """
    manifest, first = writer.manifest, sources[0]
    if manifest.second_moment.digest is not None:
        writer.write_tensors("second_moment", first.tensors("second_moment"))
    r_train = None
    if manifest.whitening is None:
        r_train = RunningAutocorrelation(writer)
    else:
        whitening = train if train is not None else train_whitening(first)
        writer.write_tensors("whitening", {"whitening": whitening.factors})
    for shard in _packed(_pieces(sources, keep, skip=writer.resume_point.row), manifest.shard_examples):
        written = writer.write_shard(shard.content(recode))
        if r_train is not None:
            r_train.add(written)
        bar.advance(written.rows)
    if r_train is not None:
        writer.write_tensors("autocorrelation", {"autocorrelation": r_train.mean()})
    writer.finish(records=sum(map(records_of, sources)), skipped=sum(map(_skipped, sources)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Piece:
    """Rows of one source's shard, with what is needed to write them elsewhere."""

    stored: StoredRows
    losses: Tensor
    examples: list[TokenizedExample]
    skipped: int

    def cut(self, first: int, stop: int) -> "_Piece":
        part = slice(first, stop)
        return _Piece(
            stored=self.stored[part], losses=self.losses[part], examples=self.examples[part], skipped=self.skipped
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _NewShard:
    """The pieces of one new shard."""

    pieces: list[_Piece]

    def content(self, recode: Recode | None) -> ShardContent:
        stored = [piece.stored for piece in self.pieces]
        if recode is not None:
            stored = [
                recode(part[first : first + _ROWS_AT_ONCE])
                for part in stored
                for first in range(0, len(part), _ROWS_AT_ONCE)
            ]
        last = self.pieces[-1].examples[-1]
        return ShardContent(
            stored=StoredRows.joined(stored).contiguous(),
            losses=torch.cat([piece.losses for piece in self.pieces]),
            examples=[example for piece in self.pieces for example in piece.examples],
            next_record=last.record,
            next_window=last.window + 1,
            skipped=self.pieces[-1].skipped,
        )


def _pieces(
    sources: Sequence[Index], keep: Callable[[TokenizedExample], bool] | None, *, skip: int
) -> Iterator[_Piece]:
    """The sources' rows that are kept, in their order, records numbered through; the first `skip` are left out."""
    records, skipped = 0, 0
    for index in sources:
        begin = skipped
        for shard in index.shards:
            if keep is None and skip >= shard.rows:
                skip -= shard.rows
            else:
                examples = [stored.example for stored in shard.examples()]
                kept = [row for row, example in enumerate(examples) if keep is None or keep(example)]
                if skip < len(kept):
                    shard.check()  # or a damaged number would get a digest of its own
                    yield _piece(shard, examples, kept[skip:], records, begin)
                skip = max(0, skip - len(kept))
            begin = skipped + shard.end.skipped
        records += records_of(index)
        skipped += _skipped(index)


def _piece(shard: Shard, examples: list[TokenizedExample], rows: list[int], records: int, skipped: int) -> _Piece:
    stored = shard.stored
    whole = len(rows) == shard.rows
    chosen = torch.tensor(rows)
    return _Piece(
        stored=stored if whole else stored[chosen],
        losses=shard.losses[chosen],
        examples=[dataclasses.replace(examples[row], record=examples[row].record + records) for row in rows],
        skipped=skipped,
    )


def _packed(pieces: Iterator[_Piece], shard_examples: int) -> Iterator[_NewShard]:
    """Pieces cut and joined to shards of so many rows; the last may have fewer."""
    held: list[_Piece] = []
    count = 0
    for piece in pieces:
        first = 0
        while first < len(piece.examples):
            stop = min(len(piece.examples), first + shard_examples - count)
            held.append(piece.cut(first, stop))
            count += stop - first
            first = stop
            if count == shard_examples:
                yield _NewShard(pieces=held)
                held, count = [], 0
    if held:
        yield _NewShard(pieces=held)


def _skipped(index: Index) -> int:
    completion = index.manifest.completion
    assert completion is not None, "an open index is finished"
    return completion.skipped


def names_digest(names: Iterable[str]) -> str:
    """BLAKE2b-128 of names, each with its length, so that no two lists of names are alike."""
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    parts = itertools.chain.from_iterable((str(len(name)).encode(), b":", name) for name in encoded)
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def opened(index: Index | str | Place) -> Index:
    """The index itself, or the one at a path or URL, opened."""
    return index if isinstance(index, Index) else Index.open(index)
