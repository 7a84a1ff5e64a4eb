"""A pool of workers on a simulated cluster: workers that are lost while they start are replaced with backoff."""

import dataclasses
import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest

from trackstar.errors import ClusterError
from trackstar.workers import ray_pool as pools
from trackstar.workers.ray_actor import PartResult, ScanJob
from trackstar.workers.ray_pool import Pool


class _RayError(Exception):
    """Base of Ray's errors."""


class _LostError(_RayError):
    """A worker's node is gone."""


@dataclasses.dataclass(eq=False)
class _Call:
    gives: Callable[[], Any]

    def remote(self, *_: Any) -> "_Call":
        return self


class _Cluster:
    """Ray's interface to a pool: two cores; on one, the first `lost` workers are lost while they are prepared."""

    def __init__(self, *, lost: int) -> None:
        self.exceptions = types.SimpleNamespace(RayError=_RayError, RayTaskError=type("RayTaskError", (_RayError,), {}))
        self.now = 0.0
        self.lost = lost
        self.alive: list[object] = []
        self.begun: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def put(self, job: object) -> object:
        return job

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 2.0 - len(self.alive)}

    def kill(self, actor: object) -> None:
        self.alive.remove(actor)

    def remote(self, _worker: type) -> Any:
        return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=self._actor))

    def _actor(self, *_: object) -> object:
        first = not self.begun
        self.begun.append(self.now)

        def prepared() -> str:
            if not first and self.lost:
                self.lost -= 1
                raise _LostError("its node is gone")
            return "a worker"

        result = PartResult(result=1, advanced=0, notes=())
        actor = types.SimpleNamespace(
            prepare=_Call(prepared), compute=types.SimpleNamespace(remote=lambda _: _Call(lambda: result))
        )
        self.alive.append(actor)
        return actor

    def wait(self, calls: list[_Call], **_: object) -> tuple[list[_Call], list[_Call]]:
        self.now += 1.0
        return calls, []

    def get(self, call: _Call) -> Any:
        return call.gives()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], tuple[_Cluster, Pool]]:
    def make(lost: int) -> tuple[_Cluster, Pool]:
        cluster = _Cluster(lost=lost)
        monkeypatch.setattr(pools.importlib, "import_module", lambda _name: cluster)
        monkeypatch.setattr(pools, "time", cluster)
        return cluster, Pool(most=None, cpus=1, gpus=0.0, note=lambda _: None)

    return make


def test_workers_come_back_however_many_were_lost(made: Callable[[int], tuple[_Cluster, Pool]]) -> None:
    """Twelve are lost one after the other during a long job; the thirteenth stays."""
    cluster, pool = made(12)
    job = ScanJob.__new__(ScanJob)
    results = pool.run(job, itertools.repeat(0), advance=lambda _: None, note=lambda _: None)
    while cluster.lost:
        assert next(results) == 1
        assert cluster.now < 4000
    for _ in range(2000):
        next(results)
    assert len(cluster.alive) == 2
    pauses = [later - earlier for earlier, later in itertools.pairwise(cluster.begun[1:])]
    assert 5 <= pauses[0] <= 15
    assert pauses == sorted(pauses)
    assert max(pauses) <= 302


def test_a_cluster_where_no_worker_stays_is_an_error(made: Callable[[int], tuple[_Cluster, Pool]]) -> None:
    cluster, pool = made(1000)
    cluster.begun.append(0.0)  # none is the first, which is never lost
    pool.close()
    with pytest.raises(ClusterError, match="workers were lost while they loaded the model"):
        list(pool.run(ScanJob.__new__(ScanJob), [1, 2], advance=lambda _: None, note=lambda _: None))
    assert cluster.now < 60


def test_no_worker_has_two_parts_while_another_has_none(made: Callable[[int], tuple[_Cluster, Pool]]) -> None:
    """Even if the other is not ready yet."""
    cluster, pool = made(0)
    first, second = pool._members
    assigned: list[list[int]] = [[], []]
    for number, member in enumerate((first, second)):
        compute = types.SimpleNamespace(remote=lambda part, at=number: assigned[at].append(part) or _Call(lambda: part))
        member.actor = types.SimpleNamespace(prepare=member.actor.prepare, compute=compute)
        cluster.alive[number] = member.actor
    slow = iter([False] * 3)

    def wait(calls: list[_Call], **_: object) -> tuple[list[_Call], list[_Call]]:
        late = [call for call in calls if call is second.preparing and not next(slow, True)]
        if sum(map(len, assigned)) < 2:  # a part takes longer than a preparation
            late += [call for call in calls if call not in (first.preparing, second.preparing)]
        return [call for call in calls if call not in late], late

    cluster.wait = wait  # pyright: ignore[reportAttributeAccessIssue]
    results = [PartResult(result=number, advanced=0, notes=()) for number in range(2)]
    job = ScanJob.__new__(ScanJob)
    assert list(pool.run(job, results, advance=lambda _: None, note=lambda _: None)) == [0, 1]
    assert assigned == [[results[0]], [results[1]]]


def test_an_exception_of_a_signal_handler_while_ray_waits_is_raised_unchanged(
    made: Callable[[int], tuple[_Cluster, Pool]],
) -> None:
    """Ray's compiled code turns the handler's exception into a `SystemError`."""
    cluster, pool = made(0)

    def wait(_calls: list[_Call], **_: object) -> None:
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    cluster.wait = wait  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        list(pool.run(ScanJob.__new__(ScanJob), [1], advance=lambda _: None, note=lambda _: None))
