"""One file of named tensors: valid safetensors, the same bytes for the same content, and a digest over all of it.

    8 bytes     N, little-endian: the length of the header
    N bytes     the header: JSON, then spaces so that the data begin at a multiple of 4096
    the rest    the tensors' bytes, one after the other

The header begins with `{"__metadata__":{"digest":"` and 64 hexadecimal digits: the BLAKE2b-256 of the whole file with
these 64 bytes as zeros ("0"). FORMAT.md has every detail.
"""

import dataclasses
import functools
import hashlib
import json
import math
import mmap
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trackstar.errors import DamagedIndexError, StoreError
from trackstar.store.files import remote as remote_files
from trackstar.store.files.durable import PARTIAL_SUFFIX, replacing, write_all
from trackstar.store.files.places import Place, RemotePath
from trackstar.store.files.read_ahead import read_ahead
from trackstar.store.strict_json import FieldError, read_strictly
from trackstar.text import abridged

PAGE = 4096
CHUNK = 4 * 2**20
LARGEST_HEADER = 64 * 2**20
LARGEST_PRODUCT = 2**63
METADATA = "__metadata__"
HEADER_START = b'{"__metadata__":{"digest":"'
DIGEST_OFFSET = 8 + len(HEADER_START)
DIGEST_LENGTH = 64
NO_DIGEST = "0" * DIGEST_LENGTH

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where a tensor lies: its dtype and shape, and its first byte and the byte after its last in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """A file of named tensors whose header has been read and fits the file's size.

    Attributes:
        path: The file.
        digest: The digest that it says it has; `check_digest` says whether that is so.
        metadata: Its strings by name, without the digest.
        places: Its tensors by name, in their order in the file.
        size: Its length in bytes.
    """

    path: Place
    digest: str
    metadata: Mapping[str, str]
    places: Mapping[str, TensorPlace]
    size: int


def damaged(path: Place, what: str) -> DamagedIndexError:
    """The one-line error for a file of an index that is not as it was written."""
    return DamagedIndexError(
        f"{path}: {what}; restore the file from a copy, or delete it and run the command that made the index again"
    )


def write_tensor_file(
    path: Place,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    partial_suffix: str = PARTIAL_SUFFIX,
) -> str:
    """Write a file of tensors, durably, and give its digest.

    Tensors lie in the mapping's order. Those that are contiguous and in main memory are written without a copy.

    Raises:
        StoreError: The file cannot be written; nothing is left of it.
    """
    header = _header(tensors, metadata)
    running = hashlib.blake2b(header, digest_size=DIGEST_LENGTH // 2)
    with replacing(path, partial_suffix=partial_suffix) as descriptor:
        write_all(descriptor, header)
        for chunk in _data_chunks(tensors):
            running.update(chunk)
            write_all(descriptor, chunk)
        digest = running.hexdigest()
        os.lseek(descriptor, DIGEST_OFFSET, os.SEEK_SET)
        write_all(descriptor, digest.encode("ascii"))
    return digest


def digest_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The digest of the file that `write_tensor_file` would write."""
    running = hashlib.blake2b(_header(tensors, metadata), digest_size=DIGEST_LENGTH // 2)
    for chunk in _data_chunks(tensors):
        running.update(chunk)
    return running.hexdigest()


def open_tensor_file(path: Place) -> TensorFile:
    """Read a file's header and check it against the file's size; its data are not read.

    Raises:
        DamagedIndexError: The file is missing, too short or too long, or its header is not one that we write.
        StoreError: The file cannot be read.
    """
    try:
        header, size = _read_header(path) if isinstance(path, Path) else _read_remote_header(path)
    except FileNotFoundError:
        raise damaged(path, "missing, expected it to be there") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror}); make the file readable") from error
    try:
        return _parse_header(path, header, size)
    except FieldError as error:
        raise damaged(path, f"in the header {error}") from error


def check_digest(file: TensorFile) -> None:
    """Read the whole file and compare it with its digest.

    Raises:
        DamagedIndexError: A byte of it is not what was written.
        StoreError: The file cannot be read.
    """
    if not isinstance(file.path, Path):
        _check_chunks(file, _remote_chunks(file))
        return
    try:
        with file.path.open("rb") as opened:
            _check_chunks(file, iter(lambda: opened.read(CHUNK), b""))
    except OSError as error:
        raise StoreError(f"{file.path}: cannot be read ({error.strerror}); make the file readable") from error


def checked_tensors(file: TensorFile) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped, once its digest has been checked.

    What lies on another file system is mapped from a nameless copy on this machine, so that it is read from there once
    and memory can be given back.

    Raises:
        DamagedIndexError: A byte of it is not what was written.
        StoreError: The file cannot be read.
    """
    if isinstance(file.path, Path):
        check_digest(file)
        return {name: map_tensor(file, name) for name in file.places}
    mapped = _local_copy(file)
    return {name: _view(mapped, place) for name, place in file.places.items()}


def map_tensor(file: TensorFile, name: str) -> Tensor:
    """A tensor of the file, memory-mapped: nothing is read before it is used, nothing is copied.

    On another file system all of it is read into memory.

    Writing to it changes this process's pages, never the file.

    Raises:
        DamagedIndexError: The file is gone or shorter than when it was opened.
        StoreError: The file cannot be mapped.
    """
    place = file.places[name]
    if place.start == place.stop:
        return torch.empty(place.shape, dtype=place.dtype)
    if not isinstance(file.path, Path):
        return _read_remote_tensor(file, place)
    try:
        with file.path.open("rb") as opened:
            _check_size(file, os.fstat(opened.fileno()).st_size)
            mapped = mmap.mmap(opened.fileno(), file.size, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise damaged(file.path, "missing, expected it to be there") from None
    except OSError as error:
        raise StoreError(f"{file.path}: cannot be mapped into memory ({error.strerror})") from error
    return _view(mapped, place)


def fill_from(file: TensorFile, targets: Sequence[tuple[int, memoryview]]) -> None:
    """Read parts of a file on another file system; see `remote_files.fill`.

    Raises:
        DamagedIndexError: The file is gone or has become too short.
        StoreError: The file cannot be read.
    """
    assert not isinstance(file.path, Path), file.path
    try:
        remote_files.fill(file.path, targets)
    except FileNotFoundError:
        raise damaged(file.path, "missing, expected it to be there") from None
    except remote_files.CutOffError as error:
        raise damaged(file.path, f"ends at byte {error.size}, expected {file.size} bytes") from None


class TensorFileReader:
    """Reads parts of a file's tensors into memory; a context manager that keeps the file open."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._descriptor = -1
        if not isinstance(file.path, Path):
            return
        try:
            self._descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise damaged(file.path, "missing, expected it to be there") from None
        except OSError as error:
            raise StoreError(f"{file.path}: cannot be read ({error.strerror}); make the file readable") from error

    def __enter__(self) -> "TensorFileReader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements `first` to `stop` of a tensor, in the order in which they lie, as a new array.

        Raises:
            DamagedIndexError: The file has become too short.
            StoreError: The file cannot be read.
        """
        place = self._file.places[name]
        return self.read_several([(name, first, math.prod(place.shape) if stop is None else stop)])[0]

    def read_several(self, wanted: Sequence[tuple[str, int, int]]) -> list[np.ndarray]:
        """Elements of several tensors, each given by its name, the first element and that after the last.

        From another file system they come at the same time. Raises what `read` does.
        """
        arrays, targets = [], []
        for name, first, stop in wanted:
            place = self._file.places[name]
            array = np.empty(stop - first, dtype=_NUMPY_DTYPES[place.dtype])
            arrays.append(array)
            targets.append((place.start + first * array.itemsize, array.data.cast("B")))
        if self._descriptor < 0:
            fill_from(self._file, targets)
        else:
            for offset, target in targets:
                self._fill(offset, target)
        return arrays

    def _fill(self, offset: int, remaining: memoryview) -> None:
        while remaining:
            try:
                count = os.preadv(self._descriptor, [remaining], offset)
            except OSError as error:
                raise StoreError(f"{self._file.path}: cannot be read ({error.strerror})") from error
            if count == 0:
                raise damaged(self._file.path, f"ends at byte {offset}, expected {self._file.size} bytes")
            remaining, offset = remaining[count:], offset + count


_NUMPY_DTYPES = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32, torch.uint8: np.uint8}


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file's first bytes, up to its data, with zeros in the digest's place."""
    fields: dict[str, Any] = {METADATA: {"digest": NO_DIGEST, **metadata}}
    position = 0
    for name, tensor in tensors.items():
        stop = position + tensor.numel() * tensor.element_size()
        fields[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def _data_chunks(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        if tensor.numel() == 0:
            continue
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        content = flat.numpy().data
        for start in range(0, len(content), CHUNK):
            yield content[start : start + CHUNK]


def _read_header(path: Path) -> tuple[bytes, int]:
    """A file's header without the eight bytes before it, and the file's size."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(path, file.read(8), size)
        return file.read(length), size


def _read_remote_header(path: RemotePath) -> tuple[bytes, int]:
    size = remote_files.size_of(path)
    try:
        begin = bytearray(min(size, PAGE))  # most headers are no longer
        remote_files.fill(path, [(0, memoryview(begin))])
        length = _header_length(path, begin[:8], size)
        rest = bytearray(max(0, 8 + length - len(begin)))
        remote_files.fill(path, [(len(begin), memoryview(rest))])
    except remote_files.CutOffError as error:
        raise damaged(path, f"{error.size} bytes, expected {size}") from None
    return bytes(begin[8:] + rest)[:length], size


def _header_length(path: Place, prefix: bytes | bytearray, size: int) -> int:
    if len(prefix) < 8:
        raise damaged(path, f"{size} bytes, expected at least a header")
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, LARGEST_HEADER) or (8 + length) % PAGE:
        raise damaged(path, f"a header of {length} bytes in a file of {size}, expected one that fits into it")
    return length


def _check_chunks(file: TensorFile, chunks: Iterator[bytes | bytearray]) -> None:
    """Compare what a file consists of with its digest."""
    running = hashlib.blake2b(digest_size=DIGEST_LENGTH // 2)
    head = bytearray(next(chunks, b""))
    place = slice(DIGEST_OFFSET, DIGEST_OFFSET + DIGEST_LENGTH)
    head[place] = NO_DIGEST[: len(head[place])].encode("ascii")
    running.update(head)
    for chunk in chunks:
        running.update(chunk)
    if running.hexdigest() != file.digest:
        raise damaged(file.path, f"its content has digest {running.hexdigest()}, expected {file.digest}")


def _remote_chunks(file: TensorFile) -> Iterator[bytearray]:
    """A file's bytes, one part after the other, the next ones on their way while one is used."""

    def read(first: int) -> bytearray:
        part = bytearray(min(remote_files.PART_BYTES, file.size - first))
        fill_from(file, [(first, memoryview(part))])
        return part

    return read_ahead(functools.partial(read, first) for first in range(0, file.size, remote_files.PART_BYTES))


def _local_copy(file: TensorFile) -> mmap.mmap:
    """A file's bytes, checked against its digest, mapped from a nameless file of this machine."""
    try:
        with tempfile.TemporaryFile(prefix="trackstar-", buffering=0) as copy:

            def kept() -> Iterator[bytearray]:
                for chunk in _remote_chunks(file):
                    write_all(copy.fileno(), chunk)
                    yield chunk

            _check_chunks(file, kept())
            return mmap.mmap(copy.fileno(), file.size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise remote_files.no_room(file.path, "copied to", error) from error


def _read_remote_tensor(file: TensorFile, place: TensorPlace) -> Tensor:
    assert not isinstance(file.path, Path), file.path
    try:
        _check_size(file, remote_files.size_of(file.path))
    except FileNotFoundError:
        raise damaged(file.path, "missing, expected it to be there") from None
    content = bytearray(place.stop - place.start)
    fill_from(file, [(place.start, memoryview(content))])
    return torch.frombuffer(content, dtype=place.dtype).view(place.shape)


def _view(mapped: mmap.mmap, place: TensorPlace) -> Tensor:
    if place.start == place.stop:
        return torch.empty(place.shape, dtype=place.dtype)
    flat = torch.frombuffer(mapped, dtype=place.dtype, count=math.prod(place.shape), offset=place.start)
    return flat.view(place.shape)


def _parse_header(path: Place, header: bytes, size: int) -> TensorFile:
    if not header.startswith(HEADER_START):
        raise FieldError("the beginning", header[: len(HEADER_START)], repr(HEADER_START.decode("ascii")))
    try:
        fields = read_strictly(header.decode("ascii"))
    except UnicodeDecodeError as error:
        raise FieldError(f"byte {error.start}", header[error.start], "ASCII") from error
    metadata = fields.pop(METADATA)
    wrong = next((name for name, value in metadata.items() if not isinstance(value, str)), None)
    if wrong is not None:
        raise FieldError(f"{METADATA}.{wrong}", metadata[wrong], "a string")
    digest = metadata.pop("digest")
    if re.fullmatch(r"[0-9a-f]{64}", digest) is None:
        raise FieldError(f"{METADATA}.digest", digest, "64 hexadecimal digits")
    position = 8 + len(header)
    places = {}
    for name, entry in fields.items():
        places[name] = _parse_place(name, entry, position, 8 + len(header))
        position = places[name].stop
    if position != size:
        raise damaged(path, f"{size} bytes, expected {position}")
    return TensorFile(path=path, digest=digest, metadata=metadata, places=places, size=size)


def _parse_place(name: str, entry: Any, position: int, data_start: int) -> TensorPlace:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FieldError(name, entry, "dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FieldError(f"{name}.dtype", entry["dtype"], f"one of {', '.join(DTYPES)}")
    shape = entry["shape"]
    if not (isinstance(shape, list) and all(type(length) is int and length >= 0 for length in shape)):
        raise FieldError(f"{name}.shape", shape, "a list of whole numbers, none negative")
    stop = position + _elements(name, shape) * dtype.itemsize
    expected = [position - data_start, stop - data_start]
    if entry["data_offsets"] != expected or any(type(offset) is not int for offset in entry["data_offsets"]):
        raise FieldError(f"{name}.data_offsets", entry["data_offsets"], abridged(expected))
    return TensorPlace(dtype=dtype, shape=tuple(shape), start=position, stop=stop)


def _elements(name: str, shape: list[int]) -> int:
    """How many numbers a tensor of that shape has; its lengths other than 0 must have a product that is one, too."""
    product = 1
    for length in shape:
        product *= max(length, 1)
        if product >= LARGEST_PRODUCT:
            raise FieldError(f"{name}.shape", shape, "lengths with a product below 2^63")
    return product if 0 not in shape else 0


def _check_size(file: TensorFile, size: int) -> None:
    if size != file.size:
        raise damaged(file.path, f"{size} bytes, expected {file.size}")
