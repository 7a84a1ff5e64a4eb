"""A pool of workers on a made-up cluster: nodes where a worker cannot be used are tried more and more seldom."""

import dataclasses
import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest

from trackstar.errors import ClusterError
from trackstar.workers import ray_pool as pools
from trackstar.workers.ray_actor import Done, ScanOrder
from trackstar.workers.ray_pool import Pool


class _RayError(Exception):
    """What Ray's errors are made of."""


class _LostError(_RayError):
    """A worker's node is gone."""


@dataclasses.dataclass(eq=False)
class _Call:
    gives: Callable[[], Any]

    def remote(self, *_: Any) -> "_Call":
        return self


class _Cluster:
    """Ray, as far as a pool sees it: two cores, on one of which workers are lost for a while as they get ready."""

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

    def put(self, order: object) -> object:
        return order

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

        done = Done(result=1, advanced=0, notes=())
        actor = types.SimpleNamespace(
            prepare=_Call(prepared), do=types.SimpleNamespace(remote=lambda _: _Call(lambda: done))
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
    """Twelve are lost one after the other while a long order goes on; the thirteenth stays."""
    cluster, pool = made(12)
    order = ScanOrder.__new__(ScanOrder)
    results = pool.do(order, itertools.repeat(0), advance=lambda _: None, note=lambda _: None)
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
        list(pool.do(ScanOrder.__new__(ScanOrder), [1, 2], advance=lambda _: None, note=lambda _: None))
    assert cluster.now < 60


def test_nobody_has_two_parts_while_another_has_none(made: Callable[[int], tuple[_Cluster, Pool]]) -> None:
    """Also where that one is not ready yet."""
    cluster, pool = made(0)
    first, second = pool._members
    given: list[list[int]] = [[], []]
    for number, member in enumerate((first, second)):
        doing = types.SimpleNamespace(remote=lambda part, at=number: given[at].append(part) or _Call(lambda: part))
        member.actor = types.SimpleNamespace(prepare=member.actor.prepare, do=doing)
        cluster.alive[number] = member.actor
    slow = iter([False] * 3)

    def wait(calls: list[_Call], **_: object) -> tuple[list[_Call], list[_Call]]:
        late = [call for call in calls if call is second.preparing and not next(slow, True)]
        if sum(map(len, given)) < 2:  # a part takes longer than getting ready
            late += [call for call in calls if call not in (first.preparing, second.preparing)]
        return [call for call in calls if call not in late], late

    cluster.wait = wait  # pyright: ignore[reportAttributeAccessIssue]
    done = [Done(result=number, advanced=0, notes=()) for number in range(2)]
    order = ScanOrder.__new__(ScanOrder)
    assert list(pool.do(order, done, advance=lambda _: None, note=lambda _: None)) == [0, 1]
    assert given == [[done[0]], [done[1]]]


def test_an_end_that_a_signal_asks_for_while_ray_waits_is_that_end(
    made: Callable[[int], tuple[_Cluster, Pool]],
) -> None:
    """Ray's compiled code turns what a signal's handler raises into an error of its own."""
    cluster, pool = made(0)

    def wait(_calls: list[_Call], **_: object) -> None:
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    cluster.wait = wait  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        list(pool.do(ScanOrder.__new__(ScanOrder), [1], advance=lambda _: None, note=lambda _: None))
