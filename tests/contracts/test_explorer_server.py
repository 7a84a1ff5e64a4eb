"""The explorer's server: what it gives, what it refuses, and that hostile texts come out of it as text."""

import contextlib
import csv
import html.parser
import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from capitals import CAPITALS, QUERIES, TEXTS
from explorer_server import HEADERS, explorer, finished, result, waited
from release_file import HOSTILE, LONG, write_hostile_file, write_release_file
from tiny_models import TinyModelFolder
from trackstar.attribution import Attributor
from trackstar.errors import CorpusError
from trackstar.examples import open_corpus
from trackstar.explorer import live as live_module
from trackstar.explorer import security, server
from trackstar.explorer.jobs import MOST_WAITING, Jobs, TooManyJobsError
from trackstar.explorer.live import LiveIndex
from trackstar.explorer.result_files import read_result_file
from trackstar.explorer.security import CONTENT_SECURITY_POLICY, LARGEST_BODY, MOST_AT_ONCE
from trackstar.model import load_model
from trackstar.pipeline import answer_queries, build_index
from trackstar.progress import Progress
from trackstar.store import Index

COUNTRIES = list(CAPITALS)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("results")
    return [
        write_release_file(folder / "one.jsonl", queries=60),
        write_release_file(folder / "two.jsonl", queries=50, passages=7),
        write_hostile_file(folder / "hostile.jsonl"),
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [
        {"id": f"e{row}", "text": text, "source": COUNTRIES[row // 4], "year": 1990 + row % 4, "none": None}
        for row, text in enumerate(TEXTS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def index(corpus: Path, tiny_model_folders: TinyModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("index") / "index"
    model = tiny_model_folders("llama", "bos")
    return build_index(
        model, str(corpus), out, side=4, layer_blocks=2, codec="float32", second_moment_examples=8, progress=False
    )


def opened(index: Index, corpus: Path | None) -> LiveIndex:
    model = load_model(index.manifest.model.source, layer_blocks=2)
    attributor = Attributor(index, model, damping=0.1)
    return LiveIndex(
        attributor, encoder=None, corpus=open_corpus(str(corpus), id_field="id") if corpus else None, task_queries=0
    )


@pytest.fixture(scope="module")
def address(results: list[Path], index: Index, corpus: Path) -> Iterator[str]:
    with explorer(results, opened(index, corpus)) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, headers=HEADERS, timeout=60) as found:
        yield found


# ---- Results ------------------------------------------------------------------------------------------------


def test_the_session_tells_what_is_open_and_no_folder_above_it(client: httpx.Client, results: list[Path]):
    session = client.get("/api/session").json()
    assert [run["name"] for run in session["runs"]] == ["one.jsonl", "two.jsonl", "hostile.jsonl"]
    assert [run["queries"] for run in session["runs"]] == [60, 50, 1]
    assert session["index"]["candidates"] == len(TEXTS)
    assert session["index"]["methods"] == ["TrackStar", "BM25"]
    assert session["index"]["metadata"] == ["source", "year", "none"]
    assert str(results[0].parent.parent) not in json.dumps(session)


def test_a_query_comes_with_its_passages_marks_and_categories(client: httpx.Client, results: list[Path]):
    record = json.loads(results[0].read_text().splitlines()[7])
    found = client.get("/api/runs/0/queries/7").json()
    assert found["prompt"] == record["inputs_plaintext"]
    assert [p["text"] for p in found["proponents"]] == record["proponents"]
    assert [p["score"] for p in found["opponents"]] == record["opponent_scores"]
    assert [p["correct"] for p in found["proponents"]] == record["proponent_correct"]
    for passage in found["proponents"]:
        marked = {(m["entity"], passage["text"][m["start"] : m["stop"]]) for m in passage["marks"]}
        names = {"subject": record["entity0"], "object": record["entity1"]}
        for entity, name in names.items():
            assert ((entity, name) in marked) == (f" {name} " in passage["text"])
        if {entity for entity, _ in marked} == {"subject", "object"}:
            assert passage["category"] in ("entails", "both entities")


def test_filters_of_the_address_are_those_of_the_page(client: httpx.Client, results: list[Path]):
    records = [json.loads(line) for line in results[0].read_text().splitlines()]
    page = client.get(
        "/api/runs/0/queries",
        params={"relation": ["capital", "author"], "model_correct": "yes", "sort": "score", "descending": "true"},
    ).json()
    expected = [r for r in records if r["relation"] in ("capital", "author") and r["is_8b_correct"]]
    expected.sort(key=lambda r: -r["proponent_scores"][0])
    assert [row["example_id"] for row in page["items"]] == [r["example_id"] for r in expected]
    assert page["matching"] == len(expected) > 0


def test_the_raw_record_is_the_files_own_line(client: httpx.Client, results: list[Path]):
    assert client.get("/api/runs/1/queries/3/raw").json()["text"] == results[1].read_text().splitlines()[3]


def test_exports_hold_what_matches(client: httpx.Client, results: list[Path]):
    lines = results[0].read_text().splitlines()
    chosen = [line for line in lines if json.loads(line)["relation"] == "capital"]
    params = {"relation": "capital"}
    exported = client.get("/api/runs/0/export", params=params | {"format": "jsonl"})
    assert exported.text.splitlines() == chosen
    assert exported.headers["content-disposition"] == 'attachment; filename="one.jsonl"'
    rows = list(csv.DictReader(io.StringIO(client.get("/api/runs/0/export", params=params | {"format": "csv"}).text)))
    assert len(rows) == 13 * len(chosen)
    assert [row["text"] for row in rows[:10]] == json.loads(chosen[0])["proponents"]
    page = client.get("/api/runs/0/export", params=params | {"format": "html"}).text
    for line in chosen:
        assert json.loads(line)["inputs_plaintext"] in page
    both = client.get("/api/runs/0/queries/2/export", params={"format": "csv", "other": 1}).text
    assert {row["method"] for row in csv.DictReader(io.StringIO(both))} == {"one.jsonl", "two.jsonl"}


@pytest.mark.parametrize(
    ("path", "status", "detail"),
    [
        ("/api/runs/9/queries", 404, "run 9: expected 0 to 2"),
        ("/api/runs/0/queries/60", 404, "query 60: expected 0 to 59"),
        ("/api/runs/0/queries/-1", 404, "query -1: expected 0 to 59"),
        ("/api/runs/0/queries?limit=201", 422, "limit: Input should be less than or equal to 200"),
        ("/api/runs/0/queries?sort=__class__", 422, "sort: "),
        ("/api/runs/0/queries?score_min=nan", 422, "score_min: "),
        ("/api/runs/0/queries/1/proponents/11/text", 404, "query 1 has no proponents of rank 11"),
        ("/api/runs/0/queries/1/anything/1/text", 422, "side: "),
        ("/api/runs/0/queries?search=" + "x" * 513, 422, "search: "),
        ("/api/runs/0/queries?search=" + "x" * 20_000, 414, "the address is longer than"),
        ("/api/answers/none", 404, "the answer is not held any more; attribute again"),
        ("/api/passages/24/text", 400, "row 24: expected a candidate of the index, 0 to 23"),
        ("/api/jobs/123456", 404, "job 123456 is not known any more"),
        ("/nothing", 404, "Not Found"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(client: httpx.Client, path: str, status: int, detail: str):
    response = client.get(path)
    assert response.status_code == status
    assert response.json()["detail"].startswith(detail)
    assert "\n" not in response.json()["detail"]


# ---- Live ---------------------------------------------------------------------------------------------------


def asked(query: int = 0, **changes: Any) -> dict[str, Any]:
    one = QUERIES[query]
    return {"prompt": one.prompt, "completion": one.completion, "methods": ["TrackStar", "BM25"], "top": 5} | changes


def test_an_answer_ranks_as_the_pipeline_and_is_held_under_its_key(client: httpx.Client, index: Index):
    answer = result(client, "/api/answers", asked())
    report = answer_queries(index, QUERIES[:1], k=5, damping=0.1, progress=False)
    (expected,) = report.results
    ours, words = answer["rankings"]
    assert [p["row"] for p in ours["proponents"]] == [r.row for r in expected.proponents]
    assert [p["score"] for p in ours["proponents"]] == pytest.approx(
        [r.influence for r in expected.proponents], abs=2e-6
    )
    assert [p["row"] for p in ours["opponents"]] == [r.row for r in expected.opponents]
    assert answer["probability"] == pytest.approx(expected.probability, rel=1e-5)
    assert words["method"] == "BM25"
    assert words["opponents"] == []
    assert words["proponents"][0]["text"] == TEXTS[0]
    assert words["proponents"][0]["metadata"] == {"source": "France", "year": "1990"}
    assert client.get(f"/api/answers/{answer['key']}").json() == answer
    assert result(client, "/api/answers", asked())["key"] == answer["key"]
    assert result(client, "/api/answers", asked(top=4))["key"] != answer["key"]


def test_tokens_sum_to_the_influence_and_spans_to_the_text(client: httpx.Client):
    answer = result(client, "/api/answers", asked(1))
    for passage in answer["rankings"][0]["proponents"]:
        for over in ("candidate", "query"):
            body = {"row": passage["row"], "over": over}
            split = result(client, f"/api/answers/{answer['key']}/tokens", body)
            assert split["influence"] == passage["score"]
            assert sum(share["influence"] for share in split["shares"]) == pytest.approx(passage["score"], abs=2e-6)
            assert split["total"] == pytest.approx(passage["score"], abs=2e-6)
            assert "".join(split["text"][s["start"] : s["stop"]] for s in split["shares"]) == split["text"]
        assert split["text"] == f"{QUERIES[1].prompt} {QUERIES[1].completion}"


def test_an_effect_is_measured(client: httpx.Client):
    answer = result(client, "/api/answers", asked())
    effect = result(client, f"/api/answers/{answer['key']}/tail-patch", {"row": 0})
    assert effect["before"] == pytest.approx(answer["probability"], rel=1e-4)
    assert effect["after"] != effect["before"]
    assert "Adafactor" in effect["step"]
    split = result(client, f"/api/answers/{answer['key']}/tokens", {"row": 0})
    details = client.get(f"/api/answers/{answer['key']}/details").json()
    assert effect in details["effects"]
    assert split in details["splits"]
    failed = finished(client, f"/api/answers/{answer['key']}/tail-patch", {"row": 24})
    assert (failed["state"], failed["error"]) == ("failed", "row 24: expected a candidate of the index, 0 to 23")


def test_generated_tokens_spell_the_text(client: httpx.Client):
    said = result(client, "/api/generate", {"prompt": "The capital of France is", "max_new_tokens": 6})
    spelled = [said["text"][token["start"] : token["stop"]] for token in said["tokens"]]
    assert "".join(spelled) == said["text"] != ""
    assert all(0 < token["probability"] <= 1 for token in said["tokens"])


def test_insight_and_groups_are_of_the_answer(client: httpx.Client):
    answer = result(client, "/api/answers", asked())
    found = client.get(f"/api/answers/{answer['key']}/insight").json()
    assert found["candidates"] == sum(found["counts"]) == len(TEXTS)
    assert found["shown"][0] == answer["rankings"][0]["proponents"][0]["score"]
    assert len(found["points"]) == len(TEXTS)
    groups = client.get(f"/api/answers/{answer['key']}/groups", params={"field": "source", "top": 24}).json()
    assert sum(group["candidates"] for group in groups["groups"]) == 24
    assert {group["in_corpus"] for group in groups["groups"]} == {1 / 6}
    wrong = client.get(f"/api/answers/{answer['key']}/groups", params={"field": "colour"})
    assert wrong.status_code == 400
    assert wrong.json()["detail"].startswith("field colour: the corpus has source, year, none")
    rows = list(csv.DictReader(io.StringIO(client.get(f"/api/answers/{answer['key']}/export?format=csv").text)))
    assert {row["method"] for row in rows} == {"TrackStar", "BM25"}
    line = json.loads(client.get(f"/api/answers/{answer['key']}/export?format=jsonl").text)
    assert line["proponents"] == [p["text"] for p in answer["rankings"][0]["proponents"]]


def test_exported_answers_are_results_that_the_explorer_opens(client: httpx.Client, tmp_path: Path):
    answer = result(client, "/api/answers", asked())
    path = tmp_path / "exported.jsonl"
    path.write_text(client.get(f"/api/answers/{answer['key']}/export?format=jsonl").text)
    (line,) = read_result_file(path).lines
    assert line.prompt == QUERIES[0].prompt
    assert list(line.scores) == [p["score"] for p in answer["rankings"][0]["proponents"]]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422), (asked(methods=[]), 422), (asked(methods=["TRAK"]), 400), (asked(methods=["BM25", "BM25"]), 400),
        (asked(top=0), 422), (asked(top=100_000), 422), (asked(completion=""), 422), (asked(extra=1), 422),
        (asked(prompt="x" * 40_000), 422), ([1], 422),
    ],
)  # fmt: skip
def test_wrong_questions_are_refused_before_they_are_queued(client: httpx.Client, body: Any, status: int):
    response = client.post("/api/answers", json=body)
    assert response.status_code == status, response.text
    assert response.json()["detail"]


def test_what_cannot_be_attributed_fails_with_its_line(client: httpx.Client):
    job = finished(client, "/api/answers", asked(completion="   "))
    assert job["state"] == "failed"
    assert job["error"].startswith("query query: the completion is empty")


def test_of_a_changed_corpus_no_fields_are_shown_and_the_answer_says_so(index: Index, corpus: Path, tmp_path: Path):
    changed = tmp_path / "corpus.jsonl"
    changed.write_text(corpus.read_text().replace("France", "Gaul"))
    with explorer([], opened(index, changed)) as address, httpx.Client(base_url=address, headers=HEADERS) as client:
        answer = result(client, "/api/answers", asked())
        session = client.get("/api/session").json()
    assert len(answer["notes"]) == 1
    assert "has changed since" in answer["notes"][0]
    assert "--data" in answer["notes"][0]
    assert answer["rankings"][0]["proponents"][0]["metadata"] == {}
    assert session["index"]["metadata"] == []


def test_a_prompt_that_does_not_fit_the_window_is_told(client: httpx.Client):
    answer = result(client, "/api/answers", asked(prompt="word " * 400 + "The capital of France is"))
    assert len(answer["notes"]) == 1
    assert "what stands before was not read" in answer["notes"][0]
    assert result(client, "/api/answers", asked())["notes"] == []


def test_without_an_index_live_questions_are_refused(results: list[Path]):
    with explorer(results[:1]) as address, httpx.Client(base_url=address, headers=HEADERS) as client:
        assert client.get("/api/session").json()["index"] is None
        response = client.post("/api/answers", json=asked())
        assert (response.status_code, response.json()["detail"][:16]) == (404, "no index is open")


# ---- Jobs ---------------------------------------------------------------------------------------------------


def slow_steps(seconds: float = 30.0) -> None:
    """Work that could go on for long, told step by step."""
    with Progress("Slow work", unit="steps", total=1000, shown=False) as bar:
        for _ in range(1000):
            time.sleep(seconds / 1000)
            bar.advance(1)


def test_a_job_is_watched_and_cancelled(address: str, client: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(live_module.LiveIndex, "generate", lambda _self, _request: slow_steps())
    number = client.post("/api/generate", json={"prompt": "x"}).json()["job"]
    deadline = time.monotonic() + 20
    while (job := client.get(f"/api/jobs/{number}").json())["done"] < 3:
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    assert (job["state"], job["title"], job["unit"], job["total"]) == ("running", "Slow work", "steps", 1000)
    waiting = client.post("/api/generate", json={"prompt": "y"}).json()["job"]
    assert client.delete(f"/api/jobs/{waiting}").json()["state"] == "cancelled"
    client.delete(f"/api/jobs/{number}")
    assert waited(client, number)["state"] == "cancelled"
    assert client.get(f"/api/jobs/{waiting}").json()["state"] == "cancelled"


def test_more_jobs_than_may_wait_are_refused():
    jobs = Jobs()
    try:
        jobs.submit("first", slow_steps)
        time.sleep(0.1)
        for number in range(MOST_WAITING):
            jobs.submit(f"waits {number}", slow_steps)
        with pytest.raises(TooManyJobsError):
            jobs.submit("too many", slow_steps)
    finally:
        jobs.close()


def test_a_defect_in_a_job_is_told_and_the_next_one_runs():
    jobs = Jobs()
    try:
        first = jobs.submit("broken", lambda: 1 / 0)
        second = jobs.submit("works", lambda: None)
        deadline = time.monotonic() + 10
        while (done := jobs.get(second.job)) is not None and done.state != "done":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        broken = jobs.get(first.job)
        assert broken is not None
        assert broken.state == "failed"
        assert broken.error is not None
        assert "a defect of trackstar, please report it: ZeroDivisionError" in broken.error
    finally:
        jobs.close()


# ---- Other origins, large requests, hostile texts -----------------------------------------------------------


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


def test_a_link_may_open_the_page_and_nothing_else(client: httpx.Client):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=headers).status_code == 200
    assert client.get("/api/runs/0/export?format=csv", headers=headers).status_code == 403


def test_what_changes_something_needs_the_header_and_json(address: str):
    with httpx.Client(base_url=address) as plain:
        assert plain.post("/api/generate", json={"prompt": "x"}).status_code == 403
        assert plain.delete("/api/jobs/1").status_code == 403
        assert plain.delete("/api/jobs/99999", headers={"X-Trackstar": "1"}).status_code == 404
        form = plain.post(
            "/api/generate", content="prompt=x", headers={"X-Trackstar": "1", "Content-Type": "text/plain"}
        )
        assert form.status_code == 415


def test_large_bodies_are_refused_also_where_their_length_is_not_told(client: httpx.Client):
    body = json.dumps({"prompt": "x" * LARGEST_BODY}).encode()
    assert client.post("/api/generate", content=body).status_code == 413

    def parts() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 16_384

    assert client.post("/api/generate", content=parts()).status_code == 413
    assert client.get("/api/session").status_code == 200


def test_a_body_that_does_not_come_ends_after_a_while_and_makes_room(
    address: str, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(security, "SLOWEST_SECONDS", 0.5)
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /api/answers HTTP/1.1\r\nHost: {host}:{port}\r\nX-Trackstar: 1\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(MOST_AT_ONCE)
        ]
        for connection in connections:
            connection.sendall(head.encode())
        assert all(connection.recv(64).startswith(b"HTTP/1.1 503") for connection in connections)
    assert client.get("/api/session").status_code == 200


def test_who_sends_nothing_is_hung_up_on(results: list[Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "SILENT_SECONDS", 0.3)
    with explorer(results[:1]) as address:
        host, port = address.removeprefix("http://").split(":")
        for said in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(said)
                assert connection.recv(64) == b""
        with httpx.Client(base_url=address) as client:
            assert client.get("/api/session").status_code == 200
            time.sleep(0.5)
            assert client.get("/api/session").status_code == 200


def test_a_download_may_take_its_readers_time(client: httpx.Client, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(security, "SLOWEST_SECONDS", 0.3)
    with client.stream("GET", "/api/runs/0/export", params={"format": "csv"}) as response:
        time.sleep(0.8)
        assert len(list(csv.DictReader(io.StringIO(response.read().decode())))) == 60 * 13


def test_halves_of_surrogate_pairs_are_shown_as_replaced_in_every_field(tmp_path: Path):
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


def test_names_of_entities_that_attack_the_search_for_them_are_looked_for_in_no_time(tmp_path: Path):
    record = json.loads(write_hostile_file(tmp_path / "h.jsonl").read_text())
    names = [" ".join(["a"] * 4000) + f" b{number}" for number in range(100)]
    record |= {"entity0": names[0], "entity0_alias": names[1:], "proponents": ["a " * 50_000] * 10}
    record |= {"proponent_ids": ["x"] * 10, "proponent_scores": [0.1] * 10}
    path = tmp_path / "names.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with explorer([path]) as address, httpx.Client(base_url=address, headers=HEADERS, timeout=20) as client:
        assert client.get("/api/runs/0/queries/0").status_code == 200


def test_paths_lead_nowhere_but_to_the_front_end(address: str):
    host, port = address.removeprefix("http://").split(":")
    for path in ("/../app.py", "/..%2fapp.py", "/assets/../../app.py", "/%2e%2e/%2e%2e/errors.py", "//etc/passwd"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 404"), path


class _Tags(html.parser.HTMLParser):
    """What a browser would take for markup in an exported page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_hostile_texts_come_as_text_and_long_ones_in_parts(client: httpx.Client):
    found = client.get("/api/runs/2/queries/0").json()
    assert [passage["text"] for passage in found["proponents"][:-1]] == list(HOSTILE)
    long = found["proponents"][-1]
    assert (len(long["text"]), long["characters"]) == (20_000, len(LONG))
    rank = long["rank"]
    part = client.get(f"/api/runs/2/queries/0/proponents/{rank}/text", params={"start": 950_000}).json()
    assert (part["text"], part["start"], part["characters"]) == (LONG[950_000:], 950_000, len(LONG))


def test_exported_pages_hold_no_markup_of_the_corpus(client: httpx.Client):
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


# ---- Files that are no results ------------------------------------------------------------------------------


def changed(tmp_path: Path, **fields: Any) -> Path:
    path = write_release_file(tmp_path / "bad.jsonl", queries=2)
    first, second = path.read_text().splitlines()
    record = {name: value for name, value in (json.loads(second) | fields).items() if value != "absent"}
    path.write_text(f"{first}\n{json.dumps(record)}\n")
    return path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"proponents": "absent"}, 'found no field "proponents", expected a list'),
        ({"proponent_scores": "absent"}, 'found no field "proponent_scores", expected a list'),
        ({"proponent_ids": {}}, 'found an object "proponent_ids", expected a list'),
        ({"proponents": ["a"]}, "1 proponents, 10 proponent_ids and 10 proponent_scores; expected as many"),
        ({"proponents": [1] * 10}, "proponents are not all strings"),
        ({"proponent_scores": [float("nan")] * 10}, "found score NaN, expected a finite number"),
        ({"proponent_scores": ["x"] * 10}, 'found score "x", expected a finite number'),
        ({"proponent_scores": [10**400] * 10}, "found score 1000"),
        ({"proponent_scores": [1e308] * 10}, "found score 1e+308, expected a finite number up to 1e+30"),
        ({"proponent_scores": [[[[]]]] * 10}, "found score an array"),
        ({"opponents": ["a"]}, "1 opponents, 3 opponent_ids and 3 opponent_scores"),
        ({"proponent_ais_scores": [0.5]}, "proponent_ais_scores are not one a proponent"),
        ({"inputs_plaintext": "absent"}, "no text in inputs_plaintext or prompt0 or prompt"),
        ({"targets_plaintext": 3, "entity1": "absent"}, "no text in targets_plaintext"),
        ({"example_id": "trex-00000"}, "query trex-00000 is also result 1; expected each once"),
    ],
)
def test_files_that_are_no_results_are_refused_with_file_and_line(tmp_path: Path, fields: dict, message: str):
    with pytest.raises(CorpusError) as error:
        read_result_file(changed(tmp_path, **fields))
    assert message in str(error.value)
    assert "bad.jsonl:2: " in str(error.value)


def test_a_report_beside_that_is_none_is_named(tmp_path: Path):
    path = write_release_file(tmp_path / "r.jsonl", queries=1)
    (tmp_path / "r.report.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"r\.report\.json: not the report of these results"):
        read_result_file(path)
    mixing = {"value": float("nan"), "rule": "r", "queries": 1, "rank": 0}
    (tmp_path / "r.report.json").write_text(json.dumps({"mixing": mixing, "damping": 0.1, "damping_rule": "r"}))
    with pytest.raises(CorpusError, match="a number of it is not finite"):
        read_result_file(path)
