"""A Ray cluster as `Workers`: connect, run gradients and scans on a pool of workers, and disconnect."""

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

from trackstar.errors import ClusterError, OptionError, check_at_least
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.store import Index
from trackstar.text import first_line
from trackstar.workers.protocol import Advance, GradientWork, IndexWork, Setup, ignore
from trackstar.workers.ray_actor import GradientJob, ScanJob
from trackstar.workers.ray_pool import Pool, workers_within

# Groups of shards per worker in a scan: more than one evens out the workers' speeds.
_GROUPS_PER_WORKER = 2
# The smallest fraction that Ray divides a GPU into, and more GPUs than a machine has.
_LEAST_GPU, _MOST_GPUS = 0.0001, 64
# Seconds until a connection to the cluster's address counts as failed.
_CONNECTION_TIMEOUT = 10.0


@contextlib.contextmanager
def _sigterm_handler_restored() -> Iterator[None]:
    """Restore this process's SIGTERM handler at the end, as Ray replaces it while it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@final
class RayWorkers:
    """Workers on a Ray cluster; a context manager that releases them at its end.

    Workers read models and indexes from the paths or URLs that this process uses, so all nodes must
    share them. Only this process reads the corpus, and only this process writes.

    Args:
        address: `auto` for the cluster that this machine is part of, `HOST:PORT`, a `ray://` URL, or
            `local` for a cluster that starts on this machine and ends with this process.
        workers: Maximum number of workers; None is as many as the cluster has room for, also if it grows.
        cpus: CPU cores per worker.
        gpus: GPUs per worker, or a fraction of one; None is 1 if the cluster has any, else 0, so that
            each worker computes on one GPU of its own. The model is spread over a worker's GPUs if there
            are several (`device_map="auto"` in `load_model`).

    Raises:
        OptionError: Ray is not installed, or a number is out of range.
        ClusterError: The cluster cannot be reached, or no node has room for a worker.
    """

    def __init__(
        self, address: str = "auto", *, workers: int | None = None, cpus: int = 1, gpus: float | None = None
    ) -> None:
        if importlib.util.find_spec("ray") is None:
            raise OptionError("a cluster's workers need Ray, which is not installed; pip install 'trackstar-tda[ray]'")
        check_at_least("workers", workers)
        check_at_least("cpus", cpus)
        whole = gpus is not None and 0 <= gpus <= _MOST_GPUS and gpus % 1 == 0
        if gpus is not None and not (whole or _LEAST_GPU <= gpus <= 1):
            raise OptionError(
                f"`gpus`: expected 0, a fraction of one ({_LEAST_GPU} or more), or a whole number up to {_MOST_GPUS}, "
                f"found {gpus:g}"
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
                f"`address`: the nodes of the cluster {address} have up to {most['CPU']:g} CPU cores and "
                f"{most['GPU']:g} GPUs, a worker needs {cpus} and {gpus:g}; pass smaller `cpus` or `gpus`"
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
        """Release the workers, and disconnect from the cluster if this object connected to it."""
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
            OptionError: The model is in memory only, so that workers cannot load it.
            ClusterError: Workers are lost repeatedly, or the cluster fails.
        """
        if model.source == "in memory":
            raise OptionError(
                "`model`: expected one loaded from a folder or a hub, as a cluster's workers load it too, found one in "
                "memory only"
            )
        source = os.path.abspath(model.source) if model.folder is not None else model.source
        job = GradientJob(source=source, revision=model.revision, gguf_file=model.gguf_file, setup=setup, work=work)
        return self._pool.run(job, parts, advance=advance, note=note)

    def scan(self, index: Index, work: IndexWork, *, progress: bool = False) -> list[Any]:
        """See `trackstar.workers.protocol.Workers`."""
        count = min(len(index.shards), max(1, _GROUPS_PER_WORKER * self._pool.size))
        bounds = [len(index.shards) * number // count for number in range(count + 1)]
        groups = [range(first, last) for first, last in itertools.pairwise(bounds)]
        # Absolute, as workers run in a different folder.
        path = index.path.absolute() if isinstance(index.path, Path) else index.path
        job = ScanJob(path=path, manifest=index.manifest, work=work)
        with Progress("Scan", unit="examples", total=index.rows, shown=progress) as bar:
            return list(self._pool.run(job, groups, advance=bar.advance, note=bar.note))

    def _connect(self, address: str) -> None:
        options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if address == "local":
            options["include_dashboard"] = False
        try:
            host, _, port = address.rpartition(":")
            if "://" not in address and host and port.isdecimal():
                # If nothing answers, Ray waits for minutes and then ends the process.
                socket.create_connection((host, int(port)), timeout=_CONNECTION_TIMEOUT).close()
            with _sigterm_handler_restored():
                self._ray.init(address=address, **options)
        except (OSError, OverflowError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            raise ClusterError(
                f"`address`: expected auto, local, HOST:PORT or a ray:// URL of a running cluster, found {address} "
                f"({first_line(error)})"
            ) from error

    def _disconnect(self) -> None:
        if self._connected:
            self._ray.shutdown()
