"""Reading what will be wanted next while what is there is used; and many small things at the same time."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

AHEAD = 2
"""How many reads are on their way at most."""

AT_ONCE = 16
"""How many small reads are on their way at most."""


def read_ahead(reads: Iterable[Callable[[], Value]]) -> Iterator[Value]:
    """What each read gives, in their order, while threads make the next `AHEAD` of them.

    What a read raises is raised in its turn. None is begun before the first value is asked for.
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


def each(function: Callable[[Item], Value], items: Sequence[Item], *, at_once: bool) -> list[Value]:
    """What a function gives for each item; where `at_once`, for several at the same time."""
    if not at_once or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(AT_ONCE, len(items)), thread_name_prefix="read") as readers:
        try:
            return list(readers.map(function, items))
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise
