"""The kind of question and the model's own answer: what a line says is shown, and malformed values are absent."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from explorer_server import HEADERS, explorer
from release_file import KINDS_OF_QUESTIONS, write_kinds_file
from trackstar.explorer.candidates import query_record
from trackstar.explorer.result_files import read_result_file

ABSENT = {
    "kind": None, "alternatives": [], "model_answer": None, "model_correct": None, "groundtruth": None,
    "generations": [], "sampled": 0, "confidence": None, "stated": None, "frequency": None, "bucket": None,
}  # fmt: skip
NAMES = {
    "kind": "kind", "alternatives": "alternative", "model_answer": "model_answer", "model_correct": "is_8b_correct",
    "groundtruth": "groundtruth", "generations": "8b_generations", "confidence": "8b_confidence",
    "stated": "has_trex_sentence", "frequency": "c4_frequency", "bucket": "c4_frequency_bucket",
}  # fmt: skip
LISTS = {"proponents": ["t"], "proponent_ids": ["x"], "proponent_scores": [0.5]}


def shown(folder: Path, **fields: Any) -> dict[str, Any]:
    """A line's record as the API sends it."""
    path = folder / "results.jsonl"
    path.write_text(json.dumps({"example_id": "q", "prompt": "p", "completion": "c", **LISTS, **fields}) + "\n")
    file = read_result_file(path)
    record = json.loads(query_record(file, 0, 0).model_dump_json())
    present = {name for name in NAMES if record[name] not in (None, [])}
    assert {*file.has} == present
    return record


def test_a_record_has_what_its_line_says_about_question_and_answer(tmp_path: Path):
    path = write_kinds_file(tmp_path / "kinds.jsonl")
    with explorer([path]) as address, httpx.Client(base_url=address, headers=HEADERS) as client:
        assert client.get("/api/session").json()["runs"][0]["kinds"] == ["fact", "choice", "generation", "open"]
        for place, line in enumerate(KINDS_OF_QUESTIONS):
            found = client.get(f"/api/runs/0/queries/{place}").json()
            expected = {name: line.get(field, ABSENT[name]) for name, field in NAMES.items()}
            assert {name: found[name] for name in NAMES} == expected
            assert found["sampled"] == len(line.get("8b_generations", []))
        page = client.get("/api/runs/0/queries", params={"kind": ["fact", "open"]}).json()
        assert [row["example_id"] for row in page["items"]] == ["kind-0", "kind-3"]
        assert {facet["value"] for facet in page["kinds"]} == {"fact", "choice", "generation", "open"}
        exported = client.get("/api/runs/0/export", params={"kind": "choice", "format": "jsonl"}).text
        assert [json.loads(text)["example_id"] for text in exported.splitlines()] == ["kind-1"]
        refused = client.get("/api/runs/0/queries", params={"kind": "other"})
        assert refused.status_code == 422
        assert refused.json()["detail"].startswith("kind")


DEEP = json.loads("[" * 50 + "]" * 50)


@pytest.mark.parametrize("value", [None, [], {}, [[]], {"a": 1}, DEEP, [1, "a", None], float("nan"), float("inf"), -7])
@pytest.mark.parametrize("name", NAMES)
def test_malformed_values_are_absent(tmp_path: Path, name: str, value: Any):
    found = shown(tmp_path, **{NAMES[name]: value})
    expected = dict(ABSENT)
    if value == -7 and name in ("bucket", "groundtruth", "model_answer"):
        expected[name] = "-7"
    assert {name: found[name] for name in ABSENT} == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "Fact"), ("kind", "other"), ("kind", True), ("model_correct", "false"), ("model_correct", 0.5),
        ("stated", "yes"), ("confidence", "0.5"), ("confidence", 1.01), ("confidence", True), ("confidence", 10**400),
        ("model_answer", True), ("model_answer", "  "), ("groundtruth", False), ("groundtruth", ["a"]),
        ("frequency", True), ("frequency", 2**53), ("frequency", 0.5), ("generations", {"a": "b"}),
    ],
)  # fmt: skip
def test_values_of_another_type_or_beyond_their_range_are_absent(tmp_path: Path, name: str, value: Any):
    assert shown(tmp_path, **{NAMES[name]: value})[name] == ABSENT[name]


def test_numbers_stand_for_truth_values_texts_and_whole_numbers(tmp_path: Path):
    fields = {"is_8b_correct": 1, "has_trex_sentence": 0.0, "groundtruth": 42, "model_answer": 4.5, "8b_confidence": 1}
    found = shown(tmp_path, **fields, c4_frequency=12.0, c4_frequency_bucket=3.0)
    expected = {
        "model_correct": True, "stated": False, "groundtruth": "42", "model_answer": "4.5", "confidence": 1.0,
        "frequency": 12, "bucket": "3",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_long_texts_and_lists_are_cut(tmp_path: Path):
    text = "x" * 1_000_000
    found = shown(
        tmp_path, model_answer=text, groundtruth=text, alternative=[text] * 30, **{"8b_generations": ["a"] * 100_000}
    )
    assert found["model_answer"] == found["groundtruth"] == "x" * 1999 + "…"
    assert found["alternatives"] == ["x" * 1999 + "…"] * 20
    assert (found["generations"], found["sampled"]) == (["a"] * 64, 100_000)


def test_marks_that_are_not_true_or_false_are_unknown(tmp_path: Path):
    assert shown(tmp_path, proponent_correct=["false"])["proponents"][0]["correct"] is None
