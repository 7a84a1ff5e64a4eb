"""The arithmetic demo: sums that are asked are never trained on, and what two sums share is counted right."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from trackstar.attribution.results import QueryResult, Ranked
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.demo import arithmetic_runner, runner
from trackstar.demo.arithmetic import (
    ARITHMETIC_PRETRAINING,
    CARRY,
    HELD_OUT_SHARE,
    PROPERTIES,
    Sum,
    Sums,
    drawn_sums,
    number_in,
    record_of,
    shared_with,
)
from trackstar.demo.arithmetic_runner import run_arithmetic_demo
from trackstar.demo.runner import run_demo
from trackstar.demo.sharing import Explained, ExplainedAnswers, Shared, tables_of
from trackstar.errors import OptionError
from trackstar.evaluation.comparisons import Estimate
from trackstar.pretraining import train_tokenizer

TINY = dataclasses.replace(ARITHMETIC_PRETRAINING, width=16, heads=2, mlp_width=32, steps=4, checkpoint_steps=2)


@pytest.fixture(scope="module")
def sums() -> Sums:
    return drawn_sums(0)


def digits(number: int) -> tuple[int, int]:
    """Tens and units."""
    return int(f"{number:02d}"[0]), int(f"{number:02d}"[1])


def slowly_shared(asked: Sum, answer: int, other: Sum) -> set[str]:
    """What two sums share, by the definitions in words."""
    a, b, c, d = asked.first, asked.second, other.first, other.second
    said, total = digits(answer), digits(other.result)
    found = {
        "mirrored sum (b + a)": (c, d) == (b, a),
        "first operand": c == a,
        "second operand": d == b,
        "an operand, in the other place": c == b or d == a,
        "neighbour (one operand ±1)": (c, d) in {(a + 1, b), (a - 1, b), (a, b + 1), (a, b - 1)},
        "units digits of both operands": (digits(c)[1], digits(d)[1]) == (digits(a)[1], digits(b)[1]),
        "tens digits of both operands": (digits(c)[0], digits(d)[0]) == (digits(a)[0], digits(b)[0]),
        CARRY: (digits(c)[1] + digits(d)[1] > 9) == (digits(a)[1] + digits(b)[1] > 9),
        "result": other.result == answer,
        "result ±1": other.result in (answer - 1, answer + 1),
        "units digit of the result": total[1] == said[1],
        "tens digit of the result": total[0] == said[0],
    }
    return {name for name, holds in found.items() if holds}


def test_training_and_held_out_sums_are_disjoint_and_together_all_sums(sums: Sums):
    every = {(one.first, one.second) for one in (*sums.training, *sums.held_out)}
    assert every == {(a, b) for a in range(100) for b in range(100) if a + b <= 99}
    assert len(sums.training) + len(sums.held_out) == len(every) == 5050
    assert len(sums.held_out) == round(HELD_OUT_SHARE * 5050)


def test_same_seed_gives_same_split_and_another_seed_another(sums: Sums):
    assert drawn_sums(0) == sums
    assert set(drawn_sums(1).held_out) != set(sums.held_out)
    # As drawn on any machine.
    assert [one.name for one in sums.held_out[:3]] == ["39+11", "33+30", "25+71"]


def test_held_out_sums_have_their_mirrored_sum_in_training_about_as_often_as_by_chance(sums: Sums):
    training = set(sums.training)
    share = np.mean([one.mirrored in training for one in sums.held_out if one.mirrored != one])
    assert share == pytest.approx(1 - HELD_OUT_SHARE, abs=0.05)


def test_names_and_texts_are_unique_and_the_query_continues_the_text(sums: Sums):
    every = (*sums.training, *sums.held_out)
    assert len({one.name for one in every}) == len({one.text for one in every}) == len(every)
    for one in every:
        assert f"{one.query.prompt} {one.query.completion}" == one.text
    assert record_of(Sum(first=7, second=5)) == {
        "id": "7+5", "text": "7 + 5 = 12", "first": 7, "second": 5, "result": 12, "carry": "carry",
    }  # fmt: skip


def test_every_digit_is_a_token(sums: Sums):
    tokenizer = train_tokenizer((one.text for one in sums.training), vocabulary=ARITHMETIC_PRETRAINING.vocabulary)
    merged = {token for token in tokenizer.get_vocab() if len(token) > 1}
    assert merged == {"<s>", "</s>", "Ġ+", "Ġ="}


@pytest.mark.parametrize("answer", ["true", "wrong"])
def test_what_two_sums_share_is_what_the_definitions_say(answer: str):
    small = drawn_sums(3, largest=25)
    for asked in small.held_out:
        said = asked.result if answer == "true" else asked.result + 10
        found = shared_with(asked, said, small.training)
        assert tuple(found) == PROPERTIES
        for row, other in enumerate(small.training):
            expected = slowly_shared(asked, said, other)
            assert {name for name in PROPERTIES if found[name][row]} == expected, (asked, other)


def test_answer_that_is_no_number_shares_nothing_of_the_result(sums: Sums):
    asked = next(one for one in sums.held_out if one.mirrored in sums.training)
    found = shared_with(asked, None, sums.training)
    assert {name for name in PROPERTIES if not found[name].any()} == {name for name in PROPERTIES if "result" in name}


@pytest.mark.parametrize(
    ("text", "number"), [("12", 12), (" 12 ", 12), ("112", 112), ("", None), ("1 2", None), ("-3", None), ("²", None)]
)
def test_number_of_an_answer(text: str, number: int | None):
    assert number_in(text) == number


def explained(asked: Sum, answer: int, proponents: list[Sum]) -> Explained:
    ranked = tuple(
        Ranked(row=0, example_id=one.name, parent_id=one.name, influence=0.5, text=one.text) for one in proponents
    )
    query = dataclasses.replace(asked.query, completion=str(answer))
    return Explained.of(QueryResult(query=query, loss=1.0, proponents=ranked, opponents=()), asked)


def test_share_and_chance_are_the_brute_force_ones():
    small = drawn_sums(5, largest=25)
    asked = small.held_out[:8]
    right = tuple(explained(one, one.result, list(small.training[n : n + 4])) for n, one in enumerate(asked))
    wrong = tuple(explained(one, one.result + 10, list(small.training[n : n + 4])) for n, one in enumerate(asked))
    tables = tables_of(ExplainedAnswers(right=right, wrong=wrong, truth=right), small)
    for table, off in ((tables.right, 0), (tables.wrong, 10)):
        for name in PROPERTIES:
            chance = [np.mean([name in slowly_shared(q, q.result + off, t) for t in small.training]) for q in asked]
            shares = [
                np.mean([name in slowly_shared(q, q.result + off, t) for t in small.training[n : n + 4]])
                for n, q in enumerate(asked)
            ]
            assert table[name].share.mean == pytest.approx(np.mean(shares)), name
            assert table[name].chance == pytest.approx(np.mean(chance)), name
            assert table[name].expected == pytest.approx(4 * np.sum(chance)), name
            assert table[name].difference.mean == pytest.approx(np.mean(shares) - np.mean(chance)), name
    assert tables.truth == tables.right
    for name, difference in tables.wrong_against_truth.items():
        of_both = tables.wrong[name].difference.mean - tables.truth[name].difference.mean
        assert difference.mean == pytest.approx(of_both), name


def test_no_answers_give_no_table(sums: Sums):
    tables = tables_of(ExplainedAnswers(right=(), wrong=(), truth=()), sums)
    assert tables.right == tables.wrong == tables.truth == tables.wrong_against_truth == {}


@pytest.mark.parametrize(
    ("low", "high", "expected", "verdict"),
    [(0.1, 0.2, 0.1, "more"), (-0.2, -0.1, 20.0, "less"), (-0.2, -0.1, 2.0, "unclear"), (-0.1, 0.1, 20.0, "unclear")],
)
def test_verdict_follows_the_interval_and_calls_nothing_rare_that_chance_makes_rare(
    low: float, high: float, expected: float, verdict: str
):
    difference = Estimate(mean=(low + high) / 2, low=low, high=high, queries=9)
    assert Shared(share=difference, chance=0.1, lift=1.0, difference=difference, expected=expected).verdict == verdict


# ---- Whole runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo leaves with few sums and a model that has learned nothing."""
    out = tmp_path_factory.mktemp("sums") / "out"
    run_arithmetic_demo(out, largest=12, training=TINY)
    return out


def test_demo_leaves_its_files_and_a_second_run_gives_the_same(folder: Path, capsys: pytest.CaptureFixture[str]):
    report = json.loads((folder / "report.json").read_text())
    results = (folder / "results.jsonl").read_bytes()
    small = drawn_sums(0, largest=12)
    assert [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()] == [
        record_of(one) for one in small.training
    ]
    assert [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()] == [
        {
            "query_id": one.name,
            "kind": "generation",
            "task": "arithmetic",
            "prompt": one.prompt,
            "completion": str(one.result),
        }
        for one in small.held_out
    ]
    assert report["mixing"] == 0
    assert report["answers"].keys() == {one.name for one in small.held_out}
    again = run_arithmetic_demo(folder, largest=12, training=TINY)
    assert (folder / "results.jsonl").read_bytes() == results
    assert again.files.prompt == small.held_out[0].prompt
    repeated = json.loads((folder / "report.json").read_text())
    assert {**repeated, "seconds": None} == {**report, "seconds": None}
    assert "λ = 0: R is that of the training sums alone" in capsys.readouterr().out


def test_other_demo_is_refused_in_the_folder_by_one_line_that_names_out(folder: Path, tmp_path: Path):
    with pytest.raises(OptionError, match=r"^`out`: .* holds the demo of arithmetic, expected .* of facts; .*folder$"):
        run_demo(folder)
    (tmp_path / "corpus.jsonl").write_text('{"id": "x", "text": "Paris.", "topic": "capital", "role": "distractor"}\n')
    with pytest.raises(OptionError, match=r"^`out`: .* holds the demo of facts, expected .* of arithmetic; .*folder$"):
        run_arithmetic_demo(tmp_path)


def test_folder_of_other_files_or_of_another_seed_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(OptionError, match=r"corpus\.jsonl: an existing file that is not an earlier output"):
        run_arithmetic_demo(folder, seed=1, largest=12, training=TINY)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"^`out`: .* holds 'notes\.txt', expected an empty folder"):
        run_arithmetic_demo(tmp_path)


def test_task_of_the_command_line_chooses_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(*_arguments: object) -> None:
        raise OptionError("training begins here")

    monkeypatch.setattr(arithmetic_runner, "pretrain", stopped)
    monkeypatch.setattr(runner, "pretrain", stopped)
    assert framework.run(command_group, ["demo", "--task", "arithmetic", "--out", str(tmp_path / "sums")]) == 1
    assert "1. Corpus: 4,040 sums" in capsys.readouterr().out
    assert framework.run(command_group, ["demo", "--out", str(tmp_path / "facts")]) == 1
    assert "facts of the real world" in capsys.readouterr().out
    assert framework.run(command_group, ["demo", "--out", str(tmp_path / "sums")]) == 1
    assert "trackstar: --out: " in capsys.readouterr().err
