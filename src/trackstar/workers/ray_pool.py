"""A pool of Ray actors that do parts of an order: parts of lost workers are done again, workers may come and go.

A worker is asked for its next part while it does one, unless too few are left for those that have none or get ready. No
part is taken from its source before there is somebody for it: what waits is two parts a worker, and as many results,
whatever the number of parts.
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
from trackstar.workers.ray_actor import Done, GradientOrder, ScanOrder, Worker

# Parts that a worker has at a time: the one that it does, and the next.
_AT_A_TIME = 2
# A part that this many workers did not survive is not given to another.
_MOST_ATTEMPTS = 5
# How often, in seconds, is looked whether there is room for a further worker; how seldom at least, where some have been
# refused; and how often waiting is said.
_GROW_EVERY, _GROW_SELDOM, _SAY_EVERY = 5.0, 300.0, 60.0


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Part:
    number: int
    content: Any
    attempts: int = 0


@dataclasses.dataclass(slots=True, kw_only=True, eq=False)
class _Member:
    """A worker of the pool."""

    actor: Any
    order: int = -1
    """Number of the order that it is prepared for, or is being prepared for."""
    preparing: Any = None
    """A reference to the worker's name, until that is there."""
    parts: dict[Any, _Part] = dataclasses.field(default_factory=dict)


@final
class Pool:
    """Workers on a Ray cluster that this process is connected to.

    Args:
        most: How many workers at most; None is as many as the cluster has room for.
        cpus: CPU cores of a worker.
        gpus: GPUs of a worker, or a fraction of one.
        note: Told of workers that come and go.
    """

    def __init__(self, *, most: int | None, cpus: int, gpus: float, note: Callable[[str], None]) -> None:
        self._ray: Any = importlib.import_module("ray")
        self._most = most
        self._cpus, self._gpus = cpus, gpus
        self._note = note
        self._members: list[_Member] = []
        self._orders = 0
        self._grown = -math.inf
        self._grow_every = _GROW_EVERY
        self._said = time.monotonic()
        self._refused = 0
        self._grow()

    @property
    def size(self) -> int:
        """How many workers there are, and could be at once."""
        return len(self._members) + self._room()

    def do(
        self,
        order: GradientOrder | ScanOrder,
        parts: Iterable[Any],
        *,
        advance: Callable[[int], None],
        note: Callable[[str], None],
    ) -> Iterator[Any]:
        """Results of the parts, in the parts' order.

        Raises:
            TrackstarError: A part has none; the error is what the worker raised.
            ClusterError: No worker survives a part, or the cluster is gone.
        """
        self._orders += 1
        self._refused, self._grow_every = 0, _GROW_EVERY
        self._note = note
        source = enumerate(parts)
        waiting: collections.deque[_Part] = collections.deque()
        results: dict[int, Any] = {}
        due, exhausted = 0, False
        try:
            reference = self._ray.put(order)
            while True:
                self._grow()
                for member in self._members:
                    self._prepared(member, reference)
                wanted = sum(1 if member.preparing is not None else _AT_A_TIME for member in self._members)
                while not exhausted and self._given + len(waiting) < wanted:
                    if self._given + len(waiting) + len(results) >= _AT_A_TIME * (len(self._members) + 1):
                        break
                    number, content = next(source, (-1, None))
                    exhausted = number < 0
                    if not exhausted:
                        waiting.append(_Part(number=number, content=content))
                self._give(waiting)
                while due in results:
                    yield results.pop(due)
                    due += 1
                if exhausted and not waiting and not any(member.parts for member in self._members):
                    return
                for part, done in self._next(waiting):
                    results[part.number] = done.result
                    advance(done.advanced)
                    for line in done.notes:
                        note(line)
        except (self._ray.exceptions.RayError, ConnectionError) as error:
            raise ClusterError(
                f"the Ray cluster fails ({_one_line(error)}); see that it runs, and run again"
            ) from error
        finally:
            # Workers finish what they have before they get ready for another order. It is not cancelled: Ray then lets
            # an actor wait half a minute for the call that does not come, and gives it up.
            for member in self._members:
                member.parts.clear()

    def close(self) -> None:
        """Give all workers' resources back."""
        for member in self._members:
            # Where the cluster is gone, so are they.
            with contextlib.suppress(self._ray.exceptions.RayError, ConnectionError):
                self._ray.kill(member.actor)
        self._members.clear()

    @property
    def _given(self) -> int:
        """How many parts workers have."""
        return sum(len(member.parts) for member in self._members)

    def _give(self, waiting: collections.deque[_Part]) -> None:
        """Give parts to workers: to each that has none, then further ones while enough are left for those without."""
        for parts in range(_AT_A_TIME):
            for member in self._members:
                free = sum(not other.parts for other in self._members)
                if member.preparing is None and len(member.parts) == parts and len(waiting) > (free if parts else 0):
                    part = waiting.popleft()
                    member.parts[member.actor.do.remote(part.content)] = part

    def _prepared(self, member: _Member, order: Any) -> None:
        """Have a worker prepared for the present order."""
        if member.order != self._orders:
            member.order = self._orders
            member.preparing = member.actor.prepare.remote(order)

    def _next(self, waiting: collections.deque[_Part]) -> Iterator[tuple[_Part, Done]]:
        """What is done next, once something is; lost workers' parts wait again."""
        owners = {member.preparing: member for member in self._members if member.preparing is not None}
        owners |= {reference: member for member in self._members for reference in member.parts}
        if not owners:
            self._say("no worker is there; waiting until the cluster has room for one")
            time.sleep(0.5)
            return
        ready, _ = self._asked(self._ray.wait, list(owners), num_returns=1, timeout=1.0)
        if not ready and all(member.preparing is not None for member in self._members):
            self._say("no worker is ready; waiting until the cluster has started one and it has loaded what it needs")
        for reference in ready:
            member = owners[reference]
            if member not in self._members:
                continue
            try:
                found = self._asked(self._ray.get, reference)
            except self._ray.exceptions.RayTaskError as error:
                self._failed(member, reference, error)
                continue
            except self._ray.exceptions.RayError as error:
                self._lost(member, waiting, error)
                continue
            if reference == member.preparing:
                member.preparing = None
                self._refused, self._grow_every = 0, _GROW_EVERY
            else:
                yield member.parts.pop(reference), found

    @staticmethod
    def _asked(call: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """What Ray gives; an end that a signal's handler asks for within comes out as that, not as Ray's own error."""
        try:
            return call(*given, **options)
        except SystemError as error:
            raise (error.__cause__ or error) from None

    def _failed(self, member: _Member, reference: Any, error: Any) -> None:
        """A worker is well, but says that it cannot: everybody's end, unless others may be on better nodes."""
        cause = error.cause if isinstance(error.cause, TrackstarError) else None
        if reference == member.preparing:
            self._members.remove(member)
            self._ray.kill(member.actor)
            self._another_refused()
            if self._members:
                self._note(f"a worker cannot be used and is left out: {cause or _one_line(error)}")
                return
        raise cause or error.cause or error from None

    def _another_refused(self) -> None:
        """Of nodes where a worker cannot be used, more and more seldom is tried whether it can now."""
        self._refused += 1
        self._grow_every = min(2 * self._grow_every, _GROW_SELDOM)

    def _lost(self, member: _Member, waiting: collections.deque[_Part], error: Any) -> None:
        """A worker or its node is gone: its parts go to others, first."""
        self._members.remove(member)
        self._ray.kill(member.actor)
        parts = sorted(member.parts.values(), key=lambda part: part.number)
        self._note(
            f"a worker was lost ({_one_line(error)}); {len(self._members)} are left, {len(parts)} parts go to them"
        )
        if member.preparing is not None:
            self._another_refused()
            if self._refused >= _MOST_ATTEMPTS and not self._members:
                raise ClusterError(
                    f"{self._refused} workers were lost while they loaded the model ({_one_line(error)}); give a "
                    "worker more memory, or see Ray's logs"
                )
        for part in parts:
            part.attempts += 1
            if part.attempts >= _MOST_ATTEMPTS:
                raise ClusterError(
                    f"part {part.number} was given to {part.attempts} workers, and all were lost ({_one_line(error)}); "
                    "try a smaller --batch-tokens, or see Ray's logs"
                )
        waiting.extendleft(reversed(parts))
        if member.preparing is None:
            self._grown = -math.inf

    def _grow(self) -> None:
        """Start workers where the cluster has room for more."""
        now = time.monotonic()
        if self._refused >= 2 * _MOST_ATTEMPTS and not self._members:
            raise ClusterError(
                f"{self._refused} workers could not be used or were lost while they got ready, and none is left; "
                "see Ray's logs"
            )
        if now - self._grown < (self._grow_every if self._members else _GROW_EVERY):
            return
        self._grown = now
        room = self._room()
        device = "auto" if self._gpus > 1 else "cuda" if self._gpus else "cpu"
        for _ in range(room):
            made = self._ray.remote(Worker).options(
                num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, scheduling_strategy="SPREAD"
            )
            self._members.append(_Member(actor=made.remote(self._cpus, device)))
        if room > 0:
            self._note(f"cluster: {len(self._members)} workers")

    def _room(self) -> int:
        """How many further workers the cluster has room for now."""
        needed = {"cpus": self._cpus, "gpus": self._gpus}
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        # What is free is told late, and of all nodes together.
        most = sum(workers_within(node, **needed) for node in nodes)
        most = most if self._most is None else min(most, self._most)
        free = workers_within(self._ray.available_resources(), **needed)
        return max(0, min(free, most - len(self._members)))

    def _say(self, line: str) -> None:
        if time.monotonic() - self._said > _SAY_EVERY:
            self._note(line)
            self._said = time.monotonic()


def workers_within(resources: Mapping[str, float], *, cpus: int, gpus: float) -> int:
    """How many workers of this size some resources are enough for."""
    room = int(resources.get("CPU", 0) // cpus)
    return min(room, int(resources.get("GPU", 0) / gpus)) if gpus else room


def _one_line(error: BaseException) -> str:
    """An error's first sentence; Ray's go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
