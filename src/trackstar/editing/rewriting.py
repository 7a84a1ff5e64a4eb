"""Rewrite the rows of existing indexes into a new one: all or some of them, in the same codec or
another.

Rows are copied shard by shard, in the order of the sources, which are not changed. An interrupted
run resumes after its last complete shard. In projected coordinates R_train is summed over the new
rows; in whitened coordinates W_train is unchanged.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from trackstar.corpus import TokenizedExample
from trackstar.corpus.digests import digest_of_parts
from trackstar.curvature.task import train_whitening
from trackstar.curvature.whitening import AnyWhitening
from trackstar.editing.duplicates import Rename, record_count
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
from trackstar.store.files.outputs import inputs, refuse_input_folder

# Rows decoded and encoded at a time.
_ROWS_AT_ONCE = 512
Recode = Callable[[StoredRows], StoredRows]


def check_apart(out: str | Place, sources: Sequence[Index]) -> None:
    """Raise if a new index's folder is one of its sources, lies in one or in another index, or
    holds one.

    Raises:
        OptionError: The folder and an index overlap.
    """
    for index in sources:
        if lies_in(out, index.path):
            raise OptionError(
                f"`out`: {out} is the index itself or lies in it ({index.path}); choose another folder, the existing "
                "index is not changed"
            )
    refuse_input_folder(out, [one for index in sources for one in inputs(index=index.path)])


def rewrite(
    sources: Sequence[Index],
    out: str | Place,
    manifest: Manifest,
    *,
    recode: Recode | None = None,
    keep: Callable[[TokenizedExample], bool] | None = None,
    rename: Rename | None = None,
    w_train: AnyWhitening | None = None,
    rows: int | None = None,
    title: str,
    progress: bool,
) -> Index:
    """Make the index that a manifest describes from rows of the sources.

    Args:
        sources: Indexes that the rows come from, in this order.
        out: Folder of the new index.
        manifest: Its manifest, unfinished.
        recode: Transforms rows; None copies their codes.
        keep: Selects examples; None takes all.
        rename: Renames examples; None renames none.
        w_train: W_train, if rows are whitened now; None is the first source's.
        rows: Number of rows of the new index, for the progress bar; None is the number of all rows
            of the sources.
        title: Title of the progress bar.
        progress: Whether progress is shown.

    Raises:
        OptionError: The new folder is one of the sources or lies in one.
    """
    check_apart(out, sources)
    total = sum(index.rows for index in sources) if rows is None else rows
    with (
        Progress(title, unit="examples", total=total, shown=progress) as bar,
        IndexWriter.open(out, manifest, on_note=bar.note) as writer,
    ):
        if not writer.completed:
            bar.resume(writer.resume_point.row)
            write_rows(writer, sources, recode=recode, keep=keep, rename=rename, w_train=w_train, bar=bar)
    return Index.open(out)


def write_rows(
    writer: IndexWriter,
    sources: Sequence[Index],
    *,
    recode: Recode | None = None,
    keep: Callable[[TokenizedExample], bool] | None = None,
    rename: Rename | None = None,
    w_train: AnyWhitening | None = None,
    bar: Progress,
) -> None:
    """Write rows of the sources, starting at the first missing shard, and finish the index.

    Args:
        writer: The new index.
        sources: Indexes that the rows come from, in this order.
        recode: Transforms rows; None copies their codes.
        keep: Selects examples; None takes all.
        rename: Renames examples; None renames none.
        w_train: W_train, if rows are whitened now; None is the first source's.
        bar: Progress bar, advanced by the rows of each shard.
    """
    manifest, first = writer.manifest, sources[0]
    if manifest.second_moment.digest is not None:
        writer.write_tensors("second_moment", first.tensors("second_moment"))
    r_train = None
    if manifest.whitening is None:
        r_train = RunningAutocorrelation(writer)
    else:
        whitening = w_train if w_train is not None else train_whitening(first)
        writer.write_tensors("whitening", whitening.tensors())
    pieces = _pieces(sources, keep, skip=writer.resume_point.row)
    for new_shard in _new_shards(pieces, manifest.shard_examples):
        content = new_shard.content(recode)
        if rename is not None:
            content = dataclasses.replace(content, examples=[rename(example) for example in content.examples])
        written = writer.write_shard(content)
        if r_train is not None:
            r_train.add(written)
        bar.advance(written.rows)
    if r_train is not None:
        r_train.write()
    writer.finish(records=sum(map(record_count, sources)), skipped=sum(map(_skipped_count, sources)))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Piece:
    """Rows of one source's shard, with their losses and examples.

    `skipped` counts the records without a token to score, of the new index, up to the start of the
    shard.
    """

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
            stored=StoredRows.concatenated(stored).contiguous(),
            losses=torch.cat([piece.losses for piece in self.pieces]),
            examples=[example for piece in self.pieces for example in piece.examples],
            next_record=last.record,
            next_window=last.window + 1,
            skipped=self.pieces[-1].skipped,
        )


def _pieces(
    sources: Sequence[Index], keep: Callable[[TokenizedExample], bool] | None, *, skip: int
) -> Iterator[_Piece]:
    """The selected rows in order, without the first `skip`; records are numbered through all sources."""
    records, skipped = 0, 0
    for index in sources:
        skipped_before = skipped
        for shard in index.shards:
            if keep is None and skip >= shard.rows:
                skip -= shard.rows
            else:
                examples = [stored.example for stored in shard.examples()]
                selected = [row for row, example in enumerate(examples) if keep is None or keep(example)]
                if skip < len(selected):
                    shard.check()  # else a damaged number would get a valid digest in the new index
                    yield _piece(shard, examples, selected[skip:], records, skipped_before)
                skip = max(0, skip - len(selected))
            skipped_before = skipped + shard.end.skipped
        records += record_count(index)
        skipped += _skipped_count(index)


def _piece(shard: Shard, examples: list[TokenizedExample], rows: list[int], records: int, skipped: int) -> _Piece:
    """The given rows of a shard; `records` is the number of records of the sources before this one."""
    stored = shard.stored
    whole = len(rows) == shard.rows
    selected = torch.tensor(rows)
    return _Piece(
        stored=stored if whole else stored[selected],
        losses=shard.losses[selected],
        examples=[dataclasses.replace(examples[row], record=examples[row].record + records) for row in rows],
        skipped=skipped,
    )


def _new_shards(pieces: Iterator[_Piece], shard_examples: int) -> Iterator[_NewShard]:
    """Cut and join pieces to shards of `shard_examples` rows; the last shard may have fewer."""
    pending: list[_Piece] = []
    count = 0
    for piece in pieces:
        first = 0
        while first < len(piece.examples):
            stop = min(len(piece.examples), first + shard_examples - count)
            pending.append(piece.cut(first, stop))
            count += stop - first
            first = stop
            if count == shard_examples:
                yield _NewShard(pieces=pending)
                pending, count = [], 0
    if pending:
        yield _NewShard(pieces=pending)


def _skipped_count(index: Index) -> int:
    """Number of records of an index that have no token to score."""
    completion = index.manifest.completion
    assert completion is not None, "an open index is finished"
    return completion.skipped


def names_digest(names: Iterable[str]) -> str:
    """BLAKE2b-128 of names, each prefixed with its length, so that different lists have different digests."""
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    parts = itertools.chain.from_iterable((str(len(name)).encode(), b":", name) for name in encoded)
    return digest_of_parts(parts)
