"""Open what a person names, and serve it on loopback until they stop it."""

import asyncio
import dataclasses
import os
import socket
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from trackstar.attribution.attributor import Attributor
from trackstar.baselines.embeddings import load_encoder
from trackstar.corpus import Corpus, read_queries
from trackstar.curvature.task import check_choices, check_mixing
from trackstar.errors import CorpusError, OptionError
from trackstar.explorer.app import make_app
from trackstar.explorer.jobs import Jobs
from trackstar.explorer.live import LiveIndex
from trackstar.explorer.metadata import corpora_of_index
from trackstar.explorer.result_files import read_result_file
from trackstar.explorer.security import Guard
from trackstar.retrieval.reranking import RERANKED
from trackstar.store import Index, is_url, load_manifest
from trackstar.workers.made_with import model_of_index

MOST_RUNS = 8
MOST_CONNECTIONS = 512
SILENT_SECONDS = 10.0
LOOPBACK = "127.0.0.1"
_MOST_RERANKED = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndexOptions:
    """How an index is opened for questions.

    Attributes:
        model: Where its model is, where it is not where the index says.
        data: Where its corpus is, likewise.
        task: A file of queries that R_eval and λ are taken from.
        embedding_model: Folder of a sentence-embedding model.
        device: Where gradients are computed.
        mixing: λ; None follows the paper's rule.
        damping: See `task_correction`.
        reranked: How many candidates are ranked again from recomputed gradients; None is the codec's number, but no
            more than a person waits for.
        batch_tokens: Most tokens of a batch, padding included.
    """

    model: str | None = None
    data: str | None = None
    task: str | None = None
    embedding_model: str | None = None
    device: str = "cpu"
    mixing: float | None = None
    damping: float | None = None
    reranked: int | None = None
    batch_tokens: int = 2048


class ImpatientProtocol(H11Protocol):
    """HTTP that hangs up on whoever opens a connection and sends no whole request within `SILENT_SECONDS`."""

    # The base says asyncio.BaseTransport, and gets what its server makes.
    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Start waiting for the first request's headers."""
        super().connection_made(transport)
        asyncio.get_running_loop().call_later(SILENT_SECONDS, self._hang_up_if_silent)

    def _hang_up_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


def serve(
    paths: Sequence[str],
    options: IndexOptions,
    *,
    port: int = 0,
    browser: bool = True,
    say: Callable[[str], None],
) -> None:
    """Open result files and at most one index, and serve the explorer on 127.0.0.1 until it is interrupted.

    Args:
        paths: Result files and an index's folder.
        options: How the index is opened.
        port: The port; 0 is any that is free.
        browser: Whether the system's browser is opened.
        say: Told the address, and what is worth knowing.

    Raises:
        TrackstarError: Something cannot be opened; see `trackstar.errors`.
    """
    check_options(options)
    indexes = [path for path in paths if _is_index(path)]
    results = [path for path in paths if path not in indexes]
    if len(indexes) > 1 or len(results) > MOST_RUNS:
        raise OptionError(
            f"found {len(indexes)} indexes and {len(results)} result files; expected at most one index and "
            f"{MOST_RUNS} result files"
        )
    if not indexes and options != IndexOptions(device=options.device, batch_tokens=options.batch_tokens):
        raise OptionError("--task, --embedding-model, --model, --data, --mixing and --damping are an index's; name one")
    listening = listen(port)
    try:
        files = [read_result_file(path) for path in results]
        live = open_index(indexes[0], options, say=say) if indexes else None
        host, port = listening.getsockname()
        hosts = frozenset(f"{name}:{port}" for name in (LOOPBACK, "localhost"))
        jobs = Jobs()
        app = make_app(files, live, hosts=hosts, jobs=jobs)
        address = f"http://{host}:{port}/"
        say(f"explorer: {address} (Ctrl-C ends it)")
        if browser:
            webbrowser.open(address)
        try:
            http_server(app).run(sockets=[listening])
        finally:
            jobs.close()
    finally:
        listening.close()


def _is_index(path: str) -> bool:
    """Whether a path or URL is rather an index than a file of results."""
    return load_manifest(path) is not None if is_url(path) else Path(path).is_dir()


def http_server(app: Guard) -> uvicorn.Server:
    """A server of the application that bounds its connections' number and patience; `run` takes its sockets."""
    config = uvicorn.Config(
        app, log_level="critical", limit_concurrency=MOST_CONNECTIONS, timeout_keep_alive=15, server_header=False,
        lifespan="off", h11_max_incomplete_event_size=64 * 1024, timeout_graceful_shutdown=2, ws="none",
        http=ImpatientProtocol,
    )  # fmt: skip
    return uvicorn.Server(config)


def check_options(options: IndexOptions) -> None:
    """Refuse at once what the first question would be refused for.

    Raises:
        OptionError: A number is out of its range.
    """
    check_mixing(options.mixing)
    if options.mixing is not None and options.mixing > 0 and options.task is None:
        raise OptionError(
            f"--mixing {options.mixing}: no query says what R_eval is; give some (--task), or leave it out"
        )
    if options.reranked is not None and options.reranked < 0:
        raise OptionError(f"--rerank {options.reranked}: expected 0 or more")
    if options.batch_tokens < 1:
        raise OptionError(f"--batch-tokens {options.batch_tokens}: expected 1 or more")


def open_index(path: str, options: IndexOptions, *, say: Callable[[str], None]) -> LiveIndex:
    """An index ready to be asked.

    Raises:
        TrackstarError: It, its model, the task or the embedding model cannot be opened.
    """
    index = Index.open(path)
    check_choices(index, mixing=options.mixing, damping=options.damping)
    task = read_queries(options.task) if options.task is not None else []
    encoder = load_encoder(options.embedding_model, device=options.device) if options.embedding_model else None
    model = model_of_index(index, options.model, device=options.device)
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
    except CorpusError as error:
        if options.data is not None:
            raise
        say(f"no fields of the corpus's records are shown: {error} (--data says where it is)")
    return LiveIndex(attributor, encoder=encoder, corpora=corpora, task_queries=len(task))


def listen(port: int) -> socket.socket:
    """A socket on loopback, so that nothing outside this machine can reach the server.

    Args:
        port: Its port; 0 is any that is free.

    Raises:
        OptionError: There is no such port, or it cannot be used.
    """
    if not 0 <= port <= 65535:
        raise OptionError(f"--port {port}: expected 0 (any that is free) to 65535")
    # With the protocol named, asyncio sends an answer's last part at once, not 40 ms later, when its first has come.
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if os.name == "posix":
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, port))
        listening.listen(64)  # a browser that is opened at once waits instead of being refused
    except OSError as error:
        listening.close()
        raise OptionError(f"--port {port}: cannot be used ({error.strerror}); choose another, or 0 for any") from None
    return listening
