"""A load on the explorer's API: many clients who ask, browse, hang up and send nonsense, for a while."""

import contextlib
import dataclasses
import json
import random
import socket
import statistics
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import httpx
import psutil

from capitals import QUERIES, TEXTS
from explorer_server import HEADERS, question_body
from faults.processes import PROCESSES
from faults.setting import Setting

CLIENTS = 8
_WARMING_SHARE = 0.25


def _serve(connection: Any, model: str, folder: str) -> None:
    """The server's process: an index of a few texts and two result files, until told to end."""
    import torch

    from explorer_server import explorer, opened
    from release_file import write_release_file
    from trackstar.indexing.build import build_index

    torch.set_num_threads(1)
    place = Path(folder)
    place.mkdir(parents=True)
    corpus = place / "corpus.jsonl"
    lines = [{"id": f"e{row}", "text": text, "source": f"s{row % 5}"} for row, text in enumerate(TEXTS)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    index = build_index(
        model, str(corpus), place / "index", side=4, layer_blocks=2, codec="float32", second_moment_examples=8,
        progress=False,
    )  # fmt: skip
    results = [
        write_release_file(place / "one.jsonl", queries=60),
        write_release_file(place / "two.jsonl", queries=50, candidates=7),
    ]
    with explorer(results, opened(index, corpus)) as address:
        connection.send(address)
        connection.recv()


@dataclasses.dataclass(slots=True, kw_only=True)
class _Seen:
    """What the clients have seen; each has its own, which are put together at the end."""

    statuses: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=lambda: defaultdict(list))
    hung_up: int = 0
    answers: int = 0
    compared: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)


_PAGES = (
    "/",
    "/api/session",
    *(f"/api/runs/{run}/queries?offset={offset}&limit=20" for run in (0, 1) for offset in (0, 20, 40)),
    *(f"/api/runs/0/queries/{place}" for place in range(0, 60, 7)),
    *(f"/api/runs/1/queries/{place}/raw" for place in range(0, 50, 9)),
    *(f"/api/runs/0/queries/{place}/export?format={kind}" for place in (3, 30) for kind in ("csv", "html", "jsonl")),
    "/api/runs/0/export?format=csv",
    "/api/runs/1/export?format=jsonl",
    *(f"/api/candidates/{row}/text" for row in range(0, len(TEXTS), 5)),
)
"""Addresses whose answers stay the same."""

_NONSENSE: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("GET", "/api/runs/99/queries", {}),
    ("GET", "/api/runs/-1/queries", {}),
    ("GET", "/api/runs/x/queries", {}),
    ("GET", "/api/runs/0/queries?limit=1000000", {}),
    ("GET", "/api/runs/0/queries?score_min=nan", {}),
    ("GET", "/api/runs/0/queries/100000", {}),
    ("GET", "/api/candidates/-5/text", {}),
    ("GET", "/api/candidates/999999999999999999999/text", {}),
    ("GET", "/api/jobs/0", {}),
    ("GET", "/api/answers/%00%ff", {}),
    ("GET", "/..%2f..%2fetc/passwd", {}),
    ("GET", "/api/session?" + "x" * 20_000, {}),
    ("POST", "/api/session", {"json": {}}),
    ("POST", "/api/jobs/123456789/cancel", {}),
    ("POST", "/api/answers", {"content": b"{"}),
    ("POST", "/api/answers", {"content": b"\xff\xfe"}),
    ("POST", "/api/answers", {"content": b"[" * 50_000}),
    ("POST", "/api/answers", {"content": b'{"prompt": "\\ud800", "completion": "\\udfff", "methods": ["BM25"]}'}),
    ("POST", "/api/answers", {"json": question_body(top=0)}),
    ("POST", "/api/answers", {"json": question_body(methods=["nothing"])}),
    ("POST", "/api/answers", {"json": question_body(prompt="x" * 300_000)}),
    ("POST", "/api/answers", {"json": question_body(), "headers": {"Content-Type": "text/plain"}}),
    ("POST", "/api/answers", {"json": question_body(), "headers": {"X-Trackstar": "0"}}),
    ("POST", "/api/answers", {"json": question_body(), "headers": {"Origin": "http://other.example"}}),
    ("POST", "/api/answers", {"json": question_body(), "headers": {"Host": "other.example"}}),
    ("POST", "/api/answers/nothing/tokens", {"json": {"row": 0, "over": "query"}}),
    ("POST", "/api/generate", {"json": {"prompt": "x", "max_new_tokens": 10**9}}),
)  # fmt: skip


class _Client:
    """One client; what it sees of unchanging things is compared with what a single client was given before."""

    def __init__(self, address: str, seed: str, known: dict[str, Any] | None) -> None:
        self._http = httpx.Client(base_url=address, headers=HEADERS, timeout=60)
        self._address = address.removeprefix("http://").split(":")
        self._random = random.Random(seed)
        self._known = known
        self.seen = _Seen()

    def learn(self) -> dict[str, Any]:
        """What everything gives that stays the same, asked by this client alone."""
        known: dict[str, Any] = {page: self._page(page) for page in _PAGES}
        for number in range(len(QUERIES)):
            known[f"question {number}"] = self._question(number)
        return known

    def run(self, until: float) -> None:
        """Do one thing after the other."""
        often, seldom = (self._browse, self._ask), (self._nonsense, self._hang_up, self._cancel)
        acts = (*often, *often, self._browse, *seldom)
        while time.monotonic() < until:
            try:
                self._random.choice(acts)()
            except Exception as error:
                self.seen.wrong.append(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Let its connections go."""
        self._http.close()

    def _request(self, name: str, method: str, path: str, **options: Any) -> httpx.Response:
        began = time.perf_counter()
        response = self._http.request(method, path, **options)
        self.seen.seconds[name].append(time.perf_counter() - began)
        self.seen.statuses[str(response.status_code)] += 1
        if response.status_code >= 500:
            self.seen.wrong.append(f"{method} {path[:200]}: {response.status_code} {response.text[:200]}")
        return response

    def _page(self, page: str) -> str:
        response = self._request("browsing", "GET", page)
        if response.status_code != 200:
            self.seen.wrong.append(f"GET {page}: {response.status_code}")
        return response.text

    def _browse(self) -> None:
        page = self._random.choice(_PAGES)
        self._compare(page, self._page(page))

    def _job(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """A job's end; None where too much is waiting."""
        while True:
            response = self._request("asking", "POST", path, json=body)
            if response.status_code != 429:
                break
            time.sleep(0.02)
        if response.status_code == 404 and "/answers/" in path:
            return None  # no longer held
        if response.status_code != 200:
            self.seen.wrong.append(f"POST {path}: {response.status_code} {response.text[:200]}")
            return None
        number = response.json()["job"]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            response = self._request("waiting", "GET", f"/api/jobs/{number}")
            if response.status_code == 404:
                return None  # many others have ended since
            job = response.json()
            if job["state"] not in ("queued", "running"):
                return job
            time.sleep(0.005)
        self.seen.wrong.append(f"POST {path}: no end after 60 s")
        return None

    def _question(self, number: int) -> Any:
        began = time.perf_counter()
        job = self._job("/api/answers", question_body(number))
        if job is None:
            return None
        if job["state"] != "done":
            self.seen.wrong.append(f"question {number}: {job['state']} {job['error']}")
            return None
        self.seen.seconds["answers"].append(time.perf_counter() - began)
        self.seen.answers += 1
        answer = job["result"]
        found = {"answer": answer}
        key = answer["key"]
        row = answer["rankings"][0]["proponents"][0]["row"]
        split = self._job(f"/api/answers/{key}/tokens", {"row": row, "over": "candidate"})
        found["split"] = split and split["result"]
        for part in ("insight", "groups?field=source", "export?format=csv"):
            response = self._request("browsing", "GET", f"/api/answers/{key}/{part}")
            found[part] = response.text if response.status_code == 200 else None
        return found

    def _ask(self) -> None:
        number = self._random.randrange(len(QUERIES))
        found = self._question(number)
        known = self._known and self._known[f"question {number}"]
        if found is None or not known:
            return
        for part, content in found.items():
            if content is not None:
                self._compare(f"question {number}, {part}", content, known[part])

    def _compare(self, name: str, found: Any, known: Any = None) -> None:
        if self._known is None:
            return
        self.seen.compared += 1
        if found != (self._known[name] if known is None else known):
            self.seen.wrong.append(f"{name}: another answer than a single client's: {str(found)[:300]}")

    def _nonsense(self) -> None:
        method, path, options = self._random.choice(_NONSENSE)
        response = self._request("nonsense", method, path, **options)
        if response.status_code < 400:
            self.seen.wrong.append(f"{method} {path[:100]}: {response.status_code}, expected a refusal")

    def _cancel(self) -> None:
        body = {"prompt": "The capital", "max_new_tokens": 40}
        response = self._request("asking", "POST", "/api/generate", json=body)
        if response.status_code == 200:
            self._request("asking", "POST", f"/api/jobs/{response.json()['job']}/cancel")

    def _hang_up(self) -> None:
        """Begin a request and go, before all of it is sent or all of the answer has come."""
        host, port = self._address
        head = f"Host: {host}:{port}\r\nX-Trackstar: 1\r\nContent-Type: application/json\r\n"
        body = json.dumps(question_body(self._random.randrange(len(QUERIES))))
        said = self._random.choice(
            (
                f"GET /api/runs/0/export?format=csv HTTP/1.1\r\n{head}\r\n",
                f"POST /api/answers HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n{body}",
                f"POST /api/answers HTTP/1.1\r\n{head}Content-Length: 100000\r\n\r\n{{",
                "GET / HTTP/9.9\r\n\r\n",
                "\x00\x01 nonsense\r\n\r\n",
            )
        )
        cut = len(said) if self._random.random() < 0.5 else self._random.randrange(1, len(said))
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=2) as connection:
            connection.sendall(said[:cut].encode("latin-1"))
            if self._random.random() < 0.3:
                connection.recv(10)
        self.seen.hung_up += 1


def soak(setting: Setting, seconds: float, seed: int) -> dict[str, Any]:
    """Let clients loose on the explorer's server for so long; gives the figures."""
    connection, theirs = PROCESSES.Pipe()
    folder = setting.folder / f"explorer-{time.monotonic_ns()}"
    server = PROCESSES.Process(target=_serve, args=(theirs, setting.model, str(folder)), daemon=True)
    server.start()
    theirs.close()
    with contextlib.ExitStack() as opened:
        opened.callback(server.join)
        opened.callback(server.kill)
        address = connection.recv()

        def client(name: object, known: dict[str, Any] | None) -> _Client:
            return opened.enter_context(contextlib.closing(_Client(address, f"{seed} {name}", known)))

        single = client("single", None)
        known = single.learn()
        process = psutil.Process(server.pid)
        memory = [process.memory_info().rss]
        clients = [client(number, known) for number in range(CLIENTS)]
        began = time.monotonic()
        threads = [threading.Thread(target=one.run, args=(began + seconds,)) for one in clients]
        for thread in threads:
            thread.start()
        for share in (_WARMING_SHARE, 1.0):
            time.sleep(max(0.0, began + share * seconds - time.monotonic()))
            memory.append(process.memory_info().rss)
        for thread in threads:
            thread.join()
        # It still answers as it did.
        after = client("after", known)
        for page in _PAGES:
            after._compare(page, after._page(page))
        wrong = [*single.seen.wrong, *after.seen.wrong, *(line for one in clients for line in one.seen.wrong)]
        if not server.is_alive():
            wrong.append(f"the server has ended with {server.exitcode}")
        else:
            connection.send("end")
            server.join(30)
    return _figures([one.seen for one in clients], seconds, memory, wrong)


def _figures(seen: list[_Seen], seconds: float, memory: list[int], wrong: list[str]) -> dict[str, Any]:
    names = sorted({name for one in seen for name in one.seconds})
    times = {name: [value for one in seen for value in one.seconds[name]] for name in names}
    statuses: Counter[str] = sum((one.statuses for one in seen), Counter())
    begin, warm, end = (round(size / 2**20, 1) for size in memory)
    return {
        "clients": CLIENTS,
        "seconds": seconds,
        "requests": statuses.total(),
        "connections_hung_up": sum(one.hung_up for one in seen),
        "questions_answered": sum(one.answers for one in seen),
        "compared_with_a_single_client": sum(one.compared for one in seen),
        "statuses": dict(sorted(statuses.items())),
        "milliseconds": {
            name: {"requests": len(values), "p50": _quantile(values, 50), "p99": _quantile(values, 99)}
            for name, values in times.items()
        },
        "memory_mib": {"begin": begin, f"after {_WARMING_SHARE:.0%}": warm, "end": end},
        "wrong": wrong[:50],
    }


def _quantile(values: list[float], percent: int) -> float:
    if len(values) < 2:
        return round(1000 * sum(values), 2)
    return round(1000 * statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 2)
