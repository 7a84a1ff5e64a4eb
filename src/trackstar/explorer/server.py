"""Open result files and an index, and serve the explorer on loopback until it is interrupted."""

import contextlib
import dataclasses
import os
import socket
import threading
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from trackstar.attribution.attributor import Attributor
from trackstar.baselines.embeddings import load_encoder
from trackstar.choices import DeviceMap
from trackstar.corpus import Corpus, read_queries
from trackstar.curvature.task import check_choices
from trackstar.errors import CorpusError, OptionError, StoreError, check_at_least, check_mixing
from trackstar.explorer.app import make_app
from trackstar.explorer.connections import IDLE_SECONDS, TimedProtocol
from trackstar.explorer.jobs import Jobs
from trackstar.explorer.live import LiveIndex
from trackstar.explorer.metadata import corpora_of_index
from trackstar.explorer.result_files import read_result_file
from trackstar.explorer.security import Guard
from trackstar.model.devices import announced_device
from trackstar.retrieval.reranking import RERANKED
from trackstar.store import Index, is_url, load_manifest
from trackstar.workers.index_model import model_of_index

MOST_RUNS = 8
LOOPBACK = "127.0.0.1"
_MOST_RERANKED = 100
_WAITING_CONNECTIONS = 1024  # that the system keeps until they are accepted
# Much fewer than `MOST_CONNECTIONS`: a new one is read from before others can take its place.
_ACCEPTED_AT_ONCE = 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndexOptions:
    """Settings that open an index for questions.

    Attributes:
        model: Path to the model, if it has moved.
        data: Path to the corpus, if it has moved.
        task: File of queries that R_eval and λ are computed from; None uses R_train alone.
        embedding_model: Folder of a sentence-embedding model; None leaves embeddings out.
        device: Device that computes gradients; see `load_model`.
        device_map: Spreads the model over several GPUs; see `load_model`.
        mixing: λ; None follows the paper's rule.
        damping: Ridge added to R_train, as a fraction of its mean eigenvalue per block; None
            follows a rule.
        reranked: Number of candidates that are re-ranked from recomputed gradients; None is the
            codec's number, at most 100 so that an answer stays interactive.
        batch_tokens: Most tokens per batch, padding included.
    """

    model: str | None = None
    data: str | None = None
    task: str | None = None
    embedding_model: str | None = None
    device: str = "auto"
    device_map: DeviceMap | None = None
    mixing: float | None = None
    damping: float | None = None
    reranked: int | None = None
    batch_tokens: int = 2048


def serve(
    paths: Sequence[str],
    options: IndexOptions,
    *,
    port: int = 0,
    browser: bool = True,
    note: Callable[[str], None],
) -> None:
    """Open result files and at most one index, and serve the explorer on 127.0.0.1 until it is
    interrupted.

    Args:
        paths: Result files, and the folder or URL of an index.
        options: Settings that open the index.
        port: The port; 0 is any free port.
        browser: Whether to open the system's browser.
        note: Callback that receives the address and other notes, one line each.

    Raises:
        TrackstarError: A file, the index or the port cannot be opened; see `trackstar.errors`.
    """
    check_options(options)
    indexes = [path for path in paths if _is_index(path)]
    results = [path for path in paths if path not in indexes]
    if len(indexes) > 1 or len(results) > MOST_RUNS:
        raise OptionError(
            f"found {len(indexes)} indexes and {len(results)} result files; expected at most one index and "
            f"{MOST_RUNS} result files"
        )
    _check_distinct(results)
    unused = IndexOptions(device=options.device, device_map=options.device_map, batch_tokens=options.batch_tokens)
    if not indexes and options != unused:
        raise OptionError(
            "`task`, `embedding_model`, `model`, `data`, `mixing`, `damping` and `reranked` apply to an index, found "
            "none; name an index, or leave them out"
        )
    listening = listen(port)
    try:
        files = [read_result_file(path) for path in results]
        live = open_index(indexes[0], options, note=note) if indexes else None
        host, port = listening.getsockname()
        hosts = frozenset(f"{name}:{port}" for name in (LOOPBACK, "localhost"))
        jobs = Jobs()
        app = make_app(files, live, hosts=hosts, jobs=jobs)
        address = f"http://{host}:{port}/"
        note(f"explorer: {address} (Ctrl-C ends it)")
        if browser:
            # A browser in this terminal would wait for the server, which is not running yet.
            threading.Thread(target=_open_browser, args=(address,), daemon=True).start()
        try:
            http_server(app).run(sockets=[listening])
        finally:
            jobs.close()
    finally:
        listening.close()


def _open_browser(address: str) -> None:
    with contextlib.suppress(webbrowser.Error, OSError):
        webbrowser.open(address)


def _check_distinct(paths: Sequence[str]) -> None:
    places: dict[str, str] = {}
    for path in paths:
        place = path if is_url(path) or "\0" in path else os.path.realpath(path)
        if place in places:
            raise OptionError(f"`paths`: {path} is the same as {places[place]}; name each once")
        places[place] = path


def _is_index(path: str) -> bool:
    """Whether a path or URL is an index, not a result file."""
    return load_manifest(path) is not None if is_url(path) else Path(path).is_dir()


class _Server(uvicorn.Server):
    """A server whose sockets keep more connections waiting than it accepts at once."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start; asyncio lets no more connections wait than it accepts at once."""
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_WAITING_CONNECTIONS)


def http_server(app: Guard) -> uvicorn.Server:
    """A server of the application with limits on connections and waiting times; `run` takes its sockets."""
    config = uvicorn.Config(
        app, log_level="critical", timeout_keep_alive=IDLE_SECONDS, server_header=False, lifespan="off",
        h11_max_incomplete_event_size=64 * 1024, timeout_graceful_shutdown=2, ws="none", http=TimedProtocol,
        backlog=_ACCEPTED_AT_ONCE,
    )  # fmt: skip
    return _Server(config)


def check_options(options: IndexOptions) -> None:
    """Raise if a setting would make the first question fail.

    Raises:
        OptionError: A number is out of range, or λ needs a task; the message names the setting.
    """
    check_mixing(options.mixing)
    if options.mixing is not None and options.mixing > 0 and options.task is None:
        raise OptionError(
            f"`mixing`: found {options.mixing} without a task to compute R_eval from; pass `task`, or leave `mixing` "
            "out"
        )
    check_at_least("reranked", options.reranked, 0)
    check_at_least("batch_tokens", options.batch_tokens)


def open_index(path: str, options: IndexOptions, *, note: Callable[[str], None]) -> LiveIndex:
    """Open an index, its model and its corpus for questions.

    Raises:
        TrackstarError: The index, its model, the task or the embedding model cannot be opened.
    """
    index = Index.open(path)
    check_choices(index, mixing=options.mixing, damping=options.damping)
    task = read_queries(options.task) if options.task is not None else []
    device = announced_device(options.device, options.device_map, note)
    encoder = load_encoder(options.embedding_model, device=device) if options.embedding_model else None
    model = model_of_index(index, options.model, device=device, device_map=options.device_map)
    reranked = options.reranked
    attributor = Attributor(
        index,
        model,
        task=task,
        mixing=options.mixing,
        damping=options.damping,
        reranked=min(RERANKED[index.manifest.codec], _MOST_RERANKED) if reranked is None else reranked,
        batch_tokens=options.batch_tokens,
    )
    corpora: list[Corpus] = []
    try:
        corpora = corpora_of_index(index, options.data)
    except (CorpusError, StoreError) as error:
        if options.data is not None:
            raise
        note(f"the corpus's fields are not shown: {error}; pass `data` if the corpus has moved")
    return LiveIndex(attributor, encoder=encoder, corpora=corpora, task_queries=len(task))


def listen(port: int) -> socket.socket:
    """A listening socket on loopback, which no other machine can reach.

    Args:
        port: The port; 0 is any free port.

    Raises:
        OptionError: The port is out of range or cannot be used.
    """
    if not 0 <= port <= 65535:
        raise OptionError(f"`port`: expected 0 (any free port) to 65535, found {port}")
    # asyncio sets TCP_NODELAY only if the protocol is given; else an answer's last part is 40 ms
    # late.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port))
        # A browser that connects before the server accepts waits instead of failing.
        listening.listen(_WAITING_CONNECTIONS)
    except OSError as error:
        listening.close()
        raise OptionError(
            f"`port`: {port} cannot be used ({error.strerror}); choose another port, or 0 for any free one"
        ) from None
    return listening
