"""Work that takes longer than a request: one job at a time on a thread, observed while it runs, cancelled on demand."""

import contextlib
import dataclasses
import itertools
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from trackstar.errors import TrackstarError
from trackstar.explorer.schemas import Job, JobState
from trackstar.progress import observed, printable

MOST_WAITING = 8
MOST_KEPT = 64


class TooManyJobsError(Exception):
    """As many jobs wait as may wait."""


class _Cancelled(BaseException):
    """The person does not want the result any more; no handler of errors may take it for one."""


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Work:
    """A job's state; written by the thread that runs it, read by requests."""

    job: int
    title: str
    run: Callable[[], Any]
    state: JobState = "queued"
    done: int = 0
    total: int | None = None
    unit: str = ""
    began: float = 0.0
    ended: float = 0.0
    error: str | None = None
    result: Any = None
    cancelled: bool = False

    def started(self, title: str, unit: str, total: int | None) -> None:
        """See `ProgressObserver`."""
        self._check()
        self.title, self.unit, self.total, self.done = title, unit, total, 0

    def advanced(self, amount: int) -> None:
        """See `ProgressObserver`."""
        self.done += amount
        self._check()

    def _check(self) -> None:
        if self.cancelled:
            raise _Cancelled

    def described(self) -> Job:
        """The job as the API gives it."""
        end = self.ended or time.monotonic()
        return Job(
            job=self.job,
            title=self.title,
            state=self.state,
            done=self.done,
            total=self.total,
            unit=self.unit,
            seconds=end - self.began if self.began else 0.0,
            error=self.error,
            result=self.result,
        )


class Jobs:
    """Jobs in the order in which they were asked for, one at a time; the last `MOST_KEPT` are remembered."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._works: OrderedDict[int, _Work] = OrderedDict()
        self._waiting: queue.Queue[_Work | None] = queue.Queue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, title: str, run: Callable[[], Any]) -> Job:
        """Queue a job.

        Args:
            title: What it does, for people.
            run: Gives its result, one of the API's.

        Raises:
            TooManyJobsError: `MOST_WAITING` wait already.
        """
        with self._lock:
            if sum(work.state == "queued" for work in self._works.values()) >= MOST_WAITING:
                raise TooManyJobsError
            work = _Work(job=next(self._numbers), title=title, run=run)
            self._works[work.job] = work
            ended = [number for number, one in self._works.items() if one.state not in ("queued", "running")]
            for number in ended[: max(0, len(self._works) - MOST_KEPT)]:
                del self._works[number]
        self._waiting.put(work)
        return work.described()

    def get(self, job: int) -> Job | None:
        """The job; None where there is none, or none any more."""
        work = self._works.get(job)
        return work.described() if work is not None else None

    def cancel(self, job: int) -> Job | None:
        """Stop a job at its next step; None where there is none. A job that has ended stays as it is."""
        work = self._works.get(job)
        if work is None:
            return None
        work.cancelled = True
        if work.state == "queued":
            work.state = "cancelled"
        return work.described()

    def close(self) -> None:
        """Cancel what runs and what waits, and wait for the thread to end."""
        for work in list(self._works.values()):
            self.cancel(work.job)
        self._waiting.put(None)
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while (work := self._waiting.get()) is not None:
            if not work.cancelled:
                self._run(work)
            work.run = _nothing  # what it holds can go

    def _run(self, work: _Work) -> None:
        work.state, work.began = "running", time.monotonic()
        state: JobState = "failed"
        with contextlib.suppress(_Cancelled):
            try:
                with observed(work):
                    work.result = work.run()
                state = "done"
            except TrackstarError as error:
                work.error = printable(str(error))
            except MemoryError:
                work.error = "memory ran out; ask for a shorter text or start with a smaller --batch-tokens"
            except _Cancelled:
                state = "cancelled"
                raise
            except Exception as error:
                work.error = f"a defect of trackstar, please report it: {printable(f'{type(error).__name__}: {error}')}"
        work.ended = time.monotonic()
        work.state = state


def _nothing() -> None:
    return None
