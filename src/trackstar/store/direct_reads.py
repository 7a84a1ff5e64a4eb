"""Reading a tensor's rows past the page cache, the next part while one is used: for stores larger than memory.

Mapped memory is best for what fits into it. A larger store would push everything else out and wait for the disk at
every page; here large parts are read ahead by a thread into two buffers that are used in turn (O_DIRECT, where the file
system has it; elsewhere plain reads, whose pages are given back at once).
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
from trackstar.store.tensor_file import PAGE, TensorFile, damaged


def direct_rows(file: TensorFile, name: str, rows_per_part: int) -> Iterator[Tensor]:
    """Consecutive rows of a tensor, `rows_per_part` at a time; each part may be used until the next is asked for.

    Raises:
        DamagedIndexError: The file is gone or has become too short.
        StoreError: It cannot be read.
    """
    place = file.places[name]
    rows = place.shape[0]
    row_bytes = math.prod(place.shape[1:]) * place.dtype.itemsize
    starts = range(0, rows, rows_per_part)
    buffers = [mmap.mmap(-1, _aligned(rows_per_part * row_bytes) + 2 * PAGE) for _ in range(2)]
    descriptor = _opened(file)

    def read(number: int) -> Tensor:
        first = starts[number]
        count = min(rows_per_part, rows - first)
        begin = place.start + first * row_bytes
        stop = begin + count * row_bytes
        offset = begin // PAGE * PAGE
        _read(file, descriptor, memoryview(buffers[number % 2])[: _aligned(stop - offset)], offset, stop)
        if not _passes_cache_by(descriptor):
            os.posix_fadvise(descriptor, offset, stop - offset, os.POSIX_FADV_DONTNEED)
        numbers = count * row_bytes // place.dtype.itemsize
        flat = torch.frombuffer(buffers[number % 2], dtype=place.dtype, count=numbers, offset=begin - offset)
        return flat.view(count, *place.shape[1:])

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


def _opened(file: TensorFile) -> int:
    """A descriptor that reads past the page cache, where the file system can."""
    for flags in (os.O_DIRECT, 0):
        try:
            return os.open(str(file.path), os.O_RDONLY | os.O_CLOEXEC | flags)
        except FileNotFoundError:
            raise damaged(file.path, "missing, expected it to be there") from None
        except OSError as error:
            if not flags or error.errno != errno.EINVAL:
                raise StoreError(f"{file.path}: cannot be read ({error.strerror}); make the file readable") from error
    raise AssertionError("unreachable")


def _read(file: TensorFile, descriptor: int, buffer: memoryview, offset: int, stop: int) -> None:
    """Fill the buffer from `offset` on, at least up to `stop`."""
    position = offset
    while position < stop:
        try:
            count = os.preadv(descriptor, [buffer[position - offset :]], position)
        except OSError as error:
            if error.errno == errno.EINVAL and _passes_cache_by(descriptor):
                _read_through_cache(descriptor)  # some file systems take O_DIRECT and then refuse to read so
                continue
            raise StoreError(f"{file.path}: cannot be read ({error.strerror})") from error
        if count == 0:
            raise damaged(file.path, f"ends at byte {position}, expected {file.size} bytes")
        position += count


def _passes_cache_by(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def _read_through_cache(descriptor: int) -> None:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_DIRECT)


def _aligned(size: int) -> int:
    return -(-size // PAGE) * PAGE
