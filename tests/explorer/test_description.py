"""The API's description is true: Schemathesis finds nothing that it does not say, and methods are as it says."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from explorer_server import HEADERS, explorer, opened, question_body, result
from release_file import write_hostile_file, write_release_file
from trackstar.explorer.app import make_api
from trackstar.store import Index

CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
EXAMPLES, SEED = "4", "0"
API = make_api([], None).openapi()
ROUTES = [(path, method.upper()) for path, operations in API["paths"].items() for method in operations]


def concrete(path: str) -> str:
    """A path with values in place of its parameters."""
    return re.sub(r"{\w+}", "0", path.replace("{side}", "proponents"))


@pytest.fixture
def small_address(index: Index, corpus: Path, tmp_path: Path) -> Iterator[str]:
    """An explorer whose exports are short, as they are asked for hundreds of times."""
    results = [write_release_file(tmp_path / "one.jsonl", queries=5), write_hostile_file(tmp_path / "hostile.jsonl")]
    with explorer(results, opened(index, corpus)) as address:
        yield address


def test_schemathesis_finds_nothing_that_the_description_does_not_say(small_address: str, tmp_path: Path):
    with httpx.Client(base_url=small_address, headers=HEADERS, timeout=60) as client:
        key = result(client, "/api/answers", question_body())["key"]
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(CONFIGURATION.read_text(encoding="utf-8").replace("KEY", key), encoding="utf-8")
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(configuration), "--no-color", "run",
        f"{small_address}/api/openapi.json", "--checks", "all", "--phases", "coverage,fuzzing,stateful",
        "--max-examples", EXAMPLES, "--seed", SEED, "--continue-on-failure", "--output-truncate", "true",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-20_000:]
    tested = re.search(r"Tested: (\d+)", output)
    assert tested, output
    assert int(tested[1]) == len(ROUTES)


def test_every_error_has_one_schema_and_every_route_says_which_it_answers():
    for path, operations in API["paths"].items():
        for method, operation in operations.items():
            answers = operation["responses"]
            assert {"403", "408", "413", "414", "421", "500", "503"} < set(answers), path
            assert ("415" in answers) == (method == "post"), path
            assert ("422" in answers) == ("parameters" in operation), path
            for status, answer in answers.items():
                if status != "200":
                    schema = answer["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/Error"}, (path, status)
    assert API["components"]["schemas"]["Error"]["properties"] == {"detail": {"type": "string", "title": "Detail"}}
    assert not [name for name in API["components"]["schemas"] if "Validation" in name]


@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_other_methods_are_refused_with_the_allowed_ones(client: httpx.Client, path: str, method: str):
    allowed = {"GET", "HEAD"} if method == "GET" else {method}
    for other in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "X"} - allowed:
        for headers in ({}, {"Content-Type": "text/plain", "X-Trackstar": ""}):  # the method is refused first
            response = client.request(other, concrete(path), headers=headers)
            assert response.status_code == 405, (other, path)
            assert set(response.headers["allow"].split(", ")) == allowed
            if other != "HEAD":
                assert response.json()["detail"].startswith("expected ")


def test_methods_of_the_page_and_its_files_are_to_read(client: httpx.Client):
    for path in ("/", "/api/openapi.json", "/assets/nothing.js", "/nothing"):
        response = client.post(path, json={})
        assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")


def test_head_answers_as_get_without_the_body(client: httpx.Client):
    paths = [
        "/", "/api/openapi.json", "/nothing", "/api/session", "/api/runs/0/queries?limit=3", "/api/runs/9/queries",
        "/api/runs/0/queries/1", "/api/runs/0/export?format=csv", "/api/runs/0/queries?limit=x",
    ]  # fmt: skip

    def described(response: httpx.Response) -> dict[str, Any]:
        return {name: value for name, value in response.headers.items() if name not in ("date", "connection")}

    for path in paths:
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert described(head) == described(get), path


def test_a_post_without_a_body_needs_no_content_type(address: str):
    with httpx.Client(base_url=address, headers={"X-Trackstar": "1"}) as plain:
        assert plain.post("/api/jobs/99999/cancel").status_code == 404
        assert plain.post("/api/answers").status_code == 422
        assert plain.post("/api/answers", content=b"{}").status_code == 415
        assert (
            plain.post("/api/answers", content=b"{}", headers={"Content-Type": "application/jsonx"}).status_code == 415
        )
        charset = {"Content-Type": "Application/JSON; charset=utf-8"}
        assert plain.post("/api/answers", content=b"{}", headers=charset).status_code == 422
        assert plain.post("/api/answers", content=b"\xff", headers=charset).status_code == 400


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b'{"prompt": "\\ud800", "completion": 1, "methods": ["BM25"], "\\ud800": 1}', "body: Input should be"),
        (
            b'{"prompt": "", "completion": "x", "methods": ["BM25"], "top": true}',
            "top: Input should be a valid integer",
        ),
        (b'{"prompt": "", "completion": "x", "methods": ["BM25"], "top": "5"}', "top: Input should be a valid integer"),
        (b'{"prompt": "", "completion": "x", "methods": ["BM25", "BM25"]}', "methods: expected each method once"),
        (b"[" * 5000, "There was an error parsing the body"),
    ],
)
def test_invalid_bodies_get_one_line_of_valid_text(client: httpx.Client, content: bytes, detail: str):
    response = client.post("/api/answers", content=content)
    assert response.status_code in (400, 422)
    assert response.json()["detail"].startswith(detail)


def test_parameters_are_named_without_inner_details(client: httpx.Client):
    for query, detail in {
        "model_correct=x": "model_correct: Input should be 'yes' or 'no'",
        "search_candidates=1": "search_candidates: Input should be true or false",
        "score_min=1e400": "score_min: Input should be less than or equal to 1",
    }.items():
        response = client.get(f"/api/runs/0/queries?{query}")
        assert response.status_code == 422
        assert response.json()["detail"].startswith(detail)
        assert ";" not in response.json()["detail"]
