"""A shard: consecutive examples with their projected gradients, losses, tokens and texts, in one file.

The header names the index, the rows of the shard and the position in the corpus at which the next
shard begins, so an interrupted index can be resumed from its shard files alone. `shard_files.py`
writes and opens them.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from trackstar.choices import CodecName
from trackstar.corpus import TokenizedExample
from trackstar.errors import DamagedIndexError
from trackstar.store.block_checksums import ComparedBlocks
from trackstar.store.codecs import StoredRows, quantized_bits
from trackstar.store.files.places import Place
from trackstar.store.files.read_ahead import read_ahead
from trackstar.store.files.remote import PART_BYTES
from trackstar.store.tensor_file import TensorFile, damaged
from trackstar.store.tensor_reading import (
    TensorFileReader,
    check_digest,
    compare_mapped,
    fill_from,
    map_tensor,
)
from trackstar.text import abridged


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """The position at which the next shard begins.

    Attributes:
        row: First row of the shard in the index.
        record: Record of the corpus that its first example comes from.
        window: Window of that example within its record.
        skipped: Number of earlier records without a target token.
    """

    row: int
    record: int
    window: int
    skipped: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredExample:
    """A training example as the index stores it.

    Attributes:
        row: Row of the example in the index.
        example: Its tokens, text and names.
        loss: Summed cross-entropy of its target tokens, in nats.
    """

    row: int
    example: TokenizedExample
    loss: float

    @property
    def metadata(self) -> dict[str, Any]:
        """The other fields of its record, such as source, date and licence; empty if none were kept.

        Raises:
            DamagedIndexError: They are no JSON object, which no writer writes.
        """
        text = self.example.metadata
        try:
            fields = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise DamagedIndexError(
                f"row {self.row}: the metadata are {abridged(text)}, expected a JSON object; build the index again"
            )
        return fields


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """An open shard file: its header has been read, its data are read on demand.

    Attributes:
        file: The file and its header.
        number: Number of the shard, from 0.
        first_row: Row in the index of the first example.
        rows: Number of examples.
        tokens: Number of tokens of all examples.
        targets: Number of target tokens, whose cross-entropy is summed in the loss.
        end: The position at which the next shard begins.
        codec: How rows are stored.
    """

    file: TensorFile
    number: int
    first_row: int
    rows: int
    tokens: int
    targets: int
    end: ResumePoint
    codec: CodecName

    @property
    def path(self) -> Place:
        """Path or URL of the file."""
        return self.file.path

    @property
    def digest(self) -> str:
        """Digest in the file's header."""
        return self.file.digest

    @property
    def stored(self) -> StoredRows:
        """All rows; each call maps the codes anew and compares them with their checksums.

        Raises:
            DamagedIndexError: A byte, a scale or a norm is damaged; the message names its row.
        """
        codes = map_tensor(self.file, "codes")
        compare_mapped(self.file, codes, 0, self.rows, None)
        return StoredRows(codec=self.codec, codes=codes, scales=self.scales, norms=self.norms)

    @property
    def scales(self) -> Float32[Tensor, "rows *blocks"]:
        """Positive powers of two, or a low-bit codec's factors, which are finite and not negative.

        Raises:
            DamagedIndexError: A scale is impossible; the message names its row.
        """
        return self._checked_scales(self.read("scales").reshape(self.file.tensors["scales"].shape))

    def _checked_scales(self, scales: np.ndarray, first: int = 0) -> Float32[Tensor, "rows *blocks"]:
        if quantized_bits(self.codec) is None:
            mantissas, exponents = np.frexp(scales)
            good, expected = (mantissas == 0.5) & (exponents > -126), "a positive power of two"
        else:
            good, expected = (np.isfinite(scales) & (scales >= 0)).all(axis=1), "finite factors, none negative"
        wrong = np.flatnonzero(~good)
        if wrong.size:
            row = int(wrong[0])
            found = abridged(scales[row].tolist())
            raise damaged(self.path, f"row {first + row} has scale {found}, expected {expected}")
        return torch.from_numpy(scales)

    @property
    def norms(self) -> Float32[Tensor, "rows"]:
        """Euclidean norm of each row before encoding.

        Raises:
            DamagedIndexError: A norm is negative or not finite; the message names its row.
        """
        return self._checked_norms(self.read("norms"))

    def _checked_norms(self, norms: np.ndarray, first: int = 0) -> Float32[Tensor, "rows"]:
        wrong = np.flatnonzero(~(np.isfinite(norms) & (norms >= 0)))
        if wrong.size:
            row = int(wrong[0])
            raise damaged(self.path, f"row {first + row} has norm {norms[row]}, expected a finite number, at least 0")
        return torch.from_numpy(norms)

    @property
    def losses(self) -> Float32[Tensor, "rows"]:
        """Summed cross-entropy of each example's target tokens, in nats."""
        return torch.from_numpy(self.read("losses"))

    @property
    def target_counts(self) -> Int32[Tensor, "rows"]:
        """Number of target tokens of each example."""
        return torch.from_numpy(self.read("target_counts"))

    @property
    def records(self) -> Int64[Tensor, "rows"]:
        """Record of the corpus that each example comes from."""
        return torch.from_numpy(self.read("records"))

    @property
    def windows(self) -> Int32[Tensor, "rows"]:
        """Window of each example within its record."""
        return torch.from_numpy(self.read("windows"))

    def parts(self) -> Iterator[StoredRows]:
        """All rows in order: a local file as one mapped part, another in parts that are read ahead.

        Raises:
            DamagedIndexError: A scale or norm is impossible; the message names its row.
        """
        if isinstance(self.path, Path):
            yield self.stored
        else:
            yield from read_ahead(functools.partial(self.some, rows) for rows in self.ranges(1))

    def ranges(self, rows_per_chunk: int) -> Iterator[range]:
        """The rows in ranges of whole chunks, of about `PART_BYTES` each."""
        chunk_bytes = rows_per_chunk * self.file.tensors["codes"].size // self.rows
        step = rows_per_chunk * max(1, PART_BYTES // chunk_bytes)
        return (range(first, min(first + step, self.rows)) for first in range(0, self.rows, step))

    def some(self, rows: Sequence[int]) -> StoredRows:
        """Some rows; only their codes are read, with the rest of their blocks.

        Args:
            rows: Ascending row numbers, counted from the shard's first row.

        Raises:
            DamagedIndexError: A byte, a scale or a norm is damaged; the message names its row.
        """
        if isinstance(self.path, Path):
            codes, compared = map_tensor(self.file, "codes"), self.compared_blocks()
            for row in rows:
                compare_mapped(self.file, codes, row, row + 1, compared)
            some = torch.tensor(rows)
            return StoredRows(codec=self.codec, codes=codes[some], scales=self.scales[some], norms=self.norms[some])
        first, span = rows[0], rows[-1] + 1 - rows[0]
        tensors = self.file.tensors
        codes = torch.empty(len(rows), *tensors["codes"].shape[1:], dtype=tensors["codes"].dtype)
        scales = np.empty((span, *tensors["scales"].shape[1:]), dtype=np.float32)
        norms = np.empty(span, dtype=np.float32)
        targets = [
            *self._code_targets(rows, codes),
            (self._start("scales", first), scales.data.cast("B")),
            (self._start("norms", first), norms.data.cast("B")),
        ]
        fill_from(self.file, targets)
        chosen = torch.tensor(rows) - first
        return StoredRows(
            codec=self.codec,
            codes=codes,
            scales=self._checked_scales(scales, first)[chosen],
            norms=self._checked_norms(norms, first)[chosen],
        )

    def compared_blocks(self) -> ComparedBlocks | None:
        """No block of the file yet, for `compare_mapped`; None if the file has no checksums."""
        return ComparedBlocks(self.file.checksums.blocks) if self.file.checksums is not None else None

    def _code_targets(self, rows: Sequence[int], codes: Tensor) -> Iterator[tuple[int, memoryview]]:
        """Position in the file and target buffer of the codes, for each run of consecutive rows."""
        content = codes.view(torch.uint8).numpy().data.cast("B")
        row_bytes, begin = len(content) // len(rows), 0
        for stop in range(1, len(rows) + 1):
            if stop == len(rows) or rows[stop] != rows[stop - 1] + 1:
                yield self._start("codes", rows[begin]), content[begin * row_bytes : stop * row_bytes]
                begin = stop

    def _start(self, name: str, row: int) -> int:
        """Position in the file of the first byte of a row of a tensor."""
        info = self.file.tensors[name]
        return info.start + row * (info.size // self.rows)

    def example(self, row: int) -> StoredExample:
        """The example at `row`, counted from the shard's first row; only its bytes are read.

        Raises:
            DamagedIndexError: Its bytes are damaged.
        """
        assert 0 <= row < self.rows, row
        return next(self.examples(row, row + 1))

    def examples(self, first: int = 0, stop: int | None = None) -> Iterator[StoredExample]:
        """Examples `first` to `stop`, counted from the shard's first row; only their bytes are read.

        Raises:
            DamagedIndexError: Their bytes are damaged.
        """
        stop = self.rows if stop is None else stop
        if first >= stop:
            return
        with TensorFileReader(self.file) as reader:
            batch = _ExampleBatch.read(self, reader, first, stop)
        for index in range(stop - first):
            yield batch.example(index)

    def check(self) -> None:
        """Compare all bytes with the shard's digest.

        Raises:
            DamagedIndexError: A byte is damaged.
        """
        check_digest(self.file)

    def read(self, name: str) -> np.ndarray:
        """The numbers of a tensor as a flat array."""
        with TensorFileReader(self.file) as reader:
            return reader.read(name)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _ExampleBatch:
    """Consecutive examples of a shard in memory, before they are split into single examples."""

    shard: Shard
    first: int
    losses: np.ndarray
    records: np.ndarray
    windows: np.ndarray
    offsets: dict[str, np.ndarray]
    values: dict[str, np.ndarray]

    @classmethod
    def read(cls, shard: Shard, reader: TensorFileReader, first: int, stop: int) -> "_ExampleBatch":
        ragged = ragged_tensors(shard)
        numbers = reader.read_several(
            [(name, first, stop) for name in _NUMBERS] + [(f"{kind}_offsets", first, stop + 1) for kind in ragged]
        )
        offsets = dict(zip(ragged, numbers[len(_NUMBERS) :], strict=True))
        parts = []
        for kind, names in ragged.items():
            starts, length = offsets[kind], shard.file.tensors[names[0]].shape[0]
            if starts[0] < 0 or starts[-1] > length or np.any(starts[1:] < starts[:-1]):
                raise damaged(shard.path, f"{kind}_offsets of rows {first} to {stop} do not rise from 0 to {length}")
            parts += [(name, int(starts[0]), int(starts[-1])) for name in names]
        values = reader.read_several(parts)
        return cls(
            shard=shard,
            first=first,
            **dict(zip(_NUMBERS, numbers, strict=False)),
            offsets=offsets,
            values=dict(zip((name for name, _, _ in parts), values, strict=True)),
        )

    def example(self, index: int) -> StoredExample:
        row = self.shard.first_row + self.first + index
        example = TokenizedExample(
            example_id=self._string("id", index),
            parent_id=self._string("parent", index),
            record=int(self.records[index]),
            window=int(self.windows[index]),
            text=self._string("text", index),
            token_ids=self._part("token", "tokens", index).copy(),
            target_mask=self._part("token", "target_masks", index).astype(np.bool_),
            metadata=self._string("metadata", index) if "metadata" in self.offsets else "",
        )
        return StoredExample(row=row, example=example, loss=float(self.losses[index]))

    def _part(self, kind: str, name: str, index: int) -> np.ndarray:
        offsets = self.offsets[kind]
        return self.values[name][offsets[index] - offsets[0] : offsets[index + 1] - offsets[0]]

    def _string(self, kind: str, index: int) -> str:
        content = self._part(kind, _RAGGED[kind][0], index).tobytes()
        try:
            return content.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            row = self.first + index
            raise damaged(self.shard.path, f"the {kind} of row {row} is not UTF-8 at byte {error.start}") from error


_NUMBERS = ("losses", "records", "windows")
"""Tensors with one number per example."""

_RAGGED = {
    "token": ("tokens", "target_masks"),
    "text": ("text",),
    "id": ("ids",),
    "parent": ("parents",),
    "metadata": ("metadata",),
}


def ragged_tensors(shard: Shard) -> dict[str, tuple[str, ...]]:
    """The shard's tensors with a sequence per example, by the kind of their offsets."""
    return {kind: names for kind, names in _RAGGED.items() if names[0] in shard.file.tensors}
