"""The explorer's server refuses other origins and large, slow or silent requests; hostile texts stay text."""

import contextlib
import csv
import html.parser
import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from explorer_server import HEADERS, explorer
from release_file import HOSTILE, LONG, write_hostile_file
from trackstar.explorer import connections, security
from trackstar.explorer.security import CONTENT_SECURITY_POLICY, LARGEST_BODY, MOST_AT_ONCE


def test_every_answer_carries_the_strict_policy(client: httpx.Client):
    for path in ("/", "/api/session", "/nothing", "/api/runs/9/queries"):
        headers = client.get(path).headers
        assert headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers
    assert "unsafe" not in CONTENT_SECURITY_POLICY


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
    ],
)
def test_other_hosts_and_origins_are_refused(client: httpx.Client, headers: dict[str, str], status: int):
    assert client.get("/api/session", headers=headers).status_code == status


def test_a_link_from_another_site_opens_only_the_page(client: httpx.Client):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=headers).status_code == 200
    assert client.get("/api/runs/0/export?format=csv", headers=headers).status_code == 403


def test_requests_that_change_anything_need_the_header_and_json(address: str):
    with httpx.Client(base_url=address) as plain:
        assert plain.post("/api/generate", json={"prompt": "x"}).status_code == 403
        assert plain.post("/api/jobs/1/cancel").status_code == 403
        assert plain.post("/api/jobs/99999/cancel", headers={"X-Trackstar": "1"}).status_code == 404
        form = plain.post(
            "/api/generate", content="prompt=x", headers={"X-Trackstar": "1", "Content-Type": "text/plain"}
        )
        assert form.status_code == 415


def test_large_bodies_are_refused_with_or_without_a_content_length(client: httpx.Client):
    body = json.dumps({"prompt": "x" * LARGEST_BODY}).encode()
    assert client.post("/api/generate", content=body).status_code == 413

    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 16_384

    assert client.post("/api/generate", content=parts()).status_code == 413
    assert client.get("/api/session").status_code == 200


def test_a_request_whose_body_never_arrives_times_out(
    address: str, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(security, "BODY_SECONDS", 0.5)
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /api/answers HTTP/1.1\r\nHost: {host}:{port}\r\nX-Trackstar: 1\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(MOST_AT_ONCE)
        ]
        for connection in connections:
            connection.sendall(head.encode())
        assert all(connection.recv(64).startswith(b"HTTP/1.1 408") for connection in connections)
    assert client.get("/api/session").status_code == 200


def test_silent_connections_are_closed(results: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    with explorer(results[:1]) as address:
        host, port = address.removeprefix("http://").split(":")
        for request in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(request)
                assert connection.recv(64) == b""
        with httpx.Client(base_url=address) as client:
            assert client.get("/api/session").status_code == 200
            time.sleep(0.5)
            assert client.get("/api/session").status_code == 200


def test_a_slow_download_is_not_cut_off(client: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(security, "SLOWEST_SECONDS", 0.3)
    with client.stream("GET", "/api/runs/0/export", params={"format": "csv"}) as response:
        time.sleep(0.8)
        assert len(list(csv.DictReader(io.StringIO(response.read().decode())))) == 60 * 13


def test_unpaired_surrogates_are_replaced_in_every_field(tmp_path: Path):
    half = "a \ud800 b"
    record = json.loads(write_hostile_file(tmp_path / "h.jsonl").read_text())
    fields = "example_id query_set inputs_plaintext targets_plaintext relation entity0 entity1 c4_frequency_bucket"
    record |= dict.fromkeys([*fields.split(), "groundtruth"], half)
    record |= {"proponents": [half], "proponent_ids": [half], "proponent_scores": [0.5], "entity0_alias": [half]}
    path = tmp_path / "half.jsonl"
    path.write_text(json.dumps(record) + "\n")
    mixing = {"value": 0.5, "rule": half, "queries": 1, "rank": 0}
    (tmp_path / "half.report.json").write_text(json.dumps({"mixing": mixing, "damping": 0.1, "damping_rule": half}))
    with explorer([path]) as address, httpx.Client(base_url=address, headers=HEADERS) as client:
        for place in (
            "/api/session", "/api/runs/0/queries", "/api/runs/0/queries/0", "/api/runs/0/queries/0/raw",
            "/api/runs/0/export?format=csv", "/api/runs/0/export?format=jsonl", "/api/runs/0/export?format=html",
        ):  # fmt: skip
            response = client.get(place)
            assert response.status_code == 200, place
            assert response.text
        page = client.get("/api/runs/0/queries").json()
        wanted = {"relation": page["relations"][0]["value"]}
        assert client.get("/api/runs/0/queries", params=wanted).json()["matching"] == 1


def test_hostile_entity_names_do_not_slow_the_search_for_them(tmp_path: Path):
    record = json.loads(write_hostile_file(tmp_path / "h.jsonl").read_text())
    names = [" ".join(["a"] * 4000) + f" b{number}" for number in range(100)]
    record |= {"entity0": names[0], "entity0_alias": names[1:], "proponents": ["a " * 50_000] * 10}
    record |= {"proponent_ids": ["x"] * 10, "proponent_scores": [0.1] * 10}
    path = tmp_path / "names.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with explorer([path]) as address, httpx.Client(base_url=address, headers=HEADERS, timeout=20) as client:
        assert client.get("/api/runs/0/queries/0").status_code == 200


def test_paths_outside_the_front_end_are_not_found(address: str):
    host, port = address.removeprefix("http://").split(":")
    for path in ("/../app.py", "/..%2fapp.py", "/assets/../../app.py", "/%2e%2e/%2e%2e/errors.py", "//etc/passwd"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 404"), path


class _Tags(html.parser.HTMLParser):
    """Collects the tags and attributes that a browser would find in an exported page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_hostile_texts_stay_text_and_long_texts_come_in_parts(client: httpx.Client):
    found = client.get("/api/runs/2/queries/0").json()
    assert [candidate["text"] for candidate in found["proponents"][:-1]] == list(HOSTILE)
    long = found["proponents"][-1]
    assert (len(long["text"]), long["characters"]) == (20_000, len(LONG))
    rank = long["rank"]
    part = client.get(f"/api/runs/2/queries/0/proponents/{rank}/text", params={"start": 950_000}).json()
    assert (part["text"], part["start"], part["characters"]) == (LONG[950_000:], 950_000, len(LONG))


def test_exported_pages_hold_no_markup_from_the_corpus(client: httpx.Client):
    page = client.get("/api/runs/2/export?format=html").text
    tags = _Tags()
    tags.feed(page)
    assert tags.tags <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "b", "p", "small", "table",
                         "tr", "td"}  # fmt: skip
    assert not {name for name in tags.attributes if name.startswith("on")}
    assert "script" not in tags.tags
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "⟨U+202E⟩" in page
    cells = list(csv.reader(io.StringIO(client.get("/api/runs/2/export?format=csv").text)))[1:]
    assert not [cell for row in cells for cell in row if cell[:1] in "=@" and cell]
