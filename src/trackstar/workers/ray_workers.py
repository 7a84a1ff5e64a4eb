"""A Ray cluster as `Workers`: connects, keeps a pool for gradients and scans, and lets go."""

import contextlib
import importlib
import importlib.util
import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, final

from trackstar.errors import ClusterError, OptionError
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import Index
from trackstar.workers.protocol import Advance, GradientWork, IndexWork, Setup, ignore
from trackstar.workers.ray_actor import GradientOrder, ScanOrder
from trackstar.workers.ray_pool import Pool, workers_within

# Parts of an index that each worker gets: more even out what workers need.
_PARTS_A_WORKER = 2
# Ray divides a GPU into so many parts; more GPUs a machine does not have.
_LEAST_GPU, _MOST_GPUS = 0.0001, 64
# How long, in seconds, a cluster's address may take to answer.
_ANSWERS_WITHIN = 10.0


@contextlib.contextmanager
def _own_end() -> Iterator[None]:
    """While Ray begins: it would answer SIGTERM itself afterwards, and this process's own ending be lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)


@final
class RayWorkers:
    """Workers on a Ray cluster; a context manager that lets them go at its end.

    Models, indexes and corpora are read from where this process reads them: give paths or URLs that all nodes share.
    The corpus is read by this process alone, and it alone writes.

    Args:
        address: `auto` for the cluster that this machine is part of, `HOST:PORT`, a `ray://` URL, or `local` for one
            that is started on this machine and ends with this process.
        workers: How many at most; None is as many as the cluster has room for, also if it grows.
        cpus: CPU cores of a worker, which it computes with.
        gpus: GPUs of a worker, or a fraction of one; None is 1 where the cluster has any, else 0. The model is spread
            over more than one.

    Raises:
        OptionError: Ray is not installed, or a number is out of range.
        ClusterError: There is no such cluster, or it has no room for a worker at all.
    """

    def __init__(
        self, address: str = "auto", *, workers: int | None = None, cpus: int = 1, gpus: float | None = None
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise OptionError("ray is not installed; --ray needs it: pip install 'trackstar-tda[ray]'")
        for option, value in (("--ray-workers", workers), ("--ray-cpus", cpus)):
            if value is not None and value < 1:
                raise OptionError(f"{option} {value}: expected 1 or more")
        whole = gpus is not None and 0 <= gpus <= _MOST_GPUS and gpus % 1 == 0
        if gpus is not None and not (whole or _LEAST_GPU <= gpus <= 1):
            raise OptionError(
                f"--ray-gpus {gpus:g}: expected 0, a part of one ({_LEAST_GPU} or more), or a whole number up to "
                f"{_MOST_GPUS}"
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self._ray: Any = importlib.import_module("ray")
        self._connected = not self._ray.is_initialized()
        if self._connected:
            self._connect(address)
        if gpus is None:
            gpus = 1.0 if self._ray.cluster_resources().get("GPU", 0) >= 1 else 0.0
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(workers_within(node, cpus=cpus, gpus=gpus) for node in nodes):
            most = {kind: max((node.get(kind, 0) for node in nodes), default=0) for kind in ("CPU", "GPU")}
            self._disconnect()
            raise ClusterError(
                f"--ray {address}: the cluster's nodes have up to {most['CPU']:g} CPU cores and {most['GPU']:g} GPUs, "
                f"a worker needs {cpus} and {gpus:g} (--ray-cpus, --ray-gpus)"
            )
        try:
            self._pool = Pool(most=workers, cpus=cpus, gpus=gpus, note=ignore)
        except BaseException:
            self._disconnect()
            raise

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the workers go, and the cluster where this connected to it."""
        self._pool.close()
        self._disconnect()

    def gradients(
        self,
        model: LanguageModel,
        setup: Setup,
        work: GradientWork,
        parts: Iterable[Any],
        *,
        advance: Advance = ignore,
        note: Callable[[str], None] = ignore,
    ) -> Iterator[Any]:
        """See `trackstar.workers.protocol.Workers`.

        Raises:
            OptionError: The model is nowhere that a worker could load it from.
            ClusterError: Workers are lost again and again.
        """
        if model.source == "in memory":
            raise OptionError("the model is in memory only; a cluster's workers load theirs from a folder or a hub")
        source = os.path.abspath(model.source) if model.folder is not None else model.source
        order = GradientOrder(source=source, revision=model.revision, gguf_file=model.gguf_file, setup=setup, work=work)
        return self._pool.do(order, parts, advance=advance, note=note)

    def scan(self, index: Index, work: IndexWork, *, progress: bool = False) -> list[Any]:
        """See `trackstar.workers.protocol.Workers`."""
        count = min(len(index.shards), max(1, _PARTS_A_WORKER * self._pool.size))
        bounds = [len(index.shards) * place // count for place in range(count + 1)]
        parts = [range(first, last) for first, last in itertools.pairwise(bounds)]
        # Workers run in a folder of their own.
        path = index.path.absolute() if isinstance(index.path, Path) else index.path
        order = ScanOrder(path=path, manifest=index.manifest, work=work)
        with Progress("Scan", unit="examples", total=index.rows, shown=progress) as bar:
            return list(self._pool.do(order, parts, advance=bar.advance, note=bar.note))

    def _connect(self, address: str) -> None:
        options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if address == "local":
            options["include_dashboard"] = False
        try:
            host, _, port = address.rpartition(":")
            if "://" not in address and host and port.isdecimal():
                # Ray itself waits for minutes, and then ends the process.
                socket.create_connection((host, int(port)), timeout=_ANSWERS_WITHIN).close()
            with _own_end():
                self._ray.init(address=address, **options)
        except (OSError, OverflowError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ClusterError(
                f"--ray {address}: no cluster can be reached there ({first[:200]}); expected auto, local, HOST:PORT "
                "or a ray:// URL"
            ) from error

    def _disconnect(self) -> None:
        if self._connected:
            self._ray.shutdown()
