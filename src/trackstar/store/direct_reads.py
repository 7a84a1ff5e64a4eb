"""Read a tensor's rows without the page cache, ahead of their use: for stores larger than memory.

Mapped files are fastest for a store that fits into memory. A larger store would evict everything
else and wait for the disk at each page. Here, a thread reads large parts ahead into two alternating
buffers, with O_DIRECT if the file system supports it, else with plain reads whose pages are
released at once.
"""

import errno
import fcntl
import math
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from trackstar.errors import StoreError
from trackstar.store.block_checksums import CODE_BLOCK
from trackstar.store.tensor_file import PAGE, TensorFile, damaged, unreadable
from trackstar.store.tensor_reading import compare_blocks


def direct_rows(file: TensorFile, name: str, rows_per_part: int) -> Iterator[Tensor]:
    """The rows of a tensor in parts of `rows_per_part`; a part is valid until the next one is requested.

    Raises:
        DamagedIndexError: The file was removed or has become too short.
        StoreError: The file cannot be read.
    """
    info = file.tensors[name]
    rows = info.shape[0]
    row_bytes = math.prod(info.shape[1:]) * info.dtype.itemsize
    starts = range(0, rows, rows_per_part)
    # A part is read with all of the blocks that hold it, so that it can be compared with their checksums.
    buffers = [mmap.mmap(-1, _aligned(rows_per_part * row_bytes) + 2 * (PAGE + CODE_BLOCK)) for _ in range(2)]
    checksums = file.checksums
    descriptor = _open(file)

    def read(number: int) -> Tensor:
        first = starts[number]
        count = min(rows_per_part, rows - first)
        begin = info.start + first * row_bytes
        start, stop = begin, begin + count * row_bytes
        if checksums is not None:
            start, stop = checksums.blocks.whole(start, stop)
        offset = start // PAGE * PAGE
        content = memoryview(buffers[number % 2])
        _read(file, descriptor, content[: _aligned(stop - offset)], offset, stop)
        if checksums is not None:
            compare_blocks(file, content, offset, checksums.blocks.covering(start, stop))
        if not _bypasses_cache(descriptor):
            os.posix_fadvise(descriptor, offset, stop - offset, os.POSIX_FADV_DONTNEED)
        numbers = count * row_bytes // info.dtype.itemsize
        flat = torch.frombuffer(buffers[number % 2], dtype=info.dtype, count=numbers, offset=begin - offset)
        return flat.view(count, *info.shape[1:])

    try:
        with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
            waiting = reader.submit(read, 0)
            for number in range(len(starts)):
                part = waiting.result()
                if number + 1 < len(starts):
                    waiting = reader.submit(read, number + 1)
                yield part
    finally:
        os.close(descriptor)


def _open(file: TensorFile) -> int:
    """A descriptor that bypasses the page cache if the file system supports it."""
    for flags in (os.O_DIRECT, 0):
        try:
            return os.open(str(file.path), os.O_RDONLY | os.O_CLOEXEC | flags)
        except FileNotFoundError:
            raise damaged(file.path, "missing") from None
        except OSError as error:
            if not flags or error.errno != errno.EINVAL:
                raise unreadable(file.path, error) from error
    raise AssertionError("unreachable")


def _read(file: TensorFile, descriptor: int, buffer: memoryview, offset: int, stop: int) -> None:
    """Fill the buffer from byte `offset` of the file, at least up to byte `stop`."""
    position = offset
    while position < stop:
        try:
            count = os.preadv(descriptor, [buffer[position - offset :]], position)
        except OSError as error:
            if error.errno == errno.EINVAL and _bypasses_cache(descriptor):
                _read_through_cache(descriptor)  # some file systems accept O_DIRECT and then refuse to read
                continue
            raise StoreError(f"{file.path}: cannot be read ({error.strerror})") from error
        if count == 0:
            raise damaged(file.path, f"ends at byte {position}, expected {file.size} bytes")
        position += count


def _bypasses_cache(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def _read_through_cache(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


def _aligned(size: int) -> int:
    return -(-size // PAGE) * PAGE
