"""Result files through the explorer's API: queries, filters, exports, and errors for invalid files."""

import csv
import io
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from capitals import TEXTS
from release_file import write_release_file
from trackstar.errors import CorpusError
from trackstar.explorer.result_files import read_result_file
from trackstar.explorer.server import listen


def test_the_session_names_what_is_open_without_the_folders_above(client: httpx.Client, results: list[Path]):
    session = client.get("/api/session").json()
    assert [run["name"] for run in session["runs"]] == ["one.jsonl", "two.jsonl", "hostile.jsonl"]
    assert [run["queries"] for run in session["runs"]] == [60, 50, 1]
    assert session["index"]["candidates"] == len(TEXTS)
    assert session["index"]["methods"] == ["TrackStar", "BM25"]
    assert session["index"]["metadata"] == ["source", "year"]
    assert str(results[0].parent.parent) not in json.dumps(session)


def test_a_query_has_its_candidates_with_marks_and_categories(client: httpx.Client, results: list[Path]):
    record = json.loads(results[0].read_text().splitlines()[7])
    found = client.get("/api/runs/0/queries/7").json()
    assert found["prompt"] == record["inputs_plaintext"]
    assert [p["text"] for p in found["proponents"]] == record["proponents"]
    assert [p["score"] for p in found["opponents"]] == record["opponent_scores"]
    assert [p["correct"] for p in found["proponents"]] == record["proponent_correct"]
    for candidate in found["proponents"]:
        marked = {(m["entity"], candidate["text"][m["start"] : m["stop"]]) for m in candidate["marks"]}
        names = {"subject": record["entity0"], "object": record["entity1"]}
        for entity, name in names.items():
            assert ((entity, name) in marked) == (f" {name} " in candidate["text"])
        if {entity for entity, _ in marked} == {"subject", "object"}:
            assert candidate["category"] in ("entails", "both entities")


def test_filter_parameters_select_and_sort_the_queries(client: httpx.Client, results: list[Path]):
    records = [json.loads(line) for line in results[0].read_text().splitlines()]
    page = client.get(
        "/api/runs/0/queries",
        params={"relation": ["capital", "author"], "model_correct": "yes", "sort": "score", "descending": "true"},
    ).json()
    expected = [r for r in records if r["relation"] in ("capital", "author") and r["is_8b_correct"]]
    expected.sort(key=lambda r: -r["proponent_scores"][0])
    assert [row["example_id"] for row in page["items"]] == [r["example_id"] for r in expected]
    assert page["matching"] == len(expected) > 0


def test_the_raw_record_is_the_line_in_the_file(client: httpx.Client, results: list[Path]):
    assert client.get("/api/runs/1/queries/3/raw").json()["text"] == results[1].read_text().splitlines()[3]


def test_exports_hold_the_matching_queries(client: httpx.Client, results: list[Path]):
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
        ("/api/answers/none", 404, "the answer is no longer in memory; attribute the completion again"),
        ("/api/candidates/24/text", 404, "row: expected a candidate of the index, 0 to 23, found 24"),
        ("/api/jobs/123456", 404, "job 123456 does not exist"),
        ("/nothing", 404, "Not Found"),
    ],
)
def test_a_wrong_request_gets_an_error_of_one_line(client: httpx.Client, path: str, status: int, detail: str):
    response = client.get(path)
    assert response.status_code == status
    assert response.json()["detail"].startswith(detail)
    assert "\n" not in response.json()["detail"]


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
        (
            {"proponents": ["a"]},
            "1 proponents, 10 proponent_ids and 10 proponent_scores; expected the same",
        ),
        ({"proponents": [1] * 10}, "proponents are not all strings"),
        ({"proponent_scores": [float("nan")] * 10}, "found score NaN, expected a finite number"),
        ({"proponent_scores": ["x"] * 10}, 'found score "x", expected a finite number'),
        ({"proponent_scores": [10**400] * 10}, "found score 1000"),
        ({"proponent_scores": [1e308] * 10}, "found score 1e+308, expected a finite number up to 1e+30"),
        ({"proponent_scores": [[[[]]]] * 10}, "found score an array"),
        ({"opponents": ["a"]}, "1 opponents, 3 opponent_ids and 3 opponent_scores"),
        ({"proponent_ais_scores": [0.5]}, "proponent_ais_scores are not one number per proponent"),
        ({"inputs_plaintext": "absent"}, "no text in inputs_plaintext or prompt0 or prompt"),
        ({"targets_plaintext": 3, "entity1": "absent"}, "no text in targets_plaintext"),
        ({"example_id": "trex-00000"}, "query trex-00000 is also result 1; expected each once"),
    ],
)
def test_lines_that_are_not_results_are_refused_with_file_and_line(tmp_path: Path, fields: dict, message: str):
    with pytest.raises(CorpusError) as error:
        read_result_file(changed(tmp_path, **fields))
    assert message in str(error.value)
    assert "bad.jsonl:2: " in str(error.value)


def test_an_invalid_report_beside_the_results_is_named(tmp_path: Path):
    path = write_release_file(tmp_path / "r.jsonl", queries=1)
    (tmp_path / "r.report.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"r\.report\.json: not the report of these results"):
        read_result_file(path)
    mixing = {"value": float("nan"), "rule": "r", "queries": 1, "rank": 0}
    (tmp_path / "r.report.json").write_text(json.dumps({"mixing": mixing, "damping": 0.1, "damping_rule": "r"}))
    with pytest.raises(CorpusError, match="a number in it is not finite"):
        read_result_file(path)


def test_the_server_sends_the_last_part_of_an_answer_at_once():
    """asyncio sets TCP_NODELAY only if the protocol is given; otherwise an answer of two parts takes 40 ms."""
    with listen(0) as listening:
        assert listening.proto == socket.IPPROTO_TCP
