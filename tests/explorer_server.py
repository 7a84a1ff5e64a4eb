"""Run the explorer's server on a free port in a thread, for tests that send it requests as a browser does."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from capitals import QUERIES
from trackstar.attribution.attributor import Attributor
from trackstar.corpus import open_corpus
from trackstar.explorer.app import make_app
from trackstar.explorer.jobs import Jobs
from trackstar.explorer.live import LiveIndex
from trackstar.explorer.result_files import read_result_file
from trackstar.explorer.server import http_server, listen
from trackstar.store import Index
from trackstar.workers.index_model import model_of_index

HEADERS = {"X-Trackstar": "1", "Content-Type": "application/json"}


@contextlib.contextmanager
def explorer(results: Sequence[Path] = (), live: LiveIndex | None = None) -> Iterator[str]:
    """Serve result files and an index; yield the address, without a trailing slash."""
    listening = listen(0)
    port = listening.getsockname()[1]
    jobs = Jobs()
    files = [read_result_file(path) for path in results]
    app = make_app(files, live, hosts=frozenset({f"127.0.0.1:{port}", f"localhost:{port}"}), jobs=jobs)
    server = http_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        jobs.close()
        listening.close()


def finished(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Submit a job, wait for its end and return it."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return waited(client, response.json()["job"])


def result(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Submit a job and return its result."""
    job = finished(client, path, body)
    assert job["state"] == "done", job["error"]
    return job["result"]


def waited(client: httpx.Client, number: int) -> dict[str, Any]:
    """Wait for a job's end and return it."""
    deadline = time.monotonic() + 120
    while (job := client.get(f"/api/jobs/{number}").json())["state"] in ("queued", "running"):
        assert time.monotonic() < deadline, job
        time.sleep(0.01)
    return job


def opened(index: Index, corpus: Path | None) -> LiveIndex:
    """An index opened for questions, with the corpus whose fields are shown."""
    attributor = Attributor(index, model_of_index(index), damping=0.1)
    return LiveIndex(
        attributor, encoder=None, corpora=[open_corpus(str(corpus), id_field="id")] if corpus else [], task_queries=0
    )


def question_body(query: int = 0, **changes: Any) -> dict[str, Any]:
    """The request body of a question about a capital."""
    question = QUERIES[query]
    return {
        "prompt": question.prompt,
        "completion": question.completion,
        "methods": ["TrackStar", "BM25"],
        "top": 5,
    } | changes
