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

from trackstar.correction import train_spectrum, train_whitening
from trackstar.counted_once import check_disjoint, records_of
from trackstar.curvature import Whitening
from trackstar.errors import IndexMismatchError, OptionError
from trackstar.examples import TokenizedExample
from trackstar.first_pass import TrainWhitening
from trackstar.indexing import RunningAutocorrelation
from trackstar.progress import Progress
from trackstar.store import (
    CodecName,
    Index,
    IndexWriter,
    Manifest,
    Place,
    Shard,
    ShardContent,
    StoredRows,
    check_codec,
    check_quantizable,
    codec_bits,
    differences,
    encode,
    lies_in,
)
from trackstar.store.strict_json import abridged

# Rows decoded, changed and coded at once.
_ROWS_AT_ONCE = 512
_MERGED_FIELDS = ("corpora", "removed", "shard_examples", "trackstar_version", "format_version")

Recode = Callable[[StoredRows], StoredRows]


def merge_indexes(indexes: Sequence[Index | str | Place], out: str | Place, *, progress: bool = True) -> Index:
    """One index of all the examples of several, which were made alike but of other corpora.

    A run that was interrupted goes on when the same call is made again; a finished index is opened.

    Args:
        indexes: Two or more, their examples in this order.
        out: The new index's folder.
        progress: Whether progress is shown where stderr is a terminal.

    Raises:
        IndexMismatchError: They were not made alike; the message names the first field that differs.
        OptionError: There are fewer than two, or the new folder is one of them or in one.
        TrackstarError: An index cannot be read or written; see `trackstar.errors`.
    """
    opened = [_opened(index) for index in indexes]
    if len(opened) < 2:
        raise OptionError(f"merge: found {len(opened)} index, expected two or more")
    check_apart(out, opened)
    first = opened[0].manifest
    for index in opened:
        alike = dataclasses.replace(index.manifest, **{field: getattr(first, field) for field in _MERGED_FIELDS})
        different = differences(alike, first)
        if different:
            field, found, expected = different[0]
            raise IndexMismatchError(
                f"{index.path}: made with {field} {abridged(found)}, but {opened[0].path} with {abridged(expected)}; "
                "only indexes that were made alike can be merged: make the later one with `trackstar add`"
            )
    check_disjoint(opened)
    manifest = joined_manifest([index.manifest for index in opened], [records_of(index) for index in opened])
    return _rewrite(opened, out, manifest, title="Merging", progress=progress)


def joined_manifest(manifests: Sequence[Manifest], records: Sequence[int]) -> Manifest:
    """What an index is made with that has the examples of several that were made alike, in this order.

    Args:
        manifests: Theirs.
        records: How many records were read for each; the last may be left out.
    """
    starts = itertools.accumulate(records, initial=0)
    corpora = [
        dataclasses.replace(corpus, first_record=corpus.first_record + start)
        for manifest, start in zip(manifests, starts)  # noqa: B905 - there may be a start after the last
        for corpus in manifest.corpora
    ]
    removed = [manifest.removed for manifest in manifests if manifest.removed is not None]
    return dataclasses.replace(
        manifests[0], corpora=tuple(corpora), removed=_names_digest(removed) if removed else None, completion=None
    )


def remove_examples(
    index: Index | str | Place, names: Iterable[str], out: str | Place, *, progress: bool = True
) -> Index:
    """The index without some of its examples: those of these names, and windows of documents of these names.

    Args:
        index: The index.
        names: Of examples or documents.
        out: The new index's folder.
        progress: Whether progress is shown where stderr is a terminal.

    Raises:
        OptionError: A name is not in the index, none would be left, or the new folder is the index or in it.
        TrackstarError: An index cannot be read or written; see `trackstar.errors`.
    """
    index = _opened(index)
    check_apart(out, [index])
    wanted = set(names)
    there = set()
    left = 0
    for stored in index.examples():
        found = wanted & {stored.example.example_id, stored.example.parent_id}
        there |= found
        left += not found
    unknown = sorted(wanted - there)
    if unknown or not wanted:
        what = (
            f"{len(unknown)} names that are not examples of it, such as {abridged(unknown[0])}"
            if unknown
            else "no name"
        )
        raise OptionError(f"{index.path}: found {what}; expected names of its examples or documents")
    if not left:
        raise OptionError(f"{index.path}: all of its {index.rows} examples would be removed; expected some to be left")
    before = [] if index.manifest.removed is None else [index.manifest.removed]
    manifest = dataclasses.replace(index.manifest, removed=_names_digest([*before, *sorted(wanted)]), completion=None)
    return _rewrite(
        [index],
        out,
        manifest,
        keep=lambda example: not wanted & {example.example_id, example.parent_id},
        rows=left,
        title="Removing",
        progress=progress,
    )


def convert_index(
    index: Index | str | Place,
    out: str | Place,
    *,
    codec: CodecName,
    damping: float | None = None,
    progress: bool = True,
) -> Index:
    """The index with its rows stored by another codec; whitened first by its own R_train for int8 and fewer bits.

    Args:
        index: In projected coordinates, or in whitened ones of a codec of at least as many bits.
        out: The new index's folder.
        codec: The new codec.
        damping: Fraction of a block's mean eigenvalue added to R_train where the rows are whitened; None is chosen by
            `shrinkage_damping`.
        progress: Whether progress is shown where stderr is a terminal.

    Raises:
        OptionError: The codec is unknown or needs more bits than are there, a damping is given for an index that is
            whitened, or the new folder is the index or in it.
        TrackstarError: An index cannot be read or written; see `trackstar.errors`.
    """
    index = _opened(index)
    check_apart(out, [index])
    old = index.manifest
    check_codec(codec)
    check_quantizable(codec, old.projection.side)
    if codec_bits(codec) > codec_bits(old.codec):
        raise OptionError(
            f"--codec {codec}: {index.path} keeps {old.codec}, which does not hold what {codec} would; index again, or "
            "take a codec of no more bits"
        )
    train: Whitening | None = None
    manifest = dataclasses.replace(old, codec=codec, completion=None)
    if old.whitening is None and codec_bits(codec) <= 8:
        source = f"of all {index.rows} examples of the index"
        made = TrainWhitening.kept_in(out, damping=damping, source=source)
        if made is None:
            made = TrainWhitening.of_index(index, damping=damping, source=source)
        train = made.whitening
        manifest = dataclasses.replace(manifest, coordinates="whitened", whitening=made.entry)
    elif damping is not None:
        raise OptionError(f"--damping {damping}: {index.path} with --codec {codec} is not whitened anew; leave it out")
    blocks = len(old.layer_blocks)

    def recode(stored: StoredRows) -> StoredRows:
        values = stored.decode()
        if train is not None:
            return encode(train.apply(values), codec, blocks)
        # Norms stay those of the rows before they were coded at all.
        return dataclasses.replace(encode(values, codec, blocks), norms=stored.norms)

    spectrum = train_spectrum(index) if index.load_derived("train-spectrum") is not None else None
    made_index = _rewrite([index], out, manifest, recode=recode, train=train, title="Converting", progress=progress)
    if spectrum is not None:
        made_index.save_derived("train-spectrum", {"values": spectrum})
    return made_index


def rewrite_shards(
    index: Index, out: str | Place, manifest: Manifest, recode: Recode, *, title: str, progress: bool
) -> Index:
    """The index that a manifest describes, each row of another index recoded."""
    return _rewrite([index], out, manifest, recode=recode, title=title, progress=progress)


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


def _rewrite(
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


def _names_digest(names: Iterable[str]) -> str:
    """BLAKE2b-128 of names, each with its length, so that no two lists of names are alike."""
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    parts = itertools.chain.from_iterable((str(len(name)).encode(), b":", name) for name in encoded)
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _opened(index: Index | str | Place) -> Index:
    return index if isinstance(index, Index) else Index.open(index)
