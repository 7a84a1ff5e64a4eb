"""One file of named tensors: valid safetensors with a digest over all of it; equal content gives equal bytes.

    8 bytes     N, little-endian: the length of the header
    N bytes     the header: JSON, then spaces so that the data begin at a multiple of 4096
    the rest    the tensors' bytes, one after the other

The header begins with `{"__metadata__":{"digest":"` and 64 hexadecimal digits: the BLAKE2b-256 of
the whole file with these 64 bytes as zeros ("0"). FORMAT.md has every detail. `tensor_reading.py`
reads the data.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trackstar.corpus.digests import running_digest
from trackstar.errors import DamagedIndexError, StoreError
from trackstar.store.block_checksums import CHECKSUMS, BlockChecksums, Blocks, RunningChecksums
from trackstar.store.files import remote as remote_files
from trackstar.store.files.durable import PARTIAL_SUFFIX, replacing, write_all
from trackstar.store.files.places import Place, RemotePath
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
class TensorInfo:
    """A tensor's dtype, shape and position in the file: its first byte and the byte after its last."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorFile:
    """A file of named tensors whose header has been read and agrees with the file's size.

    Attributes:
        path: The file.
        digest: Digest in the header; `check_digest` compares it with the content.
        metadata: Strings in the header by name, without the digest.
        tensors: Position, dtype and shape of each tensor by name, in the file's order.
        size: Length in bytes.
        checksums: Checksums of its blocks; None for a file that has none.
    """

    path: Place
    digest: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    size: int
    checksums: BlockChecksums | None


def damaged(path: Place, problem: str) -> DamagedIndexError:
    """The error for a damaged file of an index."""
    return DamagedIndexError(
        f"{path}: {problem}; restore the file from a copy, or delete it and make the index again with the same settings"
    )


def unreadable(path: Place, error: OSError) -> StoreError:
    """The error for a file that this process cannot read."""
    return StoreError(f"{path}: cannot be read ({error.strerror}); make the file readable")


def sorted_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by decreasing item size, which aligns each to its item size, then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def write_tensor_file(
    path: Place,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    checksums: bool = False,
    partial_suffix: str = PARTIAL_SUFFIX,
) -> str:
    """Write a file of tensors, durably.

    Contiguous tensors in main memory are written without a copy.

    Args:
        path: The file.
        tensors: The tensors by name, in the order in which they are written.
        metadata: Strings for the header.
        checksums: Whether to add checksums of blocks; the first tensor is in large blocks.
        partial_suffix: See `replacing`.

    Returns:
        The file's digest.

    Raises:
        StoreError: The file cannot be written; nothing of it remains.
    """
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
    blocks = Blocks(start=0, codes_stop=sizes[0], stop=sum(sizes)) if checksums else None
    placeholder = {CHECKSUMS: torch.empty(blocks.checksums, dtype=torch.int64)} if blocks is not None else {}
    header = _header({**tensors, **placeholder}, metadata)
    running = running_digest(256)
    running.update(header)
    block_sums = RunningChecksums(blocks.moved(len(header)), header) if blocks is not None else None
    with replacing(path, partial_suffix=partial_suffix) as descriptor:
        write_all(descriptor, header)
        for chunk in _data_chunks(tensors):
            running.update(chunk)
            if block_sums is not None:
                block_sums.update(chunk)
            write_all(descriptor, chunk)
        if block_sums is not None:
            values = block_sums.values().tobytes()
            running.update(values)
            write_all(descriptor, values)
        digest = running.hexdigest()
        os.lseek(descriptor, DIGEST_OFFSET, os.SEEK_SET)
        write_all(descriptor, digest.encode("ascii"))
    return digest


def tensor_file_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The digest of the file that `write_tensor_file` would write."""
    running = running_digest(256)
    running.update(_header(tensors, metadata))
    for chunk in _data_chunks(tensors):
        running.update(chunk)
    return running.hexdigest()


def open_tensor_file(path: Place) -> TensorFile:
    """Read a file's header and compare it with the file's size; the data are not read.

    Raises:
        DamagedIndexError: The file is missing or has the wrong length, or `write_tensor_file`
            cannot have written its header.
        StoreError: The file cannot be read.
    """
    try:
        header, size = _read_header(path) if isinstance(path, Path) else _read_remote_header(path)
    except FileNotFoundError:
        raise damaged(path, "missing") from None
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        return _parse_header(path, header, size)
    except FieldError as error:
        raise damaged(path, f"in the header {error}") from error


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The file's first bytes, up to its data, with zeros for the digest."""
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
    """A file's header, without the eight bytes before it, and the file's size."""
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
    data_start = position = 8 + len(header)
    tensors = {}
    for name, entry in fields.items():
        tensors[name] = _parse_tensor(name, entry, position, data_start)
        position = tensors[name].stop
    if position != size:
        raise damaged(path, f"{size} bytes, expected {position}")
    checksums = _block_checksums(header, tensors)
    return TensorFile(path=path, digest=digest, metadata=metadata, tensors=tensors, size=size, checksums=checksums)


def _block_checksums(header: bytes, tensors: Mapping[str, TensorInfo]) -> BlockChecksums | None:
    """The checksums of a file's blocks, unread; None if it has none."""
    infos = list(tensors.values())
    if CHECKSUMS not in tensors or len(infos) < 2:
        return None
    first, last = infos[0], infos[-1]
    blocks = Blocks(start=first.start, codes_stop=first.stop, stop=last.start)
    if tensors[CHECKSUMS] is not last or (last.dtype, last.shape) != (torch.int64, (blocks.checksums,)):
        raise FieldError(CHECKSUMS, f"{last.dtype} {list(last.shape)}", f"int64 [{blocks.checksums}], the last tensor")
    rest = header[len(HEADER_START) + DIGEST_LENGTH :]
    written = len(header).to_bytes(8, "little") + HEADER_START + NO_DIGEST.encode("ascii") + rest
    return BlockChecksums(blocks, written)


def _parse_tensor(name: str, entry: Any, position: int, data_start: int) -> TensorInfo:
    """Parse a header's entry of a tensor that must begin at byte `position` of the file."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FieldError(name, entry, "dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise FieldError(f"{name}.dtype", entry["dtype"], f"one of {', '.join(DTYPES)}")
    shape = entry["shape"]
    if not (isinstance(shape, list) and all(type(length) is int and length >= 0 for length in shape)):
        raise FieldError(f"{name}.shape", shape, "a list of whole numbers, none negative")
    stop = position + _element_count(name, shape) * dtype.itemsize
    expected = [position - data_start, stop - data_start]
    if entry["data_offsets"] != expected or any(type(offset) is not int for offset in entry["data_offsets"]):
        raise FieldError(f"{name}.data_offsets", entry["data_offsets"], abridged(expected))
    return TensorInfo(dtype=dtype, shape=tuple(shape), start=position, stop=stop)


def _element_count(name: str, shape: list[int]) -> int:
    """Number of elements of a tensor; the product of its lengths, leaving out zeros, must be below 2^63."""
    product = 1
    for length in shape:
        product *= max(length, 1)
        if product >= LARGEST_PRODUCT:
            raise FieldError(f"{name}.shape", shape, "lengths with a product below 2^63")
    return product if 0 not in shape else 0
