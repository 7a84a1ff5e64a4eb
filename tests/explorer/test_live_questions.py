"""Questions to an index through the explorer's API: answers, token splits, effects, insight, and jobs."""

import csv
import io
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from capitals import QUERIES, TEXTS
from explorer_server import HEADERS, explorer, finished, opened, question_body, result, waited
from tiny_models import TinyModelFolder
from trackstar.attribution.answering import answer_queries
from trackstar.errors import OptionError
from trackstar.explorer import live as live_module
from trackstar.explorer.jobs import MOST_WAITING, Jobs, TooManyJobsError
from trackstar.explorer.question_schemas import AnswerRequest
from trackstar.explorer.result_files import read_result_file
from trackstar.explorer.server import IndexOptions, open_index
from trackstar.indexing.build import build_index
from trackstar.progress import Progress
from trackstar.store import Index


def test_an_answer_equals_answer_queries_and_stays_under_its_key(client: httpx.Client, index: Index):
    answer = result(client, "/api/answers", question_body())
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
    assert result(client, "/api/answers", question_body())["key"] == answer["key"]
    assert result(client, "/api/answers", question_body(top=4))["key"] != answer["key"]


def test_token_shares_sum_to_the_influence_and_spans_cover_the_text(client: httpx.Client):
    answer = result(client, "/api/answers", question_body(1))
    for candidate in answer["rankings"][0]["proponents"]:
        for over in ("candidate", "query"):
            body = {"row": candidate["row"], "over": over}
            split = result(client, f"/api/answers/{answer['key']}/tokens", body)
            assert split["influence"] == candidate["score"]
            assert sum(share["influence"] for share in split["shares"]) == pytest.approx(candidate["score"], abs=2e-6)
            assert split["total"] == pytest.approx(candidate["score"], abs=2e-6)
            assert "".join(split["text"][s["start"] : s["stop"]] for s in split["shares"]) == split["text"]
        assert split["text"] == f"{QUERIES[1].prompt} {QUERIES[1].completion}"


def test_an_effect_is_measured(client: httpx.Client):
    answer = result(client, "/api/answers", question_body())
    effect = result(client, f"/api/answers/{answer['key']}/tail-patch", {"row": 0})
    assert effect["before"] == pytest.approx(answer["probability"], rel=1e-4)
    assert effect["after"] != effect["before"]
    assert "Adafactor" in effect["step"]
    split = result(client, f"/api/answers/{answer['key']}/tokens", {"row": 0})
    details = client.get(f"/api/answers/{answer['key']}/details").json()
    assert effect in details["effects"]
    assert split in details["splits"]
    failed = finished(client, f"/api/answers/{answer['key']}/tail-patch", {"row": 24})
    assert (failed["state"], failed["error"]) == ("failed", "row: expected a candidate of the index, 0 to 23, found 24")


def test_generated_tokens_spell_the_text(client: httpx.Client):
    generation = result(client, "/api/generate", {"prompt": "The capital of France is", "max_new_tokens": 6})
    pieces = [generation["text"][token["start"] : token["stop"]] for token in generation["tokens"]]
    assert "".join(pieces) == generation["text"] != ""
    assert all(0 < token["probability"] <= 1 for token in generation["tokens"])


def test_insight_and_groups_describe_the_answer(client: httpx.Client):
    answer = result(client, "/api/answers", question_body())
    found = client.get(f"/api/answers/{answer['key']}/insight").json()
    assert found["candidates"] == sum(found["counts"]) == len(TEXTS)
    assert found["shown"][0] == answer["rankings"][0]["proponents"][0]["score"]
    assert len(found["points"]) == len(TEXTS)
    groups = client.get(f"/api/answers/{answer['key']}/groups", params={"field": "source", "top": 24}).json()
    assert sum(group["candidates"] for group in groups["groups"]) == 24
    assert {group["in_corpus"] for group in groups["groups"]} == {1 / 6}
    wrong = client.get(f"/api/answers/{answer['key']}/groups", params={"field": "colour"})
    assert wrong.status_code == 404
    assert wrong.json()["detail"].startswith("field: the corpus has source, year, found colour")
    rows = list(csv.DictReader(io.StringIO(client.get(f"/api/answers/{answer['key']}/export?format=csv").text)))
    assert {row["method"] for row in rows} == {"TrackStar", "BM25"}
    line = json.loads(client.get(f"/api/answers/{answer['key']}/export?format=jsonl").text)
    assert line["proponents"] == [p["text"] for p in answer["rankings"][0]["proponents"]]


def test_the_explorer_opens_its_exported_answers(client: httpx.Client, tmp_path: Path):
    answer = result(client, "/api/answers", question_body())
    path = tmp_path / "exported.jsonl"
    path.write_text(client.get(f"/api/answers/{answer['key']}/export?format=jsonl").text)
    (line,) = read_result_file(path).lines
    assert line.prompt == QUERIES[0].prompt
    assert list(line.scores) == [p["score"] for p in answer["rankings"][0]["proponents"]]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 422), (question_body(methods=[]), 422), (question_body(methods=["TRAK"]), 422),
        (question_body(methods=["BM25", "BM25"]), 422), (question_body(methods=["embeddings"]), 404),
        (question_body(top=0), 422), (question_body(top=100_000), 422), (question_body(completion=""), 422),
        (question_body(extra=1), 422),
        (question_body(prompt="x" * 40_000), 422), ([1], 422),
    ],
)  # fmt: skip
def test_invalid_questions_are_refused_before_they_are_queued(client: httpx.Client, body: Any, status: int):
    response = client.post("/api/answers", json=body)
    assert response.status_code == status, response.text
    assert response.json()["detail"]


def test_a_completion_that_cannot_be_attributed_fails_with_one_line(client: httpx.Client):
    job = finished(client, "/api/answers", question_body(completion="   "))
    assert job["state"] == "failed"
    assert job["error"].startswith("query query: the completion is empty")


def test_fields_that_an_index_keeps_need_no_corpus(index: Index):
    with explorer([], opened(index, None)) as address, httpx.Client(base_url=address, headers=HEADERS) as client:
        answer = result(client, "/api/answers", question_body())
        session = client.get("/api/session").json()
    found = [ranking["proponents"][0] for ranking in answer["rankings"]]
    assert next(p["metadata"] for p in found if p["text"] == TEXTS[0]) == {"source": "France", "year": "1990"}
    assert session["index"]["metadata"] == ["source", "year"]


def test_fields_of_a_changed_corpus_are_not_shown_and_a_note_says_so(
    corpus: Path, tiny_model_folders: TinyModelFolder, tmp_path: Path
):
    index = build_index(
        tiny_model_folders("llama", "bos"), str(corpus), tmp_path / "index", side=4, layer_blocks=2, codec="float32",
        second_moment_examples=8, metadata="none", progress=False,
    )  # fmt: skip
    changed = tmp_path / "corpus.jsonl"
    changed.write_text(corpus.read_text().replace("France", "Gaul"))
    with explorer([], opened(index, changed)) as address, httpx.Client(base_url=address, headers=HEADERS) as client:
        answer = result(client, "/api/answers", question_body())
        session = client.get("/api/session").json()
    assert len(answer["notes"]) == 1
    assert "has changed since" in answer["notes"][0]
    assert answer["notes"][0].endswith("pass the corpus that was indexed as data")
    assert answer["rankings"][0]["proponents"][0]["metadata"] == {}
    assert session["index"]["metadata"] == []


def test_a_note_says_that_the_prompt_was_cut_to_the_window(client: httpx.Client):
    answer = result(client, "/api/answers", question_body(prompt="word " * 400 + "The capital of France is"))
    assert len(answer["notes"]) == 1
    assert "the text before was not read" in answer["notes"][0]
    assert result(client, "/api/answers", question_body())["notes"] == []


def test_without_an_index_live_questions_are_refused(results: list[Path]):
    with explorer(results[:1]) as address, httpx.Client(base_url=address, headers=HEADERS) as client:
        assert client.get("/api/session").json()["index"] is None
        response = client.post("/api/answers", json=question_body())
        assert (response.status_code, response.json()["detail"][:16]) == (404, "no index is open")


def slow_steps(seconds: float = 30.0) -> None:
    """Long work that reports its progress step by step."""
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
    assert client.post(f"/api/jobs/{waiting}/cancel").json()["state"] == "cancelled"
    client.post(f"/api/jobs/{number}/cancel")
    assert waited(client, number)["state"] == "cancelled"
    assert client.get(f"/api/jobs/{waiting}").json()["state"] == "cancelled"


def test_jobs_beyond_the_longest_queue_are_refused():
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


def test_a_defect_in_a_job_is_reported_and_the_next_job_runs():
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


def test_errors_of_the_library_are_shown_without_backticks():
    def refuse() -> None:
        raise OptionError('`mixing`: found `x y`; pass `codec="float16"` to `build_index`, or `verify(out)`')

    jobs = Jobs()
    try:
        number = jobs.submit("refused", refuse).job
        deadline = time.monotonic() + 10
        while (job := jobs.get(number)) is not None and job.state != "failed":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert job is not None
        assert job.error == 'mixing: found `x y`; pass codec="float16" to build_index, or verify(out)'
    finally:
        jobs.close()


def test_a_low_bit_answer_says_which_influences_are_exact(tiny_model_folder: Path, tmp_path: Path):
    index = build_index(
        str(tiny_model_folder), TEXTS, tmp_path / "index", layer_blocks=2, side=8, codec="1-bit", progress=False
    )
    live = open_index(str(index.path), IndexOptions(reranked=7), note=lambda _line: None)
    answer = live.answer(AnswerRequest(**question_body()))
    (note,) = [note for note in answer.notes if "1-bit codes" in note]
    assert f"of {len(TEXTS)} influences are exact, from gradients recomputed for this answer" in note
    first = answer.rankings[0].proponents[0]
    assert first.row is not None
    split = live.tokens(answer.key, first.row, over_query=False)
    assert sum(share.influence for share in split.shares) == pytest.approx(first.score, abs=1e-3)
    whole = open_index(str(index.path), IndexOptions(), note=lambda _line: None).answer(
        AnswerRequest(**question_body())
    )
    assert f"{len(TEXTS)} of {len(TEXTS)} influences" in " ".join(whole.notes)
