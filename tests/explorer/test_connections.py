"""Clients that are slow, silent or do not read keep nobody else waiting, however many they are."""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from explorer_server import explorer
from release_file import write_hostile_file
from trackstar.explorer import connections, security
from trackstar.explorer.connections import MOST_CONNECTIONS

MANY = 511
PATIENCE = 5.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Host and port of an explorer whose only export has 16 MB, more than the buffers between two sockets."""
    folder = tmp_path_factory.mktemp("large")
    record = json.loads(write_hostile_file(folder / "one.jsonl").read_text())
    record |= {"proponents": ["x" * 10_000] * 10, "proponent_ids": list("0123456789"), "proponent_scores": [0.1] * 10}
    path = folder / "large.jsonl"
    path.write_text("".join(json.dumps(record | {"example_id": f"q{number}"}) + "\n" for number in range(160)))
    with explorer([path]) as address:
        host, port = address.removeprefix("http://").split(":")
        yield host, int(port)


def request(served: tuple[str, int], path: str = "/api/session", *, method: str = "GET", headers: str = "") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: {served[0]}:{served[1]}\r\n{headers}\r\n".encode()


def connected(served: tuple[str, int], content: bytes) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE)
    connection.connect(served)
    with contextlib.suppress(ConnectionError):  # dropped in favour of others
        connection.sendall(content)
    return connection


def answered(served: tuple[str, int]) -> None:
    """Raise if a new client gets no answer soon."""
    with contextlib.closing(http.client.HTTPConnection(*served, timeout=PATIENCE)) as client:
        for path in ("/api/session", "/api/runs/0/queries/0"):  # on one connection, as browsers do
            client.request("GET", path)
            response = client.getresponse()
            assert (response.status, len(response.read()) > 100) == (200, True)


BODY = "X-Trackstar: 1\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("slow", ["no request", "half a head", "half a second head", "half a body", "answer unread"])
def test_hundreds_of_slow_clients_do_not_block_another(served: tuple[str, int], slow: str):
    content = {
        "no request": b"",
        "half a head": request(served)[:30],
        "half a second head": request(served) + request(served)[:30],
        "half a body": request(served, "/api/answers", method="POST", headers=f"{BODY}Content-Length: 9\r\n") + b"{",
        "answer unread": request(served, "/api/runs/0/export?format=jsonl"),
    }[slow]
    with contextlib.ExitStack() as stack:
        for _ in range(MANY):
            stack.enter_context(connected(served, content))
        answered(served)
        time.sleep(0.3)  # the server has now seen all that they sent
        answered(served)


def test_a_second_request_is_timed_like_the_first(served: tuple[str, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.4)
    with connected(served, request(served)) as connection:
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, len(response.read()) > 100) == (200, True)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for byte in request(served)[:40]:  # 4 seconds, if the connection were left open
                connection.sendall(bytes([byte]))
                time.sleep(0.1)
                connection.settimeout(0.001)
                with contextlib.suppress(TimeoutError):
                    assert connection.recv(64) == b""
                    break
        assert 0.3 < time.monotonic() - began < 3


def test_a_trickling_body_is_refused_and_its_connection_closed(
    served: tuple[str, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(security, "BODY_SECONDS", 0.3)
    head = request(served, "/api/generate", method="POST", headers=f"{BODY}Content-Length: 90\r\n")
    with connected(served, head) as connection:
        for _ in range(6):
            with contextlib.suppress(ConnectionError):
                connection.sendall(b" ")
            time.sleep(0.1)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within" in answer


def test_idle_connections_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trackstar.explorer.server.IDLE_SECONDS", 1)
    with explorer([write_hostile_file(tmp_path / "one.jsonl")]) as address:
        host, port = address.removeprefix("http://").split(":")
        with connected((host, int(port)), request((host, int(port)))) as connection:
            assert b"".join(iter(lambda: connection.recv(1 << 16), b"")).startswith(b"HTTP/1.1 200")


def test_a_reader_who_pauses_gets_the_whole_download(served: tuple[str, int]):
    with connected(served, request(served, "/api/runs/0/export?format=jsonl")) as connection:
        time.sleep(0.5)
        for _ in range(MOST_CONNECTIONS // 2):
            connected(served, b"").close()
        stream = connection.makefile("rb")
        size = 0
        while b"\r\n0\r\n\r\n" not in (part := stream.read1(1 << 20)):
            size += len(part)
            assert part
    assert size > 16_000_000
