"""Reading an index: any number of processes at once, also while it is being written."""

import bisect
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import final

import psutil
import torch
from jaxtyping import Float32
from torch import Tensor

from trackstar.errors import DamagedIndexError, IncompleteIndexError, StoreError
from trackstar.store.codecs import StoredRows
from trackstar.store.derived_cache import DerivedCache
from trackstar.store.direct_reads import direct_rows
from trackstar.store.files.durable import exists
from trackstar.store.files.places import Place, as_folder
from trackstar.store.files.read_ahead import each, read_ahead
from trackstar.store.index_tensors import IndexTensors
from trackstar.store.manifest import Manifest, load_manifest, shard_file_name
from trackstar.store.shard_content import ShardPlan
from trackstar.store.shards import Shard, StoredExample, open_shard
from trackstar.store.tensor_file import map_tensor

# Read at once where the page cache is passed by.
_DIRECT_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CodeChunk:
    """Consecutive rows of one shard, their codes memory-mapped or in a buffer.

    Attributes:
        first_row: The index's row of the first.
        stored: The rows.
    """

    first_row: int
    stored: StoredRows


@final
class Index:
    """An index that has been opened for reading. Made by `open`.

    Opening checks each file's size and header, not its data; `verify` checks every byte.
    """

    def __init__(
        self, path: Place, manifest: Manifest, shards: tuple[Shard, ...], *, direct_reads: bool | None = None
    ) -> None:
        self._path = path
        self._remote = not isinstance(path, Path)
        self._manifest = manifest
        self._shards = shards
        self._starts = [shard.first_row for shard in shards]
        self._tensors = IndexTensors(path)
        self._maps: dict[int, tuple[object, Tensor]] = {}
        self._derived = DerivedCache(path / "derived", manifest)
        codes = sum(shard.file.places["codes"].stop - shard.file.places["codes"].start for shard in shards)
        # Codes that fit into memory stay there from one pass to the next.
        self._direct = codes > psutil.virtual_memory().available if direct_reads is None else direct_reads

    @classmethod
    def open(cls, path: str | Place, *, allow_incomplete: bool = False, direct_reads: bool | None = None) -> "Index":
        """Open the index at `path`.

        Args:
            path: The index's folder, here or on another file system: a path, a URL or a `upath.UPath`.
            allow_incomplete: Whether an unfinished index will do; it has the shards that are there now, up to
                the first that is missing or damaged.
            direct_reads: Whether passes over all rows read past the page cache instead of mapping the files; None is
                where the codes are larger than the memory that is free. Other file systems are always read ahead.

        Raises:
            IncompleteIndexError: Its making was interrupted, or still goes on.
            DamagedIndexError: A file of it is missing, cut off, or not what the manifest says.
            StoreError: There is no index.
        """
        folder = as_folder(path)
        manifest = load_manifest(folder)
        if manifest is None:
            raise StoreError(
                f"{folder}: no index is there (no manifest.json); give the folder of `trackstar index --out`"
            )
        if manifest.completion is None:
            shards = _shards_so_far(folder, manifest)
            if not allow_incomplete:
                raise IncompleteIndexError(
                    f"{folder}: the index is not finished, {len(shards)} shards with "
                    f"{sum(shard.rows for shard in shards)} examples are there; "
                    "run the command that began it again to finish it"
                )
            return cls(folder, manifest, shards, direct_reads=direct_reads)
        plan = ShardPlan.of(manifest)
        entries = manifest.completion.shards

        def opened(number: int) -> Shard:
            return open_shard(folder / "shards" / entries[number].file, plan, number, entries[number])

        shards = each(opened, range(len(entries)), at_once=not isinstance(folder, Path))
        index = cls(folder, manifest, tuple(shards), direct_reads=direct_reads)
        index._tensors.check(manifest, whole=False)
        return index

    @property
    def path(self) -> Place:
        """The index's folder: a `Path`, or a `upath.UPath` on another file system."""
        return self._path

    @property
    def manifest(self) -> Manifest:
        """What the index was made with."""
        return self._manifest

    @property
    def rows(self) -> int:
        """Number of examples."""
        return sum(shard.rows for shard in self._shards)

    def part(self, shards: range) -> "Index":
        """Some consecutive shards of this index, their rows numbered as they are here."""
        return Index(self._path, self._manifest, self._shards[shards.start : shards.stop], direct_reads=self._direct)

    @property
    def dimensions(self) -> int:
        """Number of dimensions of a projected gradient."""
        return self._manifest.dimensions

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards, in the order of the rows."""
        return self._shards

    def example(self, row: int) -> StoredExample:
        """The example at `row`; only its own bytes are read.

        Raises:
            DamagedIndexError: Its bytes are not what was written.
        """
        shard = self._shards[bisect.bisect_right(self._starts, row) - 1]
        assert 0 <= row - shard.first_row < shard.rows, row
        return shard.example(row - shard.first_row)

    def some_examples(self, rows: Sequence[int]) -> list[StoredExample]:
        """The examples of a few rows, in the order given; from another file system several at the same time.

        Raises:
            DamagedIndexError: Their bytes are not what was written.
        """
        return each(self.example, rows, at_once=self._remote)

    def examples(self) -> Iterator[StoredExample]:
        """Every example in the order of the rows; one shard's tokens and texts are in memory at a time.

        Raises:
            DamagedIndexError: Their bytes are not what was written.
        """
        for shard in self._shards:
            yield from shard.examples()

    def iterate(self, rows_per_chunk: int) -> Iterator[CodeChunk]:
        """All rows in the order of the rows, in chunks of at most `rows_per_chunk` rows of one shard each.

        A chunk may be used until the next is asked for.
        """
        assert rows_per_chunk >= 1, rows_per_chunk
        if self._remote:
            yield from self._iterate_remote(rows_per_chunk)
            return
        for shard in self._shards:
            first, scales, norms = 0, shard.scales, shard.norms
            for codes in self._codes(shard, rows_per_chunk):
                for start in range(0, len(codes), rows_per_chunk):
                    part = codes[start : start + rows_per_chunk]
                    rows = slice(first, first + len(part))
                    stored = StoredRows(codec=shard.codec, codes=part, scales=scales[rows], norms=norms[rows])
                    yield CodeChunk(first_row=shard.first_row + first, stored=stored)
                    first += len(part)

    def _iterate_remote(self, rows_per_chunk: int) -> Iterator[CodeChunk]:
        """The chunks of a mapped index, read ahead from one shard into the next."""

        def read(shard: Shard, rows: range) -> tuple[int, StoredRows]:
            return shard.first_row + rows.start, shard.some(rows)

        reads = (
            functools.partial(read, shard, rows) for shard in self._shards for rows in shard.ranges(rows_per_chunk)
        )
        for first_row, stored in read_ahead(reads):
            for start in range(0, len(stored), rows_per_chunk):
                yield CodeChunk(first_row=first_row + start, stored=stored[start : start + rows_per_chunk])

    def _codes(self, shard: Shard, rows_per_chunk: int) -> Iterator[Tensor]:
        """A shard's codes in one mapped part, or in several of whole chunks that are read."""
        if not self._direct:
            yield self._mapped(shard)
            return
        place = shard.file.places["codes"]
        chunk_bytes = rows_per_chunk * (place.stop - place.start) // shard.rows
        yield from direct_rows(shard.file, "codes", rows_per_chunk * max(1, _DIRECT_BYTES // chunk_bytes))

    def _mapped(self, shard: Shard) -> Tensor:
        """A shard's codes, mapped once for all passes as long as the file stays what it was: each page costs time."""
        try:
            found = os.stat(str(shard.path))
            state = (found.st_ino, found.st_size, found.st_mtime_ns)
        except OSError:
            state = None  # mapping says what is wrong
        kept = self._maps.get(shard.number)
        if kept is None or kept[0] != state:
            kept = self._maps[shard.number] = (state, map_tensor(shard.file, "codes"))
        return kept[1]

    def some_rows(self, rows: Sequence[int]) -> StoredRows:
        """A few rows, ascending, in memory."""
        parts = each(lambda part: part[0].some(part[1]), self._by_shard(rows), at_once=self._remote)
        return StoredRows.joined(parts)

    def some_losses(self, rows: Sequence[int]) -> Float32[Tensor, "some"]:
        """Losses of a few rows, ascending: summed cross-entropy of the target tokens, in nats."""
        parts = self._by_shard(rows)
        return torch.cat(each(lambda part: part[0].losses[torch.tensor(part[1])], parts, at_once=self._remote))

    def _by_shard(self, rows: Sequence[int]) -> list[tuple[Shard, list[int]]]:
        """The shards that hold rows, ascending, each with its own, counted from its first."""
        parts = []
        for shard in self._shards:
            first, last = (bisect.bisect_left(rows, row) for row in (shard.first_row, shard.first_row + shard.rows))
            if first < last:
                parts.append((shard, [row - shard.first_row for row in rows[first:last]]))
        return parts

    def check(self) -> None:
        """Compare every byte of shards and tensors with their digests.

        Raises:
            DamagedIndexError: They are not what was written.
        """
        for shard in self._shards:
            shard.check()
        self._tensors.check(self._manifest, whole=True)

    def norms(self) -> Float32[Tensor, "rows"]:
        """Euclidean norm of every row's coordinates before they were coded."""
        return torch.cat(each(lambda shard: shard.norms, self._shards, at_once=self._remote))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """`second_moment`, `autocorrelation` or `whitening`, checked against its digest, memory-mapped.

        Raises:
            DamagedIndexError: It is missing or not what was written.
        """
        return self._tensors.read(name, self._manifest)

    def load_derived(self, key: str) -> dict[str, Tensor] | None:
        """What `save_derived` kept under `key`, checked against its digest; None where it is not there, or damaged.

        It counts only for the very index that it was computed from, and only for a finished one.
        """
        return self._derived.load(key)

    def without_derived(self) -> "Index":
        """The same index, none of whose derived files is read or written: everything is computed anew."""
        index = Index(self._path, self._manifest, self._shards, direct_reads=self._direct)
        index._derived = DerivedCache(index._path / "derived", dataclasses.replace(self._manifest, completion=None))
        return index

    def save_derived(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Keep what was computed from the index, under `key` (letters, digits, `.`, `_`, `-`).

        Returns:
            Whether it was kept. It is not where the index is unfinished or its folder cannot be written: the caller
            goes on with what it has computed.
        """
        return self._derived.save(key, tensors)


def _shards_so_far(folder: Place, manifest: Manifest) -> tuple[Shard, ...]:
    plan = ShardPlan.of(manifest)
    shards: list[Shard] = []
    for number in itertools.count():
        path = folder / "shards" / shard_file_name(number)
        if not exists(path):
            break
        try:
            shards.append(open_shard(path, plan, number))
        except DamagedIndexError:
            break  # whoever finishes the index makes it again, or has taken it away between the two
        if shards[-1].rows < manifest.shard_examples:
            break
    return tuple(shards)
