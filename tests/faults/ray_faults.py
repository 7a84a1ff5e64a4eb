"""Deaths on a Ray cluster while it indexes and answers: of workers, of the process that leads, and of whole nodes."""

import contextlib
import logging
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from faults import setting as settings
from faults.indexing import MOST_RUNS, Expected, Indexing, until_done
from faults.processes import PROCESSES, UNDISTURBED, Conditions, Disk, Outcome, Run, attempt
from faults.setting import KINDS, Kind, Setting
from faults.tally import Case, Tally

_LONGEST = 240.0


class Driver:
    """A process that leads a cluster of its own, and does one operation after the other on it.

    Args:
        nodes: How many nodes; 1 has two workers, of several each has one.
    """

    def __init__(self, nodes: int = 1) -> None:
        self._connection, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=_lead, args=(theirs, nodes), daemon=True)
        self._process.start()
        theirs.close()
        assert self._connection.poll(_LONGEST), "the cluster does not start"
        assert self._connection.recv() == "ready"

    def start(self, operation: settings.Operation, *arguments: Any, **options: Any) -> None:
        """Begin an operation, which is given `workers`; see `_lead` for options."""
        self._connection.send((operation, arguments, options))

    def outcome(self) -> Outcome:
        """How it ended."""
        if not self._connection.poll(_LONGEST):
            return Outcome(state="failed", text=f"no end after {_LONGEST} s")
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            return Outcome(state="killed", hit=True)

    @property
    def done(self) -> bool:
        """Whether its outcome is there."""
        return self._connection.poll(0)

    def workers(self) -> list[psutil.Process]:
        """The processes of its workers."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Worker"):
                    found.append(process)
        return found

    def kill(self) -> None:
        """End it as `kill -9` does; what it has started goes with it."""
        try:
            started = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return  # it has ended by itself
        self._process.kill()
        self._process.join()
        _, left = psutil.wait_procs(started, timeout=10)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def close(self) -> None:
        """Let it end."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._process.join(20)
        self.kill()


def _lead(connection: Any, nodes: int) -> None:
    """The process that leads; a message is an operation, its arguments and options, or None."""
    import os

    settings.make_small()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    from trackstar.workers import RayWorkers

    cluster: Any = None
    nodes_left: list[Any] = []
    if nodes > 1:
        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes_left = [cluster.add_node(num_cpus=1) for _ in range(nodes - 1)]
        ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    with RayWorkers("auto" if cluster else "local", workers=2) as workers:
        connection.send("ready")
        while (message := connection.recv()) is not None:
            operation, arguments, options = message
            killer, struck = None, threading.Event()
            if "lose_node_after" in options:
                killer = threading.Timer(options["lose_node_after"], _lose_node, (cluster, nodes_left, struck))
                killer.start()
            disk = Disk(options.get("conditions", Conditions()))
            disk.install()
            began = time.monotonic()
            try:
                outcome = attempt(_with_workers, operation, arguments, workers)
            finally:
                disk.remove()
            hit = disk.hit or struck.is_set()
            if killer is not None:
                killer.cancel()
                killer.join()
                if not nodes_left:
                    nodes_left.append(cluster.add_node(num_cpus=1))
            connection.send(
                Outcome(
                    state=outcome.state, error=outcome.error, text=outcome.text, value=outcome.value, hit=hit,
                    steps=disk.steps, seconds=time.monotonic() - began,
                )
            )  # fmt: skip
    if cluster is not None:
        cluster.shutdown()


def _lose_node(cluster: Any, nodes: list[Any], struck: threading.Event) -> None:
    """Kill all processes of the last node."""
    struck.set()
    cluster.remove_node(nodes.pop(), allow_graceful=False)


def _with_workers(operation: settings.Operation, arguments: tuple[Any, ...], workers: Any) -> Any:
    return operation(*arguments, workers=workers)


class RayFaults:
    """Makes indexes, and asks them, on clusters that lose members.

    Args:
        setting: What is indexed.
        expected: The undisturbed indexes.
        tally: Counts.
    """

    def __init__(self, setting: Setting, expected: dict[Kind, Expected], tally: Tally) -> None:
        self._setting = setting
        self._expected = expected
        self._indexing = Indexing(setting, expected, tally)
        self._tally = tally

    def worker_deaths(self, faults: int, seed: int) -> None:
        """Kill workers of one cluster, which goes on; now and then its disk is full instead."""
        way = "Ray, workers"
        generator = random.Random(f"{seed} {way}")
        with _driver() as driver:
            self._index(driver, "float16")
            usual = self._index(driver, "1-bit")
            tries = 0
            while (left := faults - self._tally.ways[way]) > 0 and tries < 5 * faults:
                tries += 1
                with self._indexing.case(way, seed + tries) as case:
                    kind = generator.choice(KINDS)
                    self._one(case, driver, kind, min(left, generator.choice((1, 2, 2))), usual)

    def _index(self, driver: Driver, kind: Kind) -> float:
        """Once without a fault, so that workers are there; how long it takes."""
        out = self._setting.folder / "ray" / f"{kind}-{time.monotonic_ns()}"
        driver.start(settings.index, self._setting, kind, str(out), None)
        outcome = driver.outcome()
        assert outcome.state == "done", outcome.text
        return outcome.seconds

    def _one(self, case: Case, driver: Driver, kind: Kind, faults: int, usual: float) -> None:
        out = case.folder / "index"
        full = case.random.random() < 0.2
        options = {"conditions": Conditions(full_from=case.random.randint(1, 300))} if full else {}
        driver.start(settings.index, self._setting, kind, str(out), None, **options)
        for _ in range(0 if full else faults):
            wait = case.random.uniform(0, usual)
            deadline = time.monotonic() + wait
            while time.monotonic() < deadline and not driver.done:
                time.sleep(0.005)
            workers = driver.workers()
            if workers and not driver.done:
                with contextlib.suppress(psutil.NoSuchProcess):  # done in the meantime
                    case.random.choice(workers).kill()
                    case.fault("kill -9 of a Ray worker")
        outcome = case.ran(driver.outcome(), "no space from a step on" if full else None)
        for _ in range(MOST_RUNS):
            if outcome.state != "refused":
                break
            case.damage(out)
            driver.start(settings.index, self._setting, kind, str(out), None)
            outcome = case.ran(driver.outcome())
        self._indexing.compare(case, kind, out)

    def driver_deaths(self, faults: int, seed: int) -> None:
        """Kill the process that leads, and with it the cluster; then resume with another."""
        way = "Ray, driver"
        generator = random.Random(f"{seed} {way}")
        number = 0
        while self._tally.ways[way] < faults and number < 3 * faults:
            number += 1
            with self._indexing.case(way, seed + number) as case:
                kind, out = generator.choice(KINDS), case.folder / "index"
                driver = Driver()
                try:
                    driver.start(settings.index, self._setting, kind, str(out), None)
                    # Until its workers have loaded the model nothing is written but V.
                    moment = time.monotonic() + 30
                    while not (out.exists() and any(out.rglob("*.safetensors"))) and time.monotonic() < moment:
                        time.sleep(0.01)
                    moment = time.monotonic() + case.random.uniform(0, 1.5)
                    while time.monotonic() < moment and not driver.done:
                        time.sleep(0.01)
                    if not driver.done:
                        case.fault("kill -9 of the Ray driver")
                finally:
                    driver.kill()
                self._to_the_end(case, kind, out)

    def _to_the_end(self, case: Case, kind: Kind, out: Path) -> None:
        """Go on without a cluster: what one has begun, another way finishes."""
        until_done(case, lambda: Run(UNDISTURBED, settings.index, self._setting, kind, str(out)).outcome())
        self._indexing.compare(case, kind, out)

    def node_deaths(self, faults: int, seed: int) -> None:
        """Kill the second of two nodes, which then comes back."""
        way = "Ray, nodes"
        with _driver(nodes=2) as driver:
            number = 0
            while self._tally.ways[way] < faults and number < 4 * faults:
                number += 1
                with self._indexing.case(way, seed + number) as case:
                    kind, out = case.random.choice(KINDS), case.folder / "index"
                    # The pool looks for room now and then: the node that has come back gets a worker.
                    time.sleep(5 if number > 1 else 0)
                    self._index(driver, "float16")
                    after = case.random.uniform(0, 0.8)
                    driver.start(settings.index, self._setting, kind, str(out), None, lose_node_after=after)
                    outcome = case.ran(driver.outcome(), "kill -9 of a Ray node")
                    if outcome.state != "done":
                        case.wrong(f"a node was lost: {outcome.text}")
                    self._indexing.compare(case, kind, out)

    def queries(self, faults: int, seed: int, tally: Tally) -> None:
        """Kill workers of a cluster that answers."""
        way = "query on Ray"
        with _driver() as driver:
            usual: dict[bool, Outcome] = {}
            number = 0
            while tally.ways[way] < faults and number < 6 * faults:
                number += 1
                case = Case(tally, way, f"{seed} {way} {number}", self._setting.folder / "cases" / f"q{number}")
                exact = case.random.random() < 0.5
                index = str(self._setting.undisturbed("1-bit"))
                if exact not in usual:
                    driver.start(settings.query, index, 40, exact)
                    driver.outcome()
                    driver.start(settings.query, index, 40, exact)
                    usual[exact] = driver.outcome()
                    assert usual[exact].state == "done", usual[exact].text
                driver.start(settings.query, index, 40, exact)
                moment = time.monotonic() + case.random.uniform(0, usual[exact].seconds)
                while time.monotonic() < moment and not driver.done:
                    time.sleep(0.002)
                workers = driver.workers()
                if workers and not driver.done:
                    case.random.choice(workers).kill()
                    case.fault("kill -9 of a Ray worker")
                outcome = case.ran(driver.outcome())
                if outcome.state != "done" or outcome.value != usual[exact].value:
                    case.wrong(f"other answers than without a fault, or none: {outcome.text}")
                case.close()


@contextlib.contextmanager
def _driver(nodes: int = 1) -> Iterator[Driver]:
    driver = Driver(nodes)
    try:
        yield driver
    finally:
        driver.close()
