"""A shard: consecutive examples with their projected gradients, losses, tokens and texts, in one file.

A shard knows which index it belongs to, which rows it holds, and where in the corpus the next shard begins; so an
interrupted index goes on from its shard files alone.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32, Int32, Int64
from torch import Tensor

from trackstar.choices import CodecName
from trackstar.corpus import TokenizedExample
from trackstar.errors import IndexMismatchError, StoreError
from trackstar.store.codecs import StoredRows, code_columns, codec_dtype, quantized_bits, scales_shape
from trackstar.store.files.durable import PARTIAL_SUFFIX
from trackstar.store.files.places import Place
from trackstar.store.files.read_ahead import read_ahead
from trackstar.store.files.remote import PART_BYTES
from trackstar.store.manifest import ShardEntry, shard_file_name
from trackstar.store.shard_content import ShardContent, ShardPlan, shard_tensors
from trackstar.store.strict_json import FieldError
from trackstar.store.tensor_file import (
    TensorFile,
    TensorFileReader,
    check_digest,
    damaged,
    fill_from,
    map_tensor,
    open_tensor_file,
    write_tensor_file,
)
from trackstar.text import abridged, cut

SHARD_FORMAT = "trackstar-shard-2"
SHARD_METADATA = {
    "format",
    "manifest_digest",
    "number",
    "first_row",
    "targets",
    "next_record",
    "next_window",
    "skipped",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """Where the next shard begins.

    Attributes:
        row: Its first row in the index.
        record: The corpus's record that its first example comes from.
        window: That example's window of the record.
        skipped: Number of records before it without a scorable token.
    """

    row: int
    record: int
    window: int
    skipped: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StoredExample:
    """An example as the index keeps it.

    Attributes:
        row: Its row in the index.
        example: Its tokens, text and names.
        loss: Summed cross-entropy of its target tokens, in nats.
    """

    row: int
    example: TokenizedExample
    loss: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A shard file that has been opened: its header is read, its data are read when they are asked for.

    Attributes:
        file: The file and its header.
        number: Its place among the shards, from 0.
        first_row: The index's row of its first example.
        rows: Number of examples.
        tokens: Number of their tokens.
        targets: Number of their tokens whose cross-entropy counts.
        end: Where the next shard begins.
        codec: How its rows are stored.
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
        """The shard's file."""
        return self.file.path

    @property
    def digest(self) -> str:
        """The digest that its header gives."""
        return self.file.digest

    @property
    def stored(self) -> StoredRows:
        """The rows' codes, memory-mapped anew (nothing is read before it is used), with their scales and norms.

        Raises:
            DamagedIndexError: A scale or norm cannot be one; the message names its row.
        """
        codes = map_tensor(self.file, "codes")
        return StoredRows(codec=self.codec, codes=codes, scales=self.scales, norms=self.norms)

    @property
    def scales(self) -> Float32[Tensor, "rows *blocks"]:
        """The scales: positive powers of two, or a quantizing codec's factors, which are finite and not negative.

        Raises:
            DamagedIndexError: One is not; the message names its row.
        """
        return self._checked_scales(self.read("scales").reshape(self.file.places["scales"].shape))

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
        """Euclidean norm of each row's coordinates before they were coded.

        Raises:
            DamagedIndexError: One is negative or not finite; the message names its row.
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
        """Number of each example's tokens whose cross-entropy counts."""
        return torch.from_numpy(self.read("target_counts"))

    @property
    def records(self) -> Int64[Tensor, "rows"]:
        """The corpus's record that each example comes from."""
        return torch.from_numpy(self.read("records"))

    @property
    def windows(self) -> Int32[Tensor, "rows"]:
        """Each example's window of its record."""
        return torch.from_numpy(self.read("windows"))

    def parts(self) -> Iterator[StoredRows]:
        """All rows in order: of a file of this machine at once, memory-mapped; else in parts that are read ahead.

        Raises:
            DamagedIndexError: A scale or norm cannot be one; the message names its row.
        """
        if isinstance(self.path, Path):
            yield self.stored
        else:
            yield from read_ahead(functools.partial(self.some, rows) for rows in self.ranges(1))

    def ranges(self, rows_per_chunk: int) -> Iterator[range]:
        """The rows, cut into parts of about `PART_BYTES` that are whole chunks."""
        place = self.file.places["codes"]
        chunk_bytes = rows_per_chunk * (place.stop - place.start) // self.rows
        step = rows_per_chunk * max(1, PART_BYTES // chunk_bytes)
        return (range(first, min(first + step, self.rows)) for first in range(0, self.rows, step))

    def some(self, rows: Sequence[int]) -> StoredRows:
        """Some rows, ascending, counted from the shard's first; only their own codes are read.

        Raises:
            DamagedIndexError: A scale or norm cannot be one; the message names its row.
        """
        if isinstance(self.path, Path):
            return self.stored[torch.tensor(rows)]
        first, span = rows[0], rows[-1] + 1 - rows[0]
        codes = torch.empty(len(rows), *self.file.places["codes"].shape[1:], dtype=self.file.places["codes"].dtype)
        scales = np.empty((span, *self.file.places["scales"].shape[1:]), dtype=np.float32)
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

    def _code_targets(self, rows: Sequence[int], codes: Tensor) -> Iterator[tuple[int, memoryview]]:
        """Where codes lie in the file and where they go, those of successive rows together."""
        content = codes.view(torch.uint8).numpy().data.cast("B")
        row_bytes, begin = len(content) // len(rows), 0
        for stop in range(1, len(rows) + 1):
            if stop == len(rows) or rows[stop] != rows[stop - 1] + 1:
                yield self._start("codes", rows[begin]), content[begin * row_bytes : stop * row_bytes]
                begin = stop

    def _start(self, name: str, row: int) -> int:
        """The place in the file of a row's first byte of a tensor."""
        place = self.file.places[name]
        return place.start + row * ((place.stop - place.start) // self.rows)

    def example(self, row: int) -> StoredExample:
        """The example at `row`, counted from the shard's first; only its own bytes are read.

        Raises:
            DamagedIndexError: Its bytes are not what was written.
        """
        assert 0 <= row < self.rows, row
        return next(self.examples(row, row + 1))

    def examples(self, first: int = 0, stop: int | None = None) -> Iterator[StoredExample]:
        """Examples `first` to `stop`, counted from the shard's first; only their own bytes are read.

        Raises:
            DamagedIndexError: Their bytes are not what was written.
        """
        stop = self.rows if stop is None else stop
        if first >= stop:
            return
        with TensorFileReader(self.file) as reader:
            part = _ExamplePart.read(self, reader, first, stop)
        for index in range(stop - first):
            yield part.example(index)

    def check(self) -> None:
        """Compare every byte with the shard's digest.

        Raises:
            DamagedIndexError: They are not what was written.
        """
        check_digest(self.file)

    def read(self, name: str) -> np.ndarray:
        """A tensor's numbers, as they are in the file, one after the other."""
        with TensorFileReader(self.file) as reader:
            return reader.read(name)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _ExamplePart:
    """Some consecutive examples of a shard, in memory."""

    shard: Shard
    first: int
    losses: np.ndarray
    records: np.ndarray
    windows: np.ndarray
    offsets: dict[str, np.ndarray]
    values: dict[str, np.ndarray]

    @classmethod
    def read(cls, shard: Shard, reader: TensorFileReader, first: int, stop: int) -> "_ExamplePart":
        numbers = reader.read_several(
            [(name, first, stop) for name in _NUMBERS] + [(f"{kind}_offsets", first, stop + 1) for kind in RAGGED]
        )
        offsets = dict(zip(RAGGED, numbers[len(_NUMBERS) :], strict=True))
        wanted = []
        for kind, names in RAGGED.items():
            found, length = offsets[kind], shard.file.places[names[0]].shape[0]
            if found[0] < 0 or found[-1] > length or np.any(found[1:] < found[:-1]):
                raise damaged(shard.path, f"{kind}_offsets of rows {first} to {stop} do not rise from 0 to {length}")
            wanted += [(name, int(found[0]), int(found[-1])) for name in names]
        values = reader.read_several(wanted)
        return cls(
            shard=shard,
            first=first,
            **dict(zip(_NUMBERS, numbers, strict=False)),
            offsets=offsets,
            values=dict(zip((name for name, _, _ in wanted), values, strict=True)),
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
        )
        return StoredExample(row=row, example=example, loss=float(self.losses[index]))

    def _part(self, kind: str, name: str, index: int) -> np.ndarray:
        offsets = self.offsets[kind]
        return self.values[name][offsets[index] - offsets[0] : offsets[index + 1] - offsets[0]]

    def _string(self, kind: str, index: int) -> str:
        content = self._part(kind, RAGGED[kind][0], index).tobytes()
        try:
            return content.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            row = self.first + index
            raise damaged(self.shard.path, f"the {kind} of row {row} is not UTF-8 at byte {error.start}") from error


# One number an example.
_NUMBERS = ("losses", "records", "windows")

# Sequences of one example after the other: OFFSETS[i] to OFFSETS[i + 1] of each are example i's.
RAGGED = {"token": ("tokens", "target_masks"), "text": ("text",), "id": ("ids",), "parent": ("parents",)}


def write_shard_file(
    folder: Place, plan: ShardPlan, number: int, content: ShardContent, *, partial_suffix: str = PARTIAL_SUFFIX
) -> Shard:
    """Write shard `number`, durably, and open it.

    Args:
        folder: The folder of the index's shards.
        plan: The index's plan.
        number: The shard's number.
        content: What is in it.
        partial_suffix: See `replacing`.

    Raises:
        StoreError: The file cannot be written; nothing is left of it.
    """
    if sys.byteorder != "little":
        raise StoreError("this machine's numbers are big-endian, an index's are little-endian; use another machine")
    tensors = shard_tensors(content, plan)
    metadata = {
        "format": SHARD_FORMAT,
        "manifest_digest": plan.index,
        "number": str(number),
        "first_row": str(number * plan.examples),
        "targets": str(int(tensors["target_counts"].sum())),
        "next_record": str(content.next_record),
        "next_window": str(content.next_window),
        "skipped": str(content.skipped),
    }
    path = folder / shard_file_name(number)
    write_tensor_file(path, tensors, metadata, partial_suffix=partial_suffix)
    return open_shard(path, plan, number)


def open_shard(path: Place, plan: ShardPlan, number: int, entry: ShardEntry | None = None) -> Shard:
    """Open the file of shard `number`: its header, against the plan and the file's size, not its data.

    Args:
        path: The file.
        plan: The index's plan.
        number: The shard's number.
        entry: What the completed manifest says of it.

    Raises:
        DamagedIndexError: The file is missing, cut off or not this shard.
        IndexMismatchError: The file is a shard of another index.
        StoreError: The file cannot be read.
    """
    file = open_tensor_file(path)
    if file.metadata.get("format") != SHARD_FORMAT:
        raise damaged(path, f"format {abridged(file.metadata.get('format'))}, expected {SHARD_FORMAT!r}")
    found_index = file.metadata.get("manifest_digest")
    if found_index != plan.index:
        raise IndexMismatchError(
            f"{path}: belongs to the index with manifest digest {abridged(found_index)}, expected {plan.index!r}; "
            "move the file back to its own index"
        )
    try:
        shard = _parse_shard(file, plan.codec)
        _check_shard(shard, plan, number, entry)
    except FieldError as error:
        raise damaged(path, str(error)) from error
    return shard


def shard_rows(file: TensorFile) -> int:
    """Number of examples in a shard's file.

    Raises:
        DamagedIndexError: The file is not a shard's.
    """
    try:
        return _length(file, "losses")
    except FieldError as error:
        raise damaged(file.path, str(error)) from error


def _parse_shard(file: TensorFile, codec: CodecName) -> Shard:
    rows, tokens = _length(file, "losses"), _length(file, "tokens")
    first_row = _number(file, "first_row")
    end = ResumePoint(
        row=first_row + rows,
        record=_number(file, "next_record"),
        window=_number(file, "next_window"),
        skipped=_number(file, "skipped"),
    )
    return Shard(
        file=file,
        number=_number(file, "number"),
        first_row=first_row,
        rows=rows,
        tokens=tokens,
        targets=_number(file, "targets"),
        end=end,
        codec=codec,
    )


def _number(file: TensorFile, name: str) -> int:
    text = file.metadata.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 19 and str(int(text)) == text):
        raise FieldError(name, file.metadata.get(name), "a whole number")
    return int(text)


def _length(file: TensorFile, name: str) -> int:
    place = file.places.get(name)
    if place is None or len(place.shape) != 1:
        raise FieldError(name, None if place is None else list(place.shape), "a tensor with one dimension")
    return place.shape[0]


def _check_shard(shard: Shard, plan: ShardPlan, number: int, entry: ShardEntry | None) -> None:
    expected = {
        "number": (shard.number, number),
        "first_row": (shard.first_row, number * plan.examples),
        "metadata": (sorted(shard.file.metadata), sorted(SHARD_METADATA)),
    }
    if entry is not None:
        expected["rows"] = (shard.rows, entry.rows)
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise FieldError(name, found, str(wanted))
    if entry is not None and shard.digest != entry.digest:
        raise FieldError("digest", shard.digest, f"{cut(entry.digest)}, as the manifest says")
    if not 1 <= shard.rows <= plan.examples:
        raise FieldError("rows", shard.rows, f"1 to {plan.examples}")
    _check_places(shard, plan)


def _check_places(shard: Shard, plan: ShardPlan) -> None:
    rows, tokens = shard.rows, shard.tokens
    expected: dict[str, tuple[torch.dtype, tuple[int, ...] | None]] = {
        "codes": (codec_dtype(plan.codec), (rows, code_columns(plan.codec, plan.dimensions))),
        "records": (torch.int64, (rows,)),
        "token_offsets": (torch.int64, (rows + 1,)),
        "text_offsets": (torch.int64, (rows + 1,)),
        "id_offsets": (torch.int64, (rows + 1,)),
        "parent_offsets": (torch.int64, (rows + 1,)),
        "scales": (torch.float32, scales_shape(plan.codec, rows, plan.blocks)),
        "norms": (torch.float32, (rows,)),
        "losses": (torch.float32, (rows,)),
        "target_counts": (torch.int32, (rows,)),
        "windows": (torch.int32, (rows,)),
        "tokens": (torch.int32, (tokens,)),
        "target_masks": (torch.uint8, (tokens,)),
        "text": (torch.uint8, None),
        "ids": (torch.uint8, None),
        "parents": (torch.uint8, None),
    }
    names = list(shard.file.places)
    if names != list(expected):
        raise FieldError("the tensors", names, ", ".join(expected))
    for name, (dtype, shape) in expected.items():
        place = shard.file.places[name]
        if place.dtype is not dtype or (place.shape != shape if shape is not None else len(place.shape) != 1):
            wanted = f"{dtype} {list(shape) if shape is not None else 'with one dimension'}"
            raise FieldError(name, f"{place.dtype} {list(place.shape)}", wanted)
