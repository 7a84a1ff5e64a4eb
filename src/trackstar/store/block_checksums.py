"""Checksums of a shard's blocks, so that damage is found in whatever part of the file is read.

A shard's digest covers all of the file, and comparing it means to read all of the file. The
checksums cover blocks: a scan compares each block as it passes, and a read of one row compares the
blocks that hold the row. A checksum is XXH3 with 64 bits, which a processor computes about as fast
as it reads memory. Positions are bytes of the file:

    header | codes, in blocks of 64 KiB | all other tensors, in blocks of 4 KiB | checksums

The tensor `checksums` has one number for the header (with zeros for the digest), one per block, and
one for the numbers before it.
"""

import dataclasses
from collections.abc import Iterable
from typing import final

import numpy as np
import xxhash

CHECKSUMS = "checksums"
"""Name of the tensor, the last one of a file that has it."""

CODE_BLOCK = 64 << 10
SMALL_BLOCK = 4 << 10


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Positions of a file's blocks.

    Attributes:
        start: First byte of the codes, which come first.
        codes_stop: Byte after the codes.
        stop: Byte after the last block, at which the checksums begin.
    """

    start: int
    codes_stop: int
    stop: int

    def moved(self, start: int) -> "Blocks":
        """The same blocks in a file whose codes begin at `start`."""
        shift = start - self.start
        return Blocks(start=start, codes_stop=self.codes_stop + shift, stop=self.stop + shift)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self._code_blocks + -(-(self.stop - self.codes_stop) // SMALL_BLOCK)

    @property
    def checksums(self) -> int:
        """Number of checksums: of the header, of each block, and of these checksums."""
        return self.count + 2

    @property
    def _code_blocks(self) -> int:
        return -(-(self.codes_stop - self.start) // CODE_BLOCK)

    def number(self, position: int) -> int:
        """Number of the block that holds the byte at `position`, counted from 0."""
        if position < self.codes_stop:
            return (position - self.start) // CODE_BLOCK
        return self._code_blocks + (position - self.codes_stop) // SMALL_BLOCK

    def first_byte(self, number: int) -> int:
        """Position of a block's first byte; for the number after the last block, `stop`."""
        if number < self._code_blocks:
            return self.start + number * CODE_BLOCK
        return min(self.stop, self.codes_stop + (number - self._code_blocks) * SMALL_BLOCK)

    def covering(self, first: int, stop: int) -> range:
        """Numbers of the blocks that hold the bytes from `first` to `stop`, which are at least one."""
        return range(self.number(first), self.number(stop - 1) + 1)

    def whole(self, first: int, stop: int) -> tuple[int, int]:
        """The range of bytes, widened to whole blocks."""
        numbers = self.covering(first, stop)
        return self.first_byte(numbers.start), self.first_byte(numbers.stop)


@final
class RunningChecksums:
    """The checksums of a file that is being written.

    Args:
        blocks: Positions of the file's blocks.
        header: The file's header, with zeros for the digest.
    """

    def __init__(self, blocks: Blocks, header: bytes) -> None:
        self._blocks = blocks
        self._found = [xxhash.xxh3_64_intdigest(header)]
        self._position = blocks.start
        self._hash = xxhash.xxh3_64()

    def update(self, content: memoryview) -> None:
        """Add the next bytes of the tensors."""
        while content:
            stop = self._blocks.first_byte(len(self._found))  # of the block that is being read
            part = content[: stop - self._position]
            self._hash.update(part)
            self._position += len(part)
            content = content[len(part) :]
            if self._position == stop:
                self._found.append(self._hash.intdigest())
                self._hash = xxhash.xxh3_64()

    def values(self) -> np.ndarray:
        """The file's checksums [blocks + 2], once all tensors were added."""
        assert len(self._found) == self._blocks.count + 1, len(self._found)
        values = np.array([*self._found, 0], dtype=np.uint64)
        values[-1] = _checksum_of(values[:-1])
        return values.view(np.int64)


class WrongBlockError(Exception):
    """A block's bytes, the header or the checksums are not those that were written.

    Attributes:
        first: First byte of the block.
        stop: Byte after it.
    """

    def __init__(self, first: int, stop: int) -> None:
        super().__init__(first, stop)
        self.first = first
        self.stop = stop


@final
class BlockChecksums:
    """The checksums of a file that is being read. They are read themselves before the first comparison.

    Args:
        blocks: Positions of the file's blocks.
        header: The file's header as it was read, with zeros for the digest.
    """

    def __init__(self, blocks: Blocks, header: bytes) -> None:
        self.blocks = blocks
        self._header = xxhash.xxh3_64_intdigest(header)
        self._values: np.ndarray | None = None

    @property
    def loaded(self) -> bool:
        """Whether the checksums have been read."""
        return self._values is not None

    def load(self, numbers: np.ndarray) -> None:
        """Take the checksums that were read from the file.

        Raises:
            WrongBlockError: The checksums or the header are damaged.
        """
        values = numbers.view(np.uint64)
        if _checksum_of(values[:-1]) != values[-1]:
            raise WrongBlockError(self.blocks.stop, self.blocks.stop + 8 * len(values))
        if values[0] != self._header:
            raise WrongBlockError(0, self.blocks.start)
        self._values = values

    def compare(self, content: memoryview, first: int, numbers: Iterable[int]) -> None:
        """Compare blocks with their checksums.

        Args:
            content: Bytes of the file that include the blocks.
            first: Position of the content's first byte in the file.
            numbers: The blocks' numbers.

        Raises:
            WrongBlockError: A block is damaged.
        """
        assert self._values is not None, "the checksums were not read"
        for number in numbers:
            start, stop = self.blocks.first_byte(number), self.blocks.first_byte(number + 1)
            if xxhash.xxh3_64_intdigest(content[start - first : stop - first]) != self._values[number + 1]:
                raise WrongBlockError(start, stop)


@final
class ComparedBlocks:
    """The blocks of a mapped file that were compared already: a second pass over the map compares none.

    Args:
        blocks: Positions of the file's blocks.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._compared = np.zeros(blocks.count, dtype=np.bool_)

    def rest(self, first: int, stop: int) -> list[int]:
        """Numbers of the blocks that hold the bytes from `first` to `stop` and were not compared before."""
        numbers = self._blocks.covering(first, stop)
        return (np.flatnonzero(~self._compared[numbers.start : numbers.stop]) + numbers.start).tolist()

    def add(self, numbers: list[int]) -> None:
        """Add blocks that were compared."""
        self._compared[numbers] = True


def _checksum_of(values: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(values).data.cast("B"))
