"""Read an index: from any number of processes at the same time, even while it is being written."""

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

from trackstar.errors import DamagedIndexError, IncompleteIndexError
from trackstar.store.block_checksums import ComparedBlocks
from trackstar.store.codecs import StoredRows
from trackstar.store.derived_cache import DerivedCache
from trackstar.store.direct_reads import direct_rows
from trackstar.store.files.durable import exists
from trackstar.store.files.places import Place, as_folder
from trackstar.store.files.read_ahead import read_ahead, read_each
from trackstar.store.index_tensors import IndexTensors
from trackstar.store.manifest import FORMAT_VERSION, OLDEST_FORMAT_VERSION, Manifest, load_manifest, shard_file_name
from trackstar.store.shard_content import ShardPlan
from trackstar.store.shard_files import open_shard
from trackstar.store.shard_folder import no_index
from trackstar.store.shards import Shard, StoredExample
from trackstar.store.tensor_reading import compare_mapped, map_tensor

_DIRECT_BYTES = 16 << 20
"""Size of a part that is read without the page cache."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CodeChunk:
    """Consecutive rows of one shard; their codes are memory-mapped or in a buffer.

    Attributes:
        first_row: Row in the index of the first one.
        stored: The rows.
    """

    first_row: int
    stored: StoredRows


@final
class Index:
    """An index that is open for reading; `Index.open` opens one.

    Opening checks each file's size and header. What is read later is compared with the checksums of
    its blocks. `verify` checks every byte.
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
        self._maps: dict[int, _MappedCodes] = {}
        self._derived = DerivedCache(path / "derived", manifest)
        code_bytes = sum(shard.file.tensors["codes"].size for shard in shards)
        # Codes that fit into memory stay in the page cache from one pass to the next.
        self._direct = code_bytes > psutil.virtual_memory().available if direct_reads is None else direct_reads

    @classmethod
    def open(cls, path: str | Place, *, allow_incomplete: bool = False, direct_reads: bool | None = None) -> "Index":
        """Open the index at `path`.

        Args:
            path: Folder of the index: a path, a URL or a `upath.UPath`.
            allow_incomplete: Whether to open an unfinished index, with its shards up to the first
                that is missing or damaged.
            direct_reads: Whether passes over all rows bypass the page cache instead of mapping the
                files. None bypasses it if the codes are larger than the free memory. Other file
                systems are always read ahead.

        Raises:
            IncompleteIndexError: The index is not finished.
            DamagedIndexError: A file is missing or cut off, or does not agree with the manifest.
            StoreError: There is no index at `path`.
        """
        folder = as_folder(path)
        manifest = load_manifest(folder)
        if manifest is None:
            raise no_index(folder)
        if manifest.completion is None:
            shards = _shards_so_far(folder, manifest)
            if not allow_incomplete:
                advice = "make it again with the same settings to finish it"
                if manifest.format_version < FORMAT_VERSION:
                    advice = f"finish it with trackstar {manifest.trackstar_version}, or build it in another folder"
                raise IncompleteIndexError(
                    f"{folder}: the index is not finished ({len(shards)} shards with "
                    f"{sum(shard.rows for shard in shards)} examples so far); {advice}"
                )
            return cls(folder, manifest, shards, direct_reads=direct_reads)
        plan = ShardPlan.of(manifest)
        entries = manifest.completion.shards

        def open_number(number: int) -> Shard:
            return open_shard(folder / "shards" / entries[number].file, plan, number, entries[number])

        shards = read_each(open_number, range(len(entries)), parallel=not isinstance(folder, Path))
        index = cls(folder, manifest, tuple(shards), direct_reads=direct_reads)
        index._tensors.check(manifest, whole=False)
        return index

    @classmethod
    def of(
        cls, index: "Index | str | Place", *, allow_incomplete: bool = False, direct_reads: bool | None = None
    ) -> "Index":
        """The index itself if it is open, else the index at this path or URL, opened as by `open`."""
        if isinstance(index, Index):
            return index
        return cls.open(index, allow_incomplete=allow_incomplete, direct_reads=direct_reads)

    @property
    def path(self) -> Place:
        """Folder of the index: a `Path`, or a `upath.UPath` on another file system."""
        return self._path

    @property
    def manifest(self) -> Manifest:
        """The manifest."""
        return self._manifest

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user of the index should know, one line each; nothing for an index of the current format."""
        version, copy = self._manifest.format_version, f'`convert_index` with `codec="{self._manifest.codec}"`'
        if version == OLDEST_FORMAT_VERSION:
            return (
                f"{self._path}: format version {version} has no checksums of what is read, and does not record the "
                f"model's configuration; {copy} copies it into the current format, with checksums",
            )
        if self._manifest.model.configuration:
            return ()
        return (
            f"{self._path}: does not record the model's configuration, as it comes from an index of format "
            "version 3; only losses tell whether it is the same",
        )

    @property
    def rows(self) -> int:
        """Number of examples."""
        return sum(shard.rows for shard in self._shards)

    def part(self, shards: range) -> "Index":
        """Consecutive shards of this index; their rows keep their numbers."""
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
        """The example at `row`; only its bytes are read.

        Raises:
            DamagedIndexError: Its bytes are damaged.
        """
        shard = self._shards[bisect.bisect_right(self._starts, row) - 1]
        assert 0 <= row - shard.first_row < shard.rows, row
        return shard.example(row - shard.first_row)

    def some_examples(self, rows: Sequence[int]) -> list[StoredExample]:
        """The examples at some rows, in the order of `rows`; read in parallel from another file system.

        Raises:
            DamagedIndexError: Their bytes are damaged.
        """
        return read_each(self.example, rows, parallel=self._remote)

    def examples(self) -> Iterator[StoredExample]:
        """All examples in the order of the rows, with one shard's tokens and texts in memory at a time.

        Raises:
            DamagedIndexError: Their bytes are damaged.
        """
        for shard in self._shards:
            yield from shard.examples()

    def iterate(self, rows_per_chunk: int) -> Iterator[CodeChunk]:
        """All rows in order, in chunks of at most `rows_per_chunk` rows of one shard.

        A chunk is valid until the next one is requested.
        """
        assert rows_per_chunk >= 1, rows_per_chunk
        if self._remote:
            yield from self._iterate_remote(rows_per_chunk)
            return
        for shard in self._shards:
            first, scales, norms = 0, shard.scales, shard.norms
            for codes, compared in self._codes(shard, rows_per_chunk):
                for start in range(0, len(codes), rows_per_chunk):
                    part = codes[start : start + rows_per_chunk]
                    if compared is not None:
                        compare_mapped(shard.file, codes, start, start + len(part), compared)
                    rows = slice(first, first + len(part))
                    stored = StoredRows(codec=shard.codec, codes=part, scales=scales[rows], norms=norms[rows])
                    yield CodeChunk(first_row=shard.first_row + first, stored=stored)
                    first += len(part)

    def _iterate_remote(self, rows_per_chunk: int) -> Iterator[CodeChunk]:
        """The same chunks as from a local index, read ahead across shards."""

        def read(shard: Shard, rows: range) -> tuple[int, StoredRows]:
            return shard.first_row + rows.start, shard.some(rows)

        reads = (
            functools.partial(read, shard, rows) for shard in self._shards for rows in shard.ranges(rows_per_chunk)
        )
        for first_row, stored in read_ahead(reads):
            for start in range(0, len(stored), rows_per_chunk):
                yield CodeChunk(first_row=first_row + start, stored=stored[start : start + rows_per_chunk])

    def _codes(self, shard: Shard, rows_per_chunk: int) -> Iterator[tuple[Tensor, ComparedBlocks | None]]:
        """A shard's codes: one mapped part, or parts of whole chunks that are read without the page cache.

        The second item says which blocks of a mapped part were compared with their checksums; it is
        None for codes that have none, or that were compared when they were read.
        """
        if not self._direct:
            mapped = self._mapped(shard)
            yield mapped.codes, mapped.compared
            return
        chunk_bytes = rows_per_chunk * shard.file.tensors["codes"].size // shard.rows
        for part in direct_rows(shard.file, "codes", rows_per_chunk * max(1, _DIRECT_BYTES // chunk_bytes)):
            yield part, None

    def _mapped(self, shard: Shard) -> "_MappedCodes":
        """A shard's codes, mapped once for all passes (until the file changes), since mapping costs time."""
        try:
            status = os.stat(str(shard.path))
            state = (status.st_ino, status.st_size, status.st_mtime_ns)
        except OSError:
            state = None  # `map_tensor` reports the problem
        mapped = self._maps.get(shard.number)
        if mapped is None or mapped.state != state:
            codes = map_tensor(shard.file, "codes")
            mapped = _MappedCodes(state=state, codes=codes, compared=shard.compared_blocks())
            self._maps[shard.number] = mapped
        return mapped

    def some_rows(self, rows: Sequence[int]) -> StoredRows:
        """Some rows, ascending, in memory."""
        parts = read_each(lambda part: part[0].some(part[1]), self._by_shard(rows), parallel=self._remote)
        return StoredRows.concatenated(parts)

    def some_norms(self, rows: Sequence[int]) -> Float32[Tensor, "some"]:
        """Euclidean norms of some rows before encoding, the rows ascending."""
        parts = self._by_shard(rows)
        return torch.cat(read_each(lambda part: part[0].norms[torch.tensor(part[1])], parts, parallel=self._remote))

    def some_losses(self, rows: Sequence[int]) -> Float32[Tensor, "some"]:
        """Losses of some rows, ascending: summed cross-entropy of the target tokens, in nats."""
        parts = self._by_shard(rows)
        return torch.cat(read_each(lambda part: part[0].losses[torch.tensor(part[1])], parts, parallel=self._remote))

    def _by_shard(self, rows: Sequence[int]) -> list[tuple[Shard, list[int]]]:
        """The shards that hold some of the rows, each with these rows counted from the shard's first row."""
        parts = []
        for shard in self._shards:
            first, last = (bisect.bisect_left(rows, row) for row in (shard.first_row, shard.first_row + shard.rows))
            if first < last:
                parts.append((shard, [row - shard.first_row for row in rows[first:last]]))
        return parts

    def check(self) -> None:
        """Compare all bytes of shards and tensors with their digests.

        Raises:
            DamagedIndexError: A byte is damaged.
        """
        for shard in self._shards:
            shard.check()
        self._tensors.check(self._manifest, whole=True)

    def norms(self) -> Float32[Tensor, "rows"]:
        """Euclidean norm of each row before encoding."""
        return torch.cat(read_each(lambda shard: shard.norms, self._shards, parallel=self._remote))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `second_moment`, `autocorrelation` or `whitening`, mapped and checked by digest.

        A large file is checked once, and again when it has changed; `verify` checks it always.

        Raises:
            DamagedIndexError: The file is missing or damaged.
        """
        return self._tensors.read(name, self._manifest, self._derived)

    def load_derived(self, key: str) -> dict[str, Tensor] | None:
        """The tensors that `save_derived` saved under `key`; None if there are none, or if they are damaged.

        They belong to the finished index that they were computed from and are ignored by any other.
        """
        return self._derived.load(key)

    def without_derived(self) -> "Index":
        """The same index without its cache: derived results are neither read nor saved."""
        index = Index(self._path, self._manifest, self._shards, direct_reads=self._direct)
        index._derived = DerivedCache(index._path / "derived", dataclasses.replace(self._manifest, completion=None))
        return index

    def save_derived(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Save results computed from the index under `key` (letters, digits, `.`, `_`, `-`).

        Returns:
            Whether they were saved. They are not if the index is unfinished or its folder is not
            writable.
        """
        return self._derived.save(key, tensors)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _MappedCodes:
    """A shard's codes, mapped; the file's state at that time; and the blocks compared since."""

    state: object
    codes: Tensor
    compared: ComparedBlocks | None


def _shards_so_far(folder: Place, manifest: Manifest) -> tuple[Shard, ...]:
    """The shards of an unfinished index up to the first that is missing or damaged."""
    plan = ShardPlan.of(manifest)
    shards: list[Shard] = []
    for number in itertools.count():
        path = folder / "shards" / shard_file_name(number)
        if not exists(path):
            break
        try:
            shards.append(open_shard(path, plan, number))
        except DamagedIndexError:
            break  # the run that finishes the index writes it again, or has just removed it
        if shards[-1].rows < manifest.shard_examples:
            break
    return tuple(shards)
