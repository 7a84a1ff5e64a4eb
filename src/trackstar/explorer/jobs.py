"""A queue for jobs that take longer than a request: one runs at a time, with progress and cancellation."""

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
from trackstar.explorer.messages import without_backticks
from trackstar.explorer.question_schemas import Job, JobState
from trackstar.progress import observed
from trackstar.text import printable

MOST_WAITING = 8
MOST_REMEMBERED = 64


class TooManyJobsError(Exception):
    """`MOST_WAITING` jobs are queued already."""


class _Cancelled(BaseException):
    """The user cancelled the job. Not an `Exception`, so that no error handler catches it."""


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Work:
    """A job's state, written by the thread that runs it and read by requests."""

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
    """Runs submitted jobs one at a time, in order; remembers the last `MOST_REMEMBERED`."""

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
            title: Title for the user.
            run: Computes the result, one of the API's.

        Raises:
            TooManyJobsError: `MOST_WAITING` jobs are queued already.
        """
        with self._lock:
            if sum(work.state == "queued" for work in self._works.values()) >= MOST_WAITING:
                raise TooManyJobsError
            work = _Work(job=next(self._numbers), title=title, run=run)
            self._works[work.job] = work
            ended = [number for number, work in self._works.items() if work.state not in ("queued", "running")]
            for number in ended[: max(0, len(self._works) - MOST_REMEMBERED)]:
                del self._works[number]
        self._waiting.put(work)
        return work.described()

    def get(self, job: int) -> Job | None:
        """The job; None if it does not exist or is no longer remembered."""
        work = self._works.get(job)
        return work.described() if work is not None else None

    def cancel(self, job: int) -> Job | None:
        """Stop a job at its next step. None if it does not exist; a job that has ended is left as it is."""
        work = self._works.get(job)
        if work is None:
            return None
        work.cancelled = True
        if work.state == "queued":
            work.state = "cancelled"
        return work.described()

    def close(self) -> None:
        """Cancel all jobs and wait for the thread to end."""
        for work in list(self._works.values()):
            self.cancel(work.job)
        self._waiting.put(None)
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while (work := self._waiting.get()) is not None:
            if not work.cancelled:
                self._run(work)
            work.run = _nothing  # frees what the closure holds

    def _run(self, work: _Work) -> None:
        work.state, work.began = "running", time.monotonic()
        state: JobState = "failed"
        with contextlib.suppress(_Cancelled):
            try:
                with observed(work):
                    work.result = work.run()
                state = "done"
            except TrackstarError as error:
                work.error = printable(without_backticks(str(error)))
            except MemoryError:
                work.error = "out of memory; shorten the text, or restart the explorer with a smaller batch_tokens"
            except _Cancelled:
                state = "cancelled"
                raise
            except Exception as error:
                work.error = f"a defect of trackstar, please report it: {printable(f'{type(error).__name__}: {error}')}"
        work.ended = time.monotonic()
        work.state = state


def _nothing() -> None:
    return None
