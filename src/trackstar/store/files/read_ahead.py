"""Read in threads: the next parts of a file while one is in use, or many small parts at the same time."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

AHEAD = 2
"""Largest number of reads that run ahead of their use."""

PARALLEL_READS = 16
"""Largest number of small reads at the same time."""


def read_ahead(reads: Iterable[Callable[[], Value]]) -> Iterator[Value]:
    """The results of reads, in order, while threads run the next `AHEAD` reads.

    An error of a read is raised when its result is due. The first read begins when the first result
    is requested.
    """
    waiting: collections.deque[Future[Value]] = collections.deque()
    with ThreadPoolExecutor(AHEAD, thread_name_prefix="read") as readers:
        try:
            for read in reads:
                waiting.append(readers.submit(read))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def read_each(read: Callable[[Item], Value], items: Sequence[Item], *, parallel: bool) -> list[Value]:
    """The result of a read for each item; if `parallel`, up to `PARALLEL_READS` run at the same time."""
    if not parallel or len(items) < 2:
        return [read(item) for item in items]
    with ThreadPoolExecutor(min(PARALLEL_READS, len(items)), thread_name_prefix="read") as readers:
        try:
            return list(readers.map(read, items))
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise
