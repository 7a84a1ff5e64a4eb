"""A pool of Ray actors that compute a job's parts: workers come and go, and parts of lost workers are
reassigned.

A worker receives its next part while it computes one, unless too few parts are left for the workers
that have none or are being prepared. A part is taken from its source only when a worker can take it:
at most two parts per worker wait, and as many results, however many parts there are.
"""

import collections
import contextlib
import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, final

from trackstar.errors import ClusterError, TrackstarError
from trackstar.text import first_line
from trackstar.workers.ray_actor import GradientJob, PartResult, ScanJob, Worker

# Parts assigned to a worker at a time: the one that it computes, and the next.
_PARTS_PER_WORKER = 2
# A part is given up once this many workers were lost while they had it.
_MOST_ATTEMPTS = 5
# Seconds between two attempts to add workers; the most that refusals double this to; and seconds
# between two notes about waiting.
_GROW_EVERY, _GROW_SELDOM, _NOTE_EVERY = 5.0, 300.0, 60.0


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Part:
    number: int
    content: Any
    attempts: int = 0


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Member:
    """A worker of the pool."""

    actor: Any
    job: int = -1
    """Number of the job that it is prepared for, or is being prepared for."""
    preparing: Any = None
    """Reference to the result of `Worker.prepare` while that runs."""
    parts: dict[Any, _Part] = dataclasses.field(default_factory=dict)
    """Its parts, by the references to their results."""


@final
class Pool:
    """Workers on a Ray cluster that this process is connected to.

    Args:
        most: Maximum number of workers; None is as many as the cluster has room for.
        cpus: CPU cores per worker.
        gpus: GPUs per worker, or a fraction of one.
        note: Callback that receives a line when workers come or go.
    """

    def __init__(self, *, most: int | None, cpus: int, gpus: float, note: Callable[[str], None]) -> None:
        self._ray: Any = importlib.import_module("ray")
        self._most = most
        self._cpus, self._gpus = cpus, gpus
        self._note = note
        self._members: list[_Member] = []
        self._jobs = 0
        self._last_growth = -math.inf
        self._grow_every = _GROW_EVERY
        self._last_note = time.monotonic()
        self._refused = 0
        self._grow()

    @property
    def size(self) -> int:
        """Number of workers, with those that there is room for now."""
        return len(self._members) + self._room()

    def run(
        self,
        job: GradientJob | ScanJob,
        parts: Iterable[Any],
        *,
        advance: Callable[[int], None],
        note: Callable[[str], None],
    ) -> Iterator[Any]:
        """Results of the job's parts, in the order of the parts.

        Raises:
            TrackstarError: A worker raised it for a part.
            ClusterError: No worker survives a part, or the cluster fails.
        """
        self._jobs += 1
        self._refused, self._grow_every = 0, _GROW_EVERY
        self._note = note
        source = enumerate(parts)
        waiting: collections.deque[_Part] = collections.deque()
        results: dict[int, Any] = {}
        due, exhausted = 0, False
        try:
            reference = self._ray.put(job)
            while True:
                self._grow()
                for member in self._members:
                    self._prepare(member, reference)
                wanted = sum(1 if member.preparing is not None else _PARTS_PER_WORKER for member in self._members)
                while not exhausted and self._assigned + len(waiting) < wanted:
                    if self._assigned + len(waiting) + len(results) >= _PARTS_PER_WORKER * (len(self._members) + 1):
                        break
                    number, content = next(source, (-1, None))
                    exhausted = number < 0
                    if not exhausted:
                        waiting.append(_Part(number=number, content=content))
                self._assign(waiting)
                while due in results:
                    yield results.pop(due)
                    due += 1
                if exhausted and not waiting and not any(member.parts for member in self._members):
                    return
                for part, result in self._completed(waiting):
                    results[part.number] = result.result
                    advance(result.advanced)
                    for line in result.notes:
                        note(line)
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            raise ClusterError(
                f"the Ray cluster fails ({_summary(error)}); check that it runs, and run again"
            ) from error
        finally:
            # Workers finish their parts before they prepare another job. The parts are not cancelled:
            # Ray would let an actor wait half a minute for the cancelled call, and then give it up.
            for member in self._members:
                member.parts.clear()

    def close(self) -> None:
        """Release all workers' resources."""
        for member in self._members:
            # If the cluster is gone, so are its workers.
            with contextlib.suppress(self._ray.exceptions.RayError, ConnectionError):
                self._ray.kill(member.actor)
        self._members.clear()

    @property
    def _assigned(self) -> int:
        """Number of parts that workers have."""
        return sum(len(member.parts) for member in self._members)

    def _assign(self, waiting: collections.deque[_Part]) -> None:
        """Assign a part to each worker without one, then second parts while enough are left for the
        others.
        """
        for parts in range(_PARTS_PER_WORKER):
            for member in self._members:
                idle = sum(not other.parts for other in self._members)
                if member.preparing is None and len(member.parts) == parts and len(waiting) > (idle if parts else 0):
                    part = waiting.popleft()
                    member.parts[member.actor.compute.remote(part.content)] = part

    def _prepare(self, member: _Member, job: Any) -> None:
        """Start a worker's preparation for the current job, unless it has been started."""
        if member.job != self._jobs:
            member.job = self._jobs
            member.preparing = member.actor.prepare.remote(job)

    def _completed(self, waiting: collections.deque[_Part]) -> Iterator[tuple[_Part, PartResult]]:
        """Wait for a call to complete, and yield the completed parts; lost workers' parts wait once more."""
        owners = {member.preparing: member for member in self._members if member.preparing is not None}
        owners |= {reference: member for member in self._members for reference in member.parts}
        if not owners:
            self._note_seldom("the cluster has no worker; waiting for room for one")
            time.sleep(0.5)
            return
        ready, _ = self._call(self._ray.wait, list(owners), num_returns=1, timeout=1.0)
        if not ready and all(member.preparing is not None for member in self._members):
            self._note_seldom("no worker is ready; waiting for the cluster to start one and for it to load its model")
        for reference in ready:
            member = owners[reference]
            if member not in self._members:
                continue
            try:
                result = self._call(self._ray.get, reference)
            except self._ray.exceptions.RayTaskError as error:
                self._handle_error(member, reference, error)
                continue
            except self._ray.exceptions.RayError as error:
                self._handle_loss(member, waiting, error)
                continue
            if reference == member.preparing:
                member.preparing = None
                self._refused, self._grow_every = 0, _GROW_EVERY
            else:
                yield member.parts.pop(reference), result

    @staticmethod
    def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call Ray, and unwrap the `SystemError` that it makes of a signal handler's exception."""
        try:
            return function(*arguments, **options)
        except SystemError as error:
            raise (error.__cause__ or error) from None

    def _handle_error(self, member: _Member, reference: Any, error: Any) -> None:
        """Raise a living worker's error, unless it failed to prepare and other workers are left."""
        cause = error.cause if isinstance(error.cause, TrackstarError) else None
        if reference == member.preparing:
            self._members.remove(member)
            self._ray.kill(member.actor)
            self._count_refusal()
            if self._members:
                self._note(f"a worker cannot be used and is left out: {cause or _summary(error)}")
                return
        raise cause or error.cause or error from None

    def _count_refusal(self) -> None:
        """Double the time until the next worker is tried, up to a limit."""
        self._refused += 1
        self._grow_every = min(2 * self._grow_every, _GROW_SELDOM)

    def _handle_loss(self, member: _Member, waiting: collections.deque[_Part], error: Any) -> None:
        """Remove a worker that is gone, with its node or alone; its parts are the next to be assigned."""
        self._members.remove(member)
        self._ray.kill(member.actor)
        parts = sorted(member.parts.values(), key=lambda part: part.number)
        self._note(
            f"a worker was lost ({_summary(error)}); {len(self._members)} are left, {len(parts)} parts go to them"
        )
        if member.preparing is not None:
            self._count_refusal()
            if self._refused >= _MOST_ATTEMPTS and not self._members:
                raise ClusterError(
                    f"{self._refused} workers were lost while they loaded the model ({_summary(error)}); give a "
                    "worker more memory, or read Ray's logs"
                )
        for part in parts:
            part.attempts += 1
            if part.attempts >= _MOST_ATTEMPTS:
                raise ClusterError(
                    f"part {part.number} was given to {part.attempts} workers, and all were lost ({_summary(error)}); "
                    "try a smaller `batch_tokens`, or read Ray's logs"
                )
        waiting.extendleft(reversed(parts))
        if member.preparing is None:
            self._last_growth = -math.inf

    def _grow(self) -> None:
        """Start workers if the cluster has room for more."""
        now = time.monotonic()
        if self._refused >= 2 * _MOST_ATTEMPTS and not self._members:
            raise ClusterError(
                f"{self._refused} workers could not be used or were lost while they were prepared, and none is left; "
                "read Ray's logs"
            )
        if now - self._last_growth < (self._grow_every if self._members else _GROW_EVERY):
            return
        self._last_growth = now
        room = self._room()
        for _ in range(room):
            actor_class = self._ray.remote(Worker).options(
                num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, scheduling_strategy="SPREAD"
            )
            self._members.append(_Member(actor=actor_class.remote(self._cpus, self._gpus)))
        if room > 0:
            gpus = f", {self._gpus:g} GPU{'s' if self._gpus > 1 else ''} each" if self._gpus else ""
            self._note(f"cluster: {len(self._members)} workers{gpus}")

    def _room(self) -> int:
        """Number of further workers that the cluster has room for now."""
        needed = {"cpus": self._cpus, "gpus": self._gpus}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        # Available resources are reported late, and summed over nodes; each node's total bounds them.
        most = sum(workers_within(node, **needed) for node in nodes)
        most = most if self._most is None else min(most, self._most)
        free = workers_within(self._ray.available_resources(), **needed)
        return max(0, min(free, most - len(self._members)))

    def _note_seldom(self, line: str) -> None:
        """Pass a note on, unless one was passed within the last `_NOTE_EVERY` seconds."""
        if time.monotonic() - self._last_note > _NOTE_EVERY:
            self._note(line)
            self._last_note = time.monotonic()


def workers_within(resources: Mapping[str, float], *, cpus: int, gpus: float) -> int:
    """Number of workers with these cores and GPUs that the resources suffice for."""
    room = int(resources.get("CPU", 0) // cpus)
    return min(room, int(resources.get("GPU", 0) / gpus)) if gpus else room


def _summary(error: BaseException) -> str:
    """An error's type and first line; Ray's errors run over pages."""
    return f"{type(error).__name__}: {first_line(error)}"
