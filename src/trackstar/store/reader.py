"""Reading an index: any number of processes at once, also while it is being written."""

import bisect
import dataclasses
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
        self, path: Path, manifest: Manifest, shards: tuple[Shard, ...], *, direct_reads: bool | None = None
    ) -> None:
        self._path = path
        self._manifest = manifest
        self._shards = shards
        self._ends = list(itertools.accumulate(shard.rows for shard in shards))
        self._tensors = IndexTensors(path)
        self._maps: dict[int, tuple[object, Tensor]] = {}
        self._derived = DerivedCache(path / "derived", manifest)
        codes = sum(shard.file.places["codes"].stop - shard.file.places["codes"].start for shard in shards)
        # Codes that fit into memory stay there from one pass to the next.
        self._direct = codes > psutil.virtual_memory().available if direct_reads is None else direct_reads

    @classmethod
    def open(cls, path: str | Path, *, allow_incomplete: bool = False, direct_reads: bool | None = None) -> "Index":
        """Open the index at `path`.

        Args:
            path: The index's folder.
            allow_incomplete: Whether an unfinished index will do; it has the shards that are there now.
            direct_reads: Whether passes over all rows read past the page cache instead of mapping the files; None is
                where the codes are larger than the memory that is free.

        Raises:
            IncompleteIndexError: Its making was interrupted, or still goes on.
            DamagedIndexError: A file of it is missing, cut off, or not what the manifest says.
            StoreError: There is no index.
        """
        folder = Path(path)
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
                    "run the same `trackstar index` command again to finish it"
                )
            return cls(folder, manifest, shards, direct_reads=direct_reads)
        plan = ShardPlan.of(manifest)
        shards = tuple(
            open_shard(folder / "shards" / entry.file, plan, number, entry)
            for number, entry in enumerate(manifest.completion.shards)
        )
        index = cls(folder, manifest, shards, direct_reads=direct_reads)
        index._tensors.check_headers(manifest)
        return index

    @property
    def path(self) -> Path:
        """The index's folder."""
        return self._path

    @property
    def manifest(self) -> Manifest:
        """What the index was made with."""
        return self._manifest

    @property
    def rows(self) -> int:
        """Number of examples."""
        return self._ends[-1] if self._ends else 0

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
        assert 0 <= row < self.rows, row
        shard = self._shards[bisect.bisect_right(self._ends, row)]
        return shard.example(row - shard.first_row)

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
        for shard in self._shards:
            first, scales, norms = 0, shard.scales, shard.norms
            for codes in self._codes(shard, rows_per_chunk):
                for start in range(0, len(codes), rows_per_chunk):
                    part = codes[start : start + rows_per_chunk]
                    rows = slice(first, first + len(part))
                    stored = StoredRows(codec=shard.codec, codes=part, scales=scales[rows], norms=norms[rows])
                    yield CodeChunk(first_row=shard.first_row + first, stored=stored)
                    first += len(part)

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
            found = os.stat(shard.path)
            state = (found.st_ino, found.st_size, found.st_mtime_ns)
        except OSError:
            state = None  # mapping says what is wrong
        kept = self._maps.get(shard.number)
        if kept is None or kept[0] != state:
            kept = self._maps[shard.number] = (state, map_tensor(shard.file, "codes"))
        return kept[1]

    def some_rows(self, rows: Sequence[int]) -> StoredRows:
        """A few rows, ascending, in memory."""
        parts = []
        for shard in self._shards:
            first, last = (bisect.bisect_left(rows, row) for row in (shard.first_row, shard.first_row + shard.rows))
            if first < last:
                parts.append(shard.stored[torch.tensor(rows[first:last]) - shard.first_row])
        return StoredRows.joined(parts)

    def some_losses(self, rows: Sequence[int]) -> Float32[Tensor, "some"]:
        """Losses of a few rows, ascending: summed cross-entropy of the target tokens, in nats."""
        parts = []
        for shard in self._shards:
            first, last = (bisect.bisect_left(rows, row) for row in (shard.first_row, shard.first_row + shard.rows))
            if first < last:
                parts.append(shard.losses[torch.tensor(rows[first:last]) - shard.first_row])
        return torch.cat(parts)

    def norms(self) -> Float32[Tensor, "rows"]:
        """Euclidean norm of every row's coordinates before they were coded."""
        return torch.cat([shard.norms for shard in self._shards])

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

    def save_derived(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Keep what was computed from the index, under `key` (letters, digits, `.`, `_`, `-`).

        Returns:
            Whether it was kept. It is not where the index is unfinished or its folder cannot be written: the caller
            goes on with what it has computed.
        """
        return self._derived.save(key, tensors)


def _shards_so_far(folder: Path, manifest: Manifest) -> tuple[Shard, ...]:
    plan = ShardPlan.of(manifest)
    shards: list[Shard] = []
    for number in itertools.count():
        path = folder / "shards" / shard_file_name(number)
        if not path.exists():
            break
        try:
            shards.append(open_shard(path, plan, number))
        except DamagedIndexError:
            if path.exists():
                raise
            break  # a writer took it away between the two
        if shards[-1].rows < manifest.shard_examples:
            break
    return tuple(shards)
