"""`trackstar generate`: sampled answers with each fact, their agreement with the right answer, and resuming."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import trackstar
from trackstar.cli.commands import trackstar as command_group
from trackstar.cli.framework import run
from trackstar.corpus import read_queries
from trackstar.corpus.matching import answer_is_correct
from trackstar.errors import CorpusError
from trackstar.evaluation import sampled_answers
from trackstar.evaluation.sampled_answers import sample_answers
from trackstar.model.generation import generate_samples

FACTS = [
    {"fact_id": "f1", "prompt0": "The capital of France is", "entity1": "Paris", "entity1_alias": ["Lutetia"]},
    {"fact_id": "f2", "prompt0": "Gold has the symbol", "entity1": "Au", "relation": "symbol"},
    {"fact_id": "f3", "prompt0": "The river"},
]
SETTINGS = trackstar.GenerationSettings(max_new_tokens=4, temperature=1.5, sampling_seed=3)


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    path.write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    return path


def generated(model: Path, facts: Path, out: Path, *options: object) -> int:
    fixed = ("--model", model, "--queries", facts, "--out", out, "--max-new-tokens", 4, "--temperature", 1.5)
    arguments = ["generate", *fixed, "--sampling-seed", 3, "--samples", 3, *options]
    return run(command_group, list(map(str, arguments)))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_fact_has_its_answers_and_their_agreement(
    tiny_model_folder: Path, facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "answers.jsonl"
    assert generated(tiny_model_folder, facts, out) == 0
    model = trackstar.load_model(tiny_model_folder)
    for fact, record in zip(FACTS, records(out), strict=True):
        texts = [one.text for one in generate_samples(model, str(fact["prompt0"]), 3, SETTINGS)]
        expected: dict[str, Any] = {**fact, "8b_generations": texts}
        if "entity1" in fact:
            right = [answer_is_correct(text, str(fact["entity1"]), fact.get("entity1_alias", ())) for text in texts]
            expected["8b_confidence"] = sum(right) / 3
        assert record == expected
    assert not out.with_name("answers.jsonl.unfinished").exists()
    asked = read_queries(out, needs_completion=False)
    assert [query.query_id for query in asked] == ["f1", "f2", "f3"]


def test_an_alias_counts_as_the_answer(tiny_model_folder: Path, facts: Path, tmp_path: Path) -> None:
    model = trackstar.load_model(tiny_model_folder)
    said = [mock.Mock(text=f" {name}, they say") for name in ("Lutetia", "Paris", "Rome", "paris")]
    with mock.patch.object(sampled_answers, "generate_samples", return_value=said):
        out = sample_answers(
            model,
            read_queries(facts, needs_completion=False),
            tmp_path / "a.jsonl",
            SETTINGS,
            samples=4,
            progress=False,
        )
    assert [record.get("8b_confidence") for record in records(out)] == [0.75, 0.0, None]


def test_an_interrupted_run_resumes(tiny_model_folder: Path, facts: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert generated(tiny_model_folder, facts, whole) == 0
    asked: list[str] = []
    original: Callable[..., Any] = generate_samples

    def interrupted(*arguments: Any, **options: Any) -> Any:
        asked.append(options["query_id"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with mock.patch.object(sampled_answers, "generate_samples", interrupted):
        assert generated(tiny_model_folder, facts, out) == 130
        unfinished = out.with_name("answers.jsonl.unfinished")
        assert len(unfinished.read_bytes().splitlines()) == 2
        with unfinished.open("ab") as stream:
            stream.write(b'{"fact_id": "f2", "cut')
        assert generated(tiny_model_folder, facts, out) == 0
    assert asked == ["f1", "f2", "f2", "f3"]
    assert out.read_bytes() == whole.read_bytes()
    # Answers to another question are not taken over.
    unfinished.write_bytes(b'{"answers_of": "another"}\n{"fact_id": "f1"}\n')
    assert generated(tiny_model_folder, facts, out, "--force") == 0
    assert out.read_bytes() == whole.read_bytes()


def test_inputs_and_other_files_stay_as_they_are(
    tiny_model_folder: Path, facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("mine\n")
    before = facts.read_bytes()
    assert generated(tiny_model_folder, facts, other) == 1
    assert "pass --force to replace it" in capsys.readouterr().err
    assert generated(tiny_model_folder, facts, facts, "--force") == 1
    assert "--queries" in capsys.readouterr().err
    assert (other.read_text(), facts.read_bytes()) == ("mine\n", before)


def test_mistakes_are_one_line(
    tiny_model_folder: Path, facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    for options, found in (
        (("--temperature", 0), "--samples: expected 1 with a temperature of 0"),
        (("--sampling-seed", -1), "--sampling-seed: expected 0 or more, found -1"),
        (("--samples", 0), "--samples: expected 1 or more"),
        (("--max-new-tokens", 10_000), "query f1: expected at least 1 token and room for 10000"),
    ):
        assert generated(tiny_model_folder, facts, out, *options) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"trackstar: {found}")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({"prompt0": "a", "entity1": "b", "entity1_alias": 5}) + "\n")
    with pytest.raises(CorpusError, match='query broken:0: field "entity1_alias" holds no names'):
        sample_answers(
            trackstar.load_model(tiny_model_folder), read_queries(broken), out, SETTINGS, samples=2, progress=False
        )
