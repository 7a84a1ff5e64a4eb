"""Read the tensors of an open file: mapped, in parts, or whole after a check of the digest.

What is read in parts is compared with the checksums of its blocks, if the file has any.
"""

import bisect
import functools
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from trackstar.corpus.digests import running_digest
from trackstar.errors import DamagedIndexError, StoreError
from trackstar.store.block_checksums import BlockChecksums, ComparedBlocks, WrongBlockError
from trackstar.store.files import remote as remote_files
from trackstar.store.files.durable import write_all
from trackstar.store.files.read_ahead import read_ahead
from trackstar.store.tensor_file import (
    CHUNK,
    DIGEST_LENGTH,
    DIGEST_OFFSET,
    NO_DIGEST,
    TensorFile,
    TensorInfo,
    damaged,
    unreadable,
)

_Part = tuple[int, memoryview]  # position of the first byte in the file, and the buffer to fill
_NUMPY_DTYPES = {torch.int64: np.int64, torch.int32: np.int32, torch.float32: np.float32, torch.uint8: np.uint8}


def check_digest(file: TensorFile) -> None:
    """Read the whole file and compare it with its digest.

    Raises:
        DamagedIndexError: The content has another digest.
        StoreError: The file cannot be read.
    """
    if not isinstance(file.path, Path):
        _check_chunks(file, _remote_chunks(file))
        return
    try:
        with file.path.open("rb") as stream:
            _check_chunks(file, iter(lambda: stream.read(CHUNK), b""))
    except OSError as error:
        raise unreadable(file.path, error) from error


def checked_tensors(file: TensorFile) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped, after a comparison with its digest.

    A file on another file system is downloaded once, to a nameless temporary file that is then
    mapped, so that the operating system can reclaim the memory.

    Raises:
        DamagedIndexError: The content has another digest.
        StoreError: The file cannot be read.
    """
    if isinstance(file.path, Path):
        check_digest(file)
        return mapped_tensors(file)
    mapped = _local_copy(file)
    return {name: _view(mapped, info) for name, info in file.tensors.items()}


def mapped_tensors(file: TensorFile) -> dict[str, Tensor]:
    """All tensors of a local file, memory-mapped, as they are."""
    return {name: map_tensor(file, name) for name in file.tensors}


def file_state(path: Path) -> Int64[Tensor, "5"]:
    """Device, inode, size and times of a file, which change when its content does.

    Raises:
        StoreError: The file cannot be looked at.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return torch.tensor([status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns])


def map_tensor(file: TensorFile, name: str) -> Tensor:
    """A tensor, memory-mapped without a copy: pages are read when they are used.

    Writing to the tensor changes this process's pages, never the file. From another file system the
    whole tensor is read into memory.

    Raises:
        DamagedIndexError: The file was removed or has become shorter since it was opened.
        StoreError: The file cannot be mapped.
    """
    info = file.tensors[name]
    if info.size == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    if not isinstance(file.path, Path):
        return _read_remote_tensor(file, info)
    try:
        with file.path.open("rb") as stream:
            _check_size(file, os.fstat(stream.fileno()).st_size)
            mapped = mmap.mmap(stream.fileno(), file.size, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise damaged(file.path, "missing") from None
    except OSError as error:
        raise StoreError(f"{file.path}: cannot be mapped into memory ({error.strerror})") from error
    return _view(mapped, info)


def compare_mapped(file: TensorFile, codes: Tensor, first: int, stop: int, compared: ComparedBlocks | None) -> None:
    """Compare rows of a file's first tensor, mapped or read whole, with the checksums of their blocks.

    Args:
        file: The file.
        codes: All rows of its first tensor.
        first: The first row.
        stop: The row after the last.
        compared: The blocks that were compared already, which is updated; None compares all.

    Raises:
        DamagedIndexError: A block is damaged.
        StoreError: The checksums cannot be read.
    """
    checksums = file.checksums
    if checksums is None or first == stop:
        return
    content = codes.view(torch.uint8).numpy().reshape(-1).data
    row_bytes, start = len(content) // len(codes), checksums.blocks.start
    first_byte, stop_byte = start + first * row_bytes, start + stop * row_bytes
    numbers: Sequence[int] = checksums.blocks.covering(first_byte, stop_byte)
    if compared is not None:
        numbers = compared.rest(first_byte, stop_byte)
    compare_blocks(file, content, start, numbers)
    if compared is not None:
        compared.add(list(numbers))


def compare_blocks(file: TensorFile, content: memoryview, first: int, numbers: Sequence[int]) -> None:
    """Compare blocks of a file with their checksums, which are read before the first comparison.

    Args:
        file: A file with checksums.
        content: Bytes of the file that include the blocks.
        first: Position in the file of the content's first byte.
        numbers: The blocks' numbers.

    Raises:
        DamagedIndexError: A block is damaged.
        StoreError: The checksums cannot be read.
    """
    if not numbers:
        return
    checksums = file.checksums
    assert checksums is not None, "the file has no checksums"
    try:
        if not checksums.loaded:
            _load_checksums(file, checksums)
        checksums.compare(content, first, numbers)
    except WrongBlockError as error:
        raise _wrong_block(file, error) from None


def fill_from(file: TensorFile, targets: Sequence[tuple[int, memoryview]]) -> None:
    """Read parts of a file on another file system; see `remote.fill`.

    Raises:
        DamagedIndexError: The file was removed, has become shorter or is damaged.
        StoreError: The file cannot be read.
    """
    _fill_compared(file, targets, functools.partial(_fill_from_remote, file))


def _fill_compared(file: TensorFile, targets: Sequence[_Part], fill: Callable[[Sequence[_Part]], None]) -> None:
    """Read parts of a file with the rest of their blocks, and compare the blocks with their checksums.

    Args:
        file: The file; without checksums, only the parts are read.
        targets: Position of each part's first byte in the file, and the buffer that it fills.
        fill: Reads such parts without a comparison.
    """
    checksums = file.checksums
    targets = [(first, part) for first, part in targets if len(part)]
    if checksums is None:
        fill(targets)
        return
    spans = _joined([checksums.blocks.whole(first, first + len(part)) for first, part in targets])
    contents = [memoryview(bytearray(stop - first)) for first, stop in spans]
    starts = [first for first, _ in spans]
    reads = list(zip(starts, contents, strict=True))
    numbers = None if checksums.loaded else np.empty(checksums.blocks.checksums, dtype=np.int64)
    if numbers is not None:
        reads.append((checksums.blocks.stop, numbers.data.cast("B")))
    fill(reads)
    try:
        if numbers is not None:
            checksums.load(numbers)
        for (first, stop), content in zip(spans, contents, strict=True):
            checksums.compare(content, first, checksums.blocks.covering(first, stop))
    except WrongBlockError as error:
        raise _wrong_block(file, error) from None
    for first, part in targets:
        span = bisect.bisect_right(starts, first) - 1
        part[:] = contents[span][first - starts[span] : first - starts[span] + len(part)]


def _fill_from_remote(file: TensorFile, targets: Sequence[_Part]) -> None:
    assert not isinstance(file.path, Path), file.path
    try:
        remote_files.fill(file.path, targets)
    except FileNotFoundError:
        raise damaged(file.path, "missing") from None
    except remote_files.CutOffError as error:
        raise damaged(file.path, f"ends at byte {error.size}, expected {file.size} bytes") from None


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of bytes in ascending order; those that overlap or touch become one."""
    joined: list[tuple[int, int]] = []
    for first, stop in sorted(spans):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((first, stop))
    return joined


def _load_checksums(file: TensorFile, checksums: BlockChecksums) -> None:
    """Read a file's checksums.

    Raises:
        WrongBlockError: They are damaged.
    """
    numbers = np.empty(checksums.blocks.checksums, dtype=np.int64)
    targets = [(checksums.blocks.stop, numbers.data.cast("B"))]
    if isinstance(file.path, Path):
        with TensorFileReader(file) as reader:
            reader.fill(targets)
    else:
        _fill_from_remote(file, targets)
    checksums.load(numbers)


def _wrong_block(file: TensorFile, error: WrongBlockError) -> DamagedIndexError:
    """The error for a damaged block, which names what lies in it."""
    names = [name for name, info in file.tensors.items() if info.start < error.stop and error.first < info.stop]
    part = "the header"
    if names:
        part = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    first = file.tensors[names[0]] if names else None
    if first is not None and len(names) == 1 and len(first.shape) == 2:
        row_bytes = first.size // first.shape[0]
        rows = (error.first - first.start) // row_bytes, (min(error.stop, first.stop) - 1 - first.start) // row_bytes
        part += f" of rows {rows[0]} to {rows[1]}"
    return damaged(file.path, f"bytes {error.first} to {error.stop} ({part}) are not those that were written")


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
            raise damaged(file.path, "missing") from None
        except OSError as error:
            raise unreadable(file.path, error) from error

    def __enter__(self) -> "TensorFileReader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements `first` to `stop` of a tensor, in the file's order, as a new flat array.

        Raises:
            DamagedIndexError: The file has become too short.
            StoreError: The file cannot be read.
        """
        stop = math.prod(self._file.tensors[name].shape) if stop is None else stop
        return self.read_several([(name, first, stop)])[0]

    def read_several(self, parts: Sequence[tuple[str, int, int]]) -> list[np.ndarray]:
        """Elements of several tensors; from another file system they are requested together.

        Args:
            parts: Name of the tensor, its first element and the element after the last, for each
                part.

        Raises:
            DamagedIndexError: The file has become too short.
            StoreError: The file cannot be read.
        """
        arrays, targets = [], []
        for name, first, stop in parts:
            info = self._file.tensors[name]
            array = np.empty(stop - first, dtype=_NUMPY_DTYPES[info.dtype])
            arrays.append(array)
            targets.append((info.start + first * array.itemsize, array.data.cast("B")))
        if self._descriptor < 0:
            fill_from(self._file, targets)
        else:
            _fill_compared(self._file, targets, self.fill)
        return arrays

    def fill(self, targets: Sequence[_Part]) -> None:
        """Fill buffers from a local file, without a comparison with checksums.

        Args:
            targets: Position of each part's first byte in the file, and the buffer that it fills.

        Raises:
            DamagedIndexError: The file has become too short.
            StoreError: The file cannot be read.
        """
        for first, target in targets:
            remaining, offset = target, first
            while remaining:
                try:
                    count = os.preadv(self._descriptor, [remaining], offset)
                except OSError as error:
                    raise StoreError(f"{self._file.path}: cannot be read ({error.strerror})") from error
                if count == 0:
                    raise damaged(self._file.path, f"ends at byte {offset}, expected {self._file.size} bytes")
                remaining, offset = remaining[count:], offset + count


def _check_chunks(file: TensorFile, chunks: Iterator[bytes | bytearray]) -> None:
    """Compare a file's content, given in chunks, with its digest, which counts its own 64 digits as zeros."""
    running = running_digest(256)
    head = bytearray(next(chunks, b""))
    place = slice(DIGEST_OFFSET, DIGEST_OFFSET + DIGEST_LENGTH)
    head[place] = NO_DIGEST[: len(head[place])].encode("ascii")
    running.update(head)
    for chunk in chunks:
        running.update(chunk)
    if running.hexdigest() != file.digest:
        raise damaged(file.path, f"its content has digest {running.hexdigest()}, expected {file.digest}")


def _remote_chunks(file: TensorFile) -> Iterator[bytearray]:
    """The bytes of a file on another file system, chunk by chunk, read ahead."""

    def read(first: int) -> bytearray:
        chunk = bytearray(min(remote_files.PART_BYTES, file.size - first))
        _fill_from_remote(file, [(first, memoryview(chunk))])
        return chunk

    return read_ahead(functools.partial(read, first) for first in range(0, file.size, remote_files.PART_BYTES))


def _local_copy(file: TensorFile) -> mmap.mmap:
    """The bytes of a remote file, compared with its digest and mapped from a nameless local copy."""
    try:
        with tempfile.TemporaryFile(prefix="trackstar-", buffering=0) as copy:

            def copied_chunks() -> Iterator[bytearray]:
                for chunk in _remote_chunks(file):
                    write_all(copy.fileno(), chunk)
                    yield chunk

            _check_chunks(file, copied_chunks())
            return mmap.mmap(copy.fileno(), file.size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise remote_files.no_local_space(file.path, "copied to", error) from error


def _read_remote_tensor(file: TensorFile, info: TensorInfo) -> Tensor:
    assert not isinstance(file.path, Path), file.path
    try:
        _check_size(file, remote_files.size_of(file.path))
    except FileNotFoundError:
        raise damaged(file.path, "missing") from None
    content = bytearray(info.size)
    fill_from(file, [(info.start, memoryview(content))])
    return torch.frombuffer(content, dtype=info.dtype).view(info.shape)


def _view(mapped: mmap.mmap, info: TensorInfo) -> Tensor:
    if info.size == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    flat = torch.frombuffer(mapped, dtype=info.dtype, count=math.prod(info.shape), offset=info.start)
    return flat.view(info.shape)


def _check_size(file: TensorFile, size: int) -> None:
    if size != file.size:
        raise damaged(file.path, f"{size} bytes, expected {file.size}")
