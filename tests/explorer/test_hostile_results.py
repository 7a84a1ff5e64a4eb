"""Whatever a results file holds, the explorer answers valid JSON, or refuses the file in one line."""

import json
import math
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from explorer_server import HEADERS, explorer
from release_file import write_hostile_file, write_release_file
from trackstar.errors import CorpusError
from trackstar.explorer.result_files import read_result_file

EXPORTS = ("/api/runs/0/export?format=jsonl", "/api/runs/0/queries/0/export?format=jsonl")


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def strict(text: str) -> Any:
    """The value of a JSON text that every reader of JSON takes."""
    value = json.loads(text, parse_constant=no_constant)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # fails for half a surrogate pair
    return value


def written(folder: Path, text: str) -> Path:
    path = folder / "results.jsonl"
    path.write_text(text + "\n")
    return path


def line(**changes: Any) -> dict[str, Any]:
    lists = {"proponents": ["t"], "proponent_ids": ["x"], "proponent_scores": [0.5]}
    return {"example_id": "q", "prompt": "p", "completion": "c", **lists} | changes


@pytest.mark.parametrize(
    ("field", "exported"),
    [
        ("NaN", None), ("-Infinity", None), ('[1, {"a": Infinity}]', [1, {"a": None}]), ("1e999", 1e999),
        (r'"a\ud800"', "a\ufffd"), (r'{"\udc00": "NaN"}', {"\ufffd": "NaN"}), (r'"\ud83c\udf05"', "🌅"),
        ("1" * 4000, int("1" * 4000)), ('"NaN"', "NaN"), ("[" * 90 + "]" * 90, ...),
    ],
)  # fmt: skip
def test_exported_lines_are_valid_json(tmp_path: Path, field: str, exported: Any):
    path = written(tmp_path, json.dumps(line())[:-1] + f', "extra": {field}, "groundtruth": {field}}}')
    with explorer([path]) as address, httpx.Client(base_url=address, headers=HEADERS) as client:
        for place in ("/api/session", "/api/runs/0/queries", "/api/runs/0/queries/0", "/api/runs/0/queries/0/raw"):
            response = client.get(place)
            assert response.status_code == 200
            strict(response.text)
        for place in EXPORTS:
            found = strict(client.get(place).text) if field != "1e999" else json.loads(client.get(place).text)
            assert exported is ... or found["extra"] == exported
            assert {name: found[name] for name in line()} == line()
        for form in ("csv", "html"):
            assert client.get(f"/api/runs/0/export?format={form}").content.decode()


@pytest.mark.parametrize("depth", [200, 900, 990, 5000])
@pytest.mark.parametrize("around", [("[", "]"), ('{"a":', "}")])
def test_deeply_nested_fields_are_refused_when_the_file_is_read(tmp_path: Path, depth: int, around: tuple[str, str]):
    value = around[0] * depth + "1" + around[1] * depth
    with pytest.raises(CorpusError, match=r"results\.jsonl:1: "):
        read_result_file(written(tmp_path, json.dumps(line())[:-1] + f', "groundtruth": {value}}}'))


def test_long_texts_with_brackets_are_not_deep(tmp_path: Path):
    assert read_result_file(written(tmp_path, json.dumps(line(proponents=["[{" * 500])))).lines


@pytest.mark.parametrize("name", ["evaluation_value", "train_value"])
def test_a_report_with_a_number_that_is_not_finite_is_refused(tmp_path: Path, name: str):
    path = written(tmp_path, json.dumps(line()))
    mixing = {"value": 0.5, "rule": "r", "queries": 1, "rank": 0, name: math.nan}
    (tmp_path / "results.report.json").write_text(json.dumps({"mixing": mixing, "damping": 0.1, "damping_rule": "r"}))
    with pytest.raises(CorpusError, match="a number in it is not finite"):
        read_result_file(path)


@pytest.mark.parametrize("change", ["appended", "replaced", "removed"])
def test_the_session_says_that_a_file_has_changed_and_shows_what_was_read(tmp_path: Path, change: str):
    paths = [write_release_file(tmp_path / "one.jsonl", queries=3), write_hostile_file(tmp_path / "two.jsonl")]
    with explorer(paths) as address, httpx.Client(base_url=address, headers=HEADERS) as client:
        before = client.get("/api/runs/0/queries").json()
        assert [run["changed"] for run in client.get("/api/session").json()["runs"]] == [False, False]
        if change == "appended":
            with paths[0].open("a") as file:
                file.write("broken\n")
        elif change == "replaced":
            os.replace(write_release_file(tmp_path / "new.jsonl", queries=3, seed=1), paths[0])
        else:
            paths[0].unlink()
        assert [run["changed"] for run in client.get("/api/session").json()["runs"]] == [True, False]
        assert client.get("/api/runs/0/queries").json() == before


def test_a_pipe_or_device_with_the_name_of_results_is_refused_at_once(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to("pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name, what in {"pipe": "a pipe", "link": "a pipe", "zero": "a device", "loop": ""}.items():
        with pytest.raises(CorpusError, match=rf"{name}\.jsonl: .*{what}"):
            read_result_file(tmp_path / f"{name}.jsonl")


def test_results_are_read_through_a_link(tmp_path: Path):
    write_release_file(tmp_path / "one.jsonl", queries=3)
    (tmp_path / "link.jsonl").symlink_to("one.jsonl")
    file = read_result_file(tmp_path / "link.jsonl")
    assert (file.name, len(file.lines), file.changed) == ("link.jsonl", 3, False)
