"""Kinds of queries: whether the model answers right, which R they are ranked with, and a report's split by them."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_evaluation import CAPITALS, write_world
from test_record_formats import CHATML, tokenizer_with

from tiny_models import save_tiny_model
from trackstar import GenerationSettings, Index, LanguageModel, build_index, generate, load_model, write_results
from trackstar.attribution.answering import answer_queries
from trackstar.attribution.question import queries_digest
from trackstar.attribution.streaming import stream_queries
from trackstar.attribution.verdicts import log_probabilities_of_choice, verdicts
from trackstar.audit.checks import AtHand
from trackstar.audit.recomputation import check_audit
from trackstar.choices import Kind
from trackstar.cli.commands import trackstar
from trackstar.cli.framework import run
from trackstar.corpus import Query, prompt_tokens, query_with_texts, read_queries, tokenize_query
from trackstar.corpus.matching import answer_is_correct
from trackstar.errors import CorpusError, OptionError
from trackstar.evaluation.config import EvaluationConfig, TailPatchConfig
from trackstar.evaluation.fact_files import read_facts
from trackstar.evaluation.release_results import wrong_answer_lines
from trackstar.evaluation.report_files import write_report
from trackstar.evaluation.run import EvaluationReport, run_evaluation
from trackstar.evaluation.sampled_answers import sample_answers
from trackstar.explorer.result_files import read_result_file
from trackstar.model.generation import continuations

PROMPT = "The capital of France is"
CITIES = ("Paris", "Rome", "Tokyo")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load_model(save_tiny_model(tmp_path_factory.mktemp("kinds") / "model"))


@pytest.fixture(scope="module")
def index(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Index:
    records = [{"text": f"The capital of {country} is {city}."} for country, city in CAPITALS.items()]
    return build_index(
        model, records, tmp_path_factory.mktemp("kinds") / "index", side=4, codec="float32", layer_blocks=1,
        progress=False,
    )  # fmt: skip


def choice(completion: str, *others: str, **fields: Any) -> Query:
    return Query(query_id="q", prompt=PROMPT, completion=completion, kind="choice", alternatives=others, **fields)


def brute_force(model: LanguageModel, query: Query) -> float:
    """log P of a completion from the whole vocabulary's distribution, token by token, in float64."""
    example = tokenize_query(query, model.tokenizer, window_tokens=model.context_tokens)
    with torch.no_grad():
        logits = model.module(input_ids=torch.from_numpy(example.token_ids)[None].long()).logits[0].double()
    return sum(
        float(logits[place - 1].log_softmax(0)[int(example.token_ids[place])])
        for place in np.flatnonzero(example.target_mask)
    )


# ---- Reading -----------------------------------------------------------------------------------------------------


def written(folder: Path, *records: object) -> Path:
    path = folder / "q.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def test_a_record_says_its_kind(tmp_path: Path) -> None:
    asked = {"prompt": PROMPT, "completion": "Paris"}
    queries = read_queries(
        written(
            tmp_path, asked, {**asked, "kind": "fact"}, {**asked, "kind": "choice", "alternative": "Rome"},
            {**asked, "alternative": ["Rome", "Tokyo"]}, {**asked, "kind": "generation", "groundtruth": "Paris"},
            {**asked, "completion": "Rome", "groundtruth": "Paris"}, {**asked, "kind": "open"},
        )
    )  # fmt: skip
    assert [(query.kind, query.alternatives, query.truth) for query in queries] == [
        (None, (), None), ("fact", (), None), ("choice", ("Rome",), None), ("choice", ("Rome", "Tokyo"), None),
        ("generation", (), None), (None, (), "Paris"), ("open", (), None),
    ]  # fmt: skip
    assert [query.asks_for_fact for query in queries] == [True, True, False, False, False, True, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "chioce"}, r"field \"kind\" is 'chioce'; expected one of fact, choice, generation, open"),
        ({"kind": ["open"]}, r'field "kind" is \[\'open\'\]'),
        ({"kind": "choice"}, 'kind "choice", and no field "alternative"'),
        ({"kind": "open", "alternative": "Rome"}, 'field "alternative" beside kind "open"'),
        ({"alternative": []}, None),
        ({"alternative": [" "]}, r'field "alternative" is \[\' \'\]; expected a completion as text'),
        ({"alternative": 3}, 'field "alternative" is 3'),
        ({"alternative": ["Rome", "Rome"]}, "holds a completion twice"),
        ({"alternative": ["Rome", "Paris "]}, "holds the completion itself"),
        ({"groundtruth": 7}, 'field "groundtruth" is 7; expected the right answer as a string'),
    ],
)
def test_a_kind_that_cannot_be_is_refused(fields: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": PROMPT, "completion": "Paris", **fields})
    if message is None:
        assert read_queries(path)[0].kind is None
        return
    with pytest.raises(CorpusError, match=f"q.jsonl:1: .*{message}"):
        read_queries(path)


# ---- Verdicts ----------------------------------------------------------------------------------------------------


def test_a_choice_is_right_where_its_completion_is_the_most_probable(model: LanguageModel) -> None:
    expected = {city: brute_force(model, Query(query_id="q", prompt=PROMPT, completion=city)) for city in CITIES}
    best = max(expected, key=expected.__getitem__)
    for city in CITIES:
        others = tuple(other for other in CITIES if other != city)
        (verdict,) = verdicts(model, [choice(city, *others)], progress=False)
        assert verdict is not None
        assert verdict.correct == (city == best)
        assert verdict.answer == best
        assert verdict.log_probabilities == pytest.approx([expected[one] for one in (city, *others)], abs=1e-5)


def test_equally_probable_completions_are_no_right_answer(model: LanguageModel) -> None:
    (verdict,) = verdicts(model, [choice("Paris", " Paris", join="auto")], progress=False)
    assert verdict is not None  # a completion that begins with a space is joined without another
    assert len(set(verdict.log_probabilities)) == 1
    assert not verdict.correct


def test_a_choice_is_asked_in_its_own_context(model: LanguageModel) -> None:
    text = choice("Paris", "Rome")
    tokens = tokenize_query(text, model.tokenizer, window_tokens=64)
    of_tokens = dataclasses.replace(
        text, token_ids=tuple(tokens.token_ids.tolist()), target_mask=tuple(tokens.target_mask.tolist()),
        prompt="", completion="",
    )  # fmt: skip
    of_tokens = query_with_texts(of_tokens, model.tokenizer)
    assert log_probabilities_of_choice(model, of_tokens) == pytest.approx(log_probabilities_of_choice(model, text))
    chat = dataclasses.replace(model, tokenizer=tokenizer_with(CHATML))
    messages = [{"role": "user", "content": "The capital of France?"}]
    asked = [(*messages, {"role": "assistant", "content": city}) for city in ("Paris", "Rome")]
    expected = [brute_force(chat, Query(query_id="q", messages=tuple(one))) for one in asked]
    of_chat = Query(query_id="q", messages=tuple(asked[0]), kind="choice", alternatives=("Rome",))
    assert log_probabilities_of_choice(chat, of_chat) == pytest.approx(expected, abs=1e-5)


def test_a_generation_is_right_where_the_models_own_answer_is(model: LanguageModel) -> None:
    said = generate(model, PROMPT, GenerationSettings(max_new_tokens=16)).text
    first = said.split()[0]
    kinds: list[tuple[Kind | None, str, dict[str, object]]] = [
        ("generation", first, {}), ("fact", first, {}), ("fact", "Xyz", {}),
        ("fact", "Xyz", {"entity1_alias": [first]}), ("open", first, {}), (None, first, {}),
    ]  # fmt: skip
    queries = [
        Query(query_id=str(number), prompt=PROMPT, completion=text, kind=kind, record=record)
        for number, (kind, text, record) in enumerate(kinds)
    ]
    found = verdicts(model, queries, progress=False)
    assert [None if one is None else one.correct for one in found] == [True, True, False, True, None, None]
    assert all(one is None or said.strip().startswith(one.answer[: len(first)]) for one in found)


# ---- Answers -----------------------------------------------------------------------------------------------------


def facts_and_choices() -> tuple[list[Query], list[Query]]:
    facts = [
        Query(query_id=country, prompt=f"The capital of {country} is", completion=city, kind="fact")
        for country, city in CAPITALS.items()
    ]
    choices = [
        dataclasses.replace(fact, query_id=f"choice {fact.query_id}", kind="choice", alternatives=("Bern", "Oslo"))
        for fact in facts
    ]
    return facts, choices


def scores(report: Any) -> list[list[tuple[str, Any]]]:
    return [[(one.example_id, pytest.approx(one.influence, abs=1e-5)) for one in r.proponents] for r in report.results]


def test_r_is_specific_to_the_task_for_facts_only(model: LanguageModel, index: Index) -> None:
    facts, choices = facts_and_choices()
    options: dict[str, Any] = {"model": model, "k": 5, "progress": False}
    alone = answer_queries(index, choices, **options)
    assert alone.mixing.value == 0
    assert alone.mixing.rule.startswith("R_train alone, as no query asks for a fact")
    assert scores(alone) == scores(answer_queries(index, choices, mixing=0.0, **options))
    with_facts = answer_queries(index, [*facts, *choices], **options)
    of_facts = answer_queries(index, facts, **options)
    assert with_facts.mixing == of_facts.mixing
    assert of_facts.mixing.queries == len(facts)
    assert of_facts.mixing.value > 0
    assert scores(with_facts)[: len(facts)] == scores(of_facts)
    assert any("R_eval is that of the 8 facts among the queries, and 8 of other" in note for note in with_facts.notes)
    assert not of_facts.notes
    # Asked for as a task, they are one.
    assert answer_queries(index, choices, task=choices, **options).mixing.value > 0
    with pytest.raises(OptionError, match="expected 0 without queries that R_eval comes from"):
        answer_queries(index, choices, mixing=0.5, **options)


def test_a_streamed_corpus_gives_the_same(model: LanguageModel, index: Index) -> None:
    facts, choices = facts_and_choices()
    records = [{"text": f"The capital of {country} is {city}."} for country, city in CAPITALS.items()]
    asked = [*facts, *choices]
    settings: dict[str, Any] = {"k": 5, "progress": False}
    streamed = stream_queries(model, records, asked, side=4, **settings)
    answered = answer_queries(index, asked, model=model, **settings)
    assert [result.verdict for result in streamed.results] == [result.verdict for result in answered.results]
    assert stream_queries(model, records, choices, side=4, **settings).mixing.value == 0


def test_results_carry_kind_and_verdict_and_are_queries_again(
    model: LanguageModel, index: Index, tmp_path: Path
) -> None:
    facts, choices = facts_and_choices()
    wrong = dataclasses.replace(facts[0], query_id="wrong", completion="Rome", truth="Paris", kind=None)
    story = Query(query_id="story", prompt="Once", completion="upon a time", kind="open")
    asked = [facts[0], choices[0], wrong, story, dataclasses.replace(facts[1], query_id="plain", kind=None)]
    report = answer_queries(index, asked, model=model, k=2, progress=False)
    lines, _ = write_results(report, tmp_path / "results.jsonl")
    records = {record["example_id"]: record for record in map(json.loads, lines.read_text().splitlines())}
    for result in report.results:
        record, verdict = records[result.query.query_id], result.verdict
        assert record.get("kind") == result.query.kind
        assert record.get("is_8b_correct") == (None if verdict is None else verdict.correct)
        assert record.get("model_answer") == (None if verdict is None else verdict.answer)
    assert records["choice France"]["alternative"] == ["Bern", "Oslo"]
    assert records["wrong"]["groundtruth"] == "Paris"
    assert not {"kind", "is_8b_correct", "groundtruth", "model_answer"} & records["plain"].keys()
    assert "is_8b_correct" not in records["story"]
    again = read_queries(lines)
    for query, read in zip(asked, again, strict=True):
        assert (read.kind, read.alternatives, read.truth) == (query.kind, query.alternatives, query.truth)
    frame = report.to_dataframe()
    assert set(frame[frame.query_id == "choice France"].kind) == {"choice"}
    remarks = [result.remark for result in report.results]
    assert remarks[2].startswith("right") or remarks[2].endswith('; right is "Paris"')
    assert remarks[3:] == ["open: no right answer", ""]
    assert any(line.startswith("the model answers") and "of 1 choices right" in line for line in report.summary())
    page = report._repr_html_()
    assert "open: no right answer" in page


def test_the_models_own_answer_is_compared_with_the_right_one(
    model: LanguageModel, index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = generate(model, PROMPT, GenerationSettings(max_new_tokens=4)).text.strip()
    path = written(
        tmp_path, {"query_id": "wrong", "prompt": PROMPT, "completion": "Paris", "trex_sentences": ["a"]},
        {"query_id": "right", "prompt": PROMPT, "completion": said, "8b_generations": ["x"], "8b_confidence": 0.5},
        {"query_id": "unknown", "prompt": PROMPT, "kind": "open"},
    )  # fmt: skip
    out = tmp_path / "own.jsonl"
    arguments = ["query", str(index.path), "--queries", str(path), "--generate", "--max-new-tokens", "4", "--top", "2"]
    arguments += ["--model", str(model.folder), "--out", str(out)]
    assert run(trackstar, arguments) == 0
    assert "the model answers 1 of 2 facts right (50%)" in capsys.readouterr().err
    wrong, right, unknown = map(json.loads, out.read_text().splitlines())
    assert (wrong["targets_plaintext"].strip(), wrong["groundtruth"]) == (said, "Paris")
    assert wrong["has_trex_sentence"] is True
    assert (wrong["is_8b_correct"], right["is_8b_correct"]) == (False, True)
    assert (right["8b_generations"], right["8b_confidence"]) == (["x"], 0.5)
    assert not {"is_8b_correct", "groundtruth"} & unknown.keys()
    assert run(trackstar, ["audit", str(tmp_path / "own.audit.json"), "--index", str(index.path), "--again",
                           "--model", str(model.folder), "--queries", str(path)]) == 0  # fmt: skip
    file = read_result_file(out)
    assert [line.model_correct for line in file.lines] == [False, True, None]
    # A verdict that was turned round is found, and named apart from the rankings.
    out.write_text(out.read_text().replace('"is_8b_correct": false', '"is_8b_correct": true', 1))
    hand = AtHand(index=str(index.path), model=str(model.folder), queries=str(path))
    found = check_audit(tmp_path / "own.audit.json", hand, again=True, progress=False)
    assert set(found.named("differs")) == {"results", "model's answers"}


def test_an_answer_without_a_right_one_is_not_judged(
    model: LanguageModel, index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [
        {"prompt": PROMPT, "kind": "generation"}, {"prompt": PROMPT, "kind": "fact"}, {"prompt": PROMPT},
        {"prompt": PROMPT, "alternative": "Rome"},
    ]  # fmt: skip
    out = tmp_path / "own.jsonl"
    arguments = ["query", str(index.path), "--queries", str(written(tmp_path, *prompts)), "--generate", "--top", "2"]
    arguments += ["--max-new-tokens", "3", "--model", str(model.folder), "--out", str(out)]
    assert run(trackstar, arguments) == 0
    assert "the model answers" not in capsys.readouterr().err
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record.get("groundtruth", "none") for record in records] == [None, None, "none", None]
    assert not any("is_8b_correct" in record for record in records)
    # Nor when the results are asked again.
    again = answer_queries(index, read_queries(out), model=model, k=1, progress=False)
    assert [result.verdict for result in again.results] == [None] * 4
    audit = ["audit", str(tmp_path / "own.audit.json"), "--index", str(index.path), "--again"]
    assert run(trackstar, [*audit, "--model", str(model.folder)]) == 0


def test_tokens_are_judged_as_their_texts(model: LanguageModel) -> None:
    text = Query(query_id="q", prompt=PROMPT, completion="Paris", kind="generation")
    tokens = tokenize_query(text, model.tokenizer, window_tokens=64)
    of_tokens = dataclasses.replace(
        text, prompt="", completion="", token_ids=tuple(tokens.token_ids.tolist()),
        target_mask=tuple(tokens.target_mask.tolist()),
    )  # fmt: skip
    of_choice = dataclasses.replace(of_tokens, kind="choice", alternatives=("Rome",))
    (one, two), (first, second) = (
        verdicts(model, pair, progress=False) for pair in ([text, choice("Paris", "Rome")], [of_tokens, of_choice])
    )
    assert one is not None and two is not None and first is not None and second is not None  # noqa: PT018
    assert (first.answer, first.correct) == (one.answer, one.correct)
    assert (second.answer, second.correct) == (two.answer, two.correct)


def test_a_completion_that_is_not_the_right_one_is_an_option_of_a_choice(model: LanguageModel) -> None:
    expected = {city: brute_force(model, Query(query_id="q", prompt=PROMPT, completion=city)) for city in CITIES}
    asked = [choice("Rome", "Paris", "Tokyo", truth="Paris"), choice("Rome", "Tokyo", truth="Paris")]
    for verdict in verdicts(model, asked, progress=False):
        assert verdict is not None
        assert sorted(verdict.log_probabilities) == pytest.approx(sorted(expected.values()), abs=1e-5)
        assert verdict.log_probabilities[0] == pytest.approx(expected["Paris"], abs=1e-5)


def test_a_long_prompt_is_cut_and_judged(model: LanguageModel) -> None:
    long = Query(query_id="q", prompt=f"{PROMPT} " * 30, completion="Paris", kind="generation")
    (verdict,) = verdicts(model, [long], progress=False)
    assert verdict is not None
    # 16 tokens of the context are for the answer; the first token, which begins every text, is kept.
    token_ids = prompt_tokens(long.prompt, model.tokenizer)
    kept = [token_ids[0], *token_ids[-(model.context_tokens - 16 - 1) :]]
    assert len(kept) < len(token_ids)
    expected = continuations(model, "", kept, [0], GenerationSettings(max_new_tokens=16))[0].text.strip()
    assert verdict.answer == expected


def test_other_alternatives_are_another_question(model: LanguageModel) -> None:
    one, other = choice("Paris", "Rome"), choice("Paris", "Oslo")
    assert queries_digest([one]) == queries_digest([choice("Paris", "Rome")])
    assert len({queries_digest([query]) for query in (one, other, dataclasses.replace(one, kind="generation"))}) == 3
    plain = dataclasses.replace(one, kind=None, alternatives=())
    assert queries_digest([plain]) == queries_digest([dataclasses.replace(plain, kind="fact")])


def test_wrong_answers_of_a_report_are_asked_again(report: EvaluationReport, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    path = tmp_path / "results" / "trackstar-wrong-answers.jsonl"
    for line, query in zip(path.read_text().splitlines(), read_queries(path), strict=True):
        record = json.loads(line)
        assert (query.prompt, query.completion) == (record["inputs_plaintext"], record["targets_plaintext"])
        assert query.truth == record["groundtruth"]


def test_sampled_answers_of_choices_and_stories(model: LanguageModel, tmp_path: Path) -> None:
    queries = [
        Query(query_id="story", prompt=PROMPT, completion="x", kind="open"),
        Query(query_id="sum", prompt=PROMPT, completion="7", kind="generation"),
    ]
    lines = sample_answers(model, queries, tmp_path / "a.jsonl", samples=2, progress=False).read_text().splitlines()
    story, number = map(json.loads, lines)
    assert "8b_confidence" not in story
    assert number["8b_confidence"] == sum(answer_is_correct(text, "7") for text in number["8b_generations"]) / 2


# ---- Reports -----------------------------------------------------------------------------------------------------

METHODS = ("gold", "BM25", "experiment 5", "TrackStar")


def settings(paths: dict[str, str], **others: Any) -> EvaluationConfig:
    return EvaluationConfig(**{**paths, "methods": METHODS, "side": (4,), "damping": 0.1, "top_k": 5, **others})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def report(folder: Path) -> EvaluationReport:
    paths = write_world(folder)
    said = generate(load_model(paths["model"]), "3 + 4 =", GenerationSettings(max_new_tokens=2)).text.split()
    others = [
        {"query_id": "c1", "kind": "choice", "task": "COPA", "prompt": "It rains, so", "completion": "we stay in.",
         "alternative": "we go out.", "8b_confidence": 0.25},
        {"query_id": "c2", "kind": "choice", "task": "COPA", "prompt": "It rains, so", "completion": "we go out.",
         "alternative": "we stay in."},
        {"query_id": "g1", "kind": "generation", "prompt": "3 + 4 =", "completion": said[0], "gold": ["France-rain"]},
        {"query_id": "g2", "kind": "generation", "prompt": "3 + 4 =", "completion": "7"},
        {"query_id": "s1", "kind": "open", "task": "stories", "prompt": "Once upon a time"},
    ]  # fmt: skip
    with Path(paths["facts"]).open("a", encoding="utf-8") as stream:
        stream.write("".join(f"\n{json.dumps(record)}" for record in others))
    return run_evaluation(settings(paths, tail_patch=TailPatchConfig(top_k=(1, 3))), folder / "report", progress=False)


def test_a_report_judges_every_kind_of_question(report: EvaluationReport, folder: Path) -> None:
    by_name = {fact.fact_id: number for number, fact in enumerate(report.facts)}
    model = load_model(str(folder / "model"))
    in_, out = (
        brute_force(model, Query(query_id="q", prompt="It rains, so", completion=f"we {what}."))
        for what in ("stay in", "go out")
    )
    assert report.correct[by_name["c1"]] == (in_ > out)
    assert report.correct[by_name["c2"]] == (out > in_)
    assert (report.correct[by_name["g1"]], report.correct[by_name["g2"]]) == (True, False)
    assert [fact.fact_id for fact, judged in zip(report.facts, report.judged, strict=True) if not judged] == ["s1"]
    story = report.facts[by_name["s1"]].object.name
    assert story == report.answers[by_name["s1"]] != ""


def test_questions_of_other_kinds_are_ranked_with_r_train_alone(report: EvaluationReport, folder: Path) -> None:
    paths = {"model": str(folder / "model"), "corpus": str(folder / "sentences.jsonl")}
    only = folder / "only-facts.jsonl"
    only.write_text("\n".join((folder / "facts.jsonl").read_text().splitlines()[: len(CAPITALS)]))
    of_facts = run_evaluation(settings({**paths, "facts": str(only)}), folder / "only", progress=False)
    facts = len(of_facts.facts)
    for method in METHODS:
        mixed, alone = report.rankings[method, 0], of_facts.rankings[method, 0]
        assert (mixed.rows[:facts], mixed.ranks[:facts]) == (alone.rows, alone.ranks)
    # Experiment 5 has R_train alone.
    ours, train = report.rankings["TrackStar", 0], report.rankings["experiment 5", 0]
    assert ours.rows[facts:] == train.rows[facts:]
    assert ours.rows[:facts] != train.rows[:facts]
    assert [bool(ranks) for ranks in ours.ranks] == report.with_gold.tolist()
    assert report.with_gold.sum() == facts + 1
    assert "R: not specific to the task (λ = 0) for questions of the kind choice, generation, open" in "\n".join(
        report.description
    )


def test_a_report_splits_its_tables_by_kind(report: EvaluationReport, tmp_path: Path) -> None:
    page = write_report(report, tmp_path).read_text(encoding="utf-8")
    with (tmp_path / "tables" / "answers.csv").open(encoding="utf-8") as stream:
        rows = {(row["kind"], row["task"]): row for row in csv.DictReader(stream)}
    assert list(rows) == [("fact", ""), ("choice", "COPA"), ("generation", ""), ("open", "stories")]
    assert (rows["choice", "COPA"]["questions"], rows["choice", "COPA"]["right"]) == ("2", "1")
    assert rows["generation", ""]["accuracy"].startswith("0.500")
    assert rows["open", "stories"]["accuracy"] == "no right answer"
    assert "Queries of the kind generation that the model answers correctly (Table A.7)" in page
    assert "Queries of the kind choice that the model answers incorrectly (Table A.7)" in page
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["answers"]["choice"]["mean"] == 0.5
    assert found["methods"]["TrackStar"]["template 0"]["reciprocal_rank"]["queries"] == len(CAPITALS) + 1


def test_wrong_answers_stand_beside_the_right_ones(report: EvaluationReport, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    wrong = read_result_file(tmp_path / "results" / "trackstar-wrong-answers.jsonl")
    right = read_result_file(tmp_path / "results" / "trackstar.jsonl")
    assert len(wrong_answer_lines(report)) == len(wrong.lines) == len(report.wrong_answers)
    for place in range(len(wrong.lines)):
        record = wrong.record(place)
        beside = right.record(right.place_of[record["example_id"]])
        assert record["groundtruth"] == beside["targets_plaintext"] != record["targets_plaintext"]
        assert record["inputs_plaintext"] == beside["inputs_plaintext"]
        assert record["is_8b_correct"] is beside["is_8b_correct"] is False
        assert "groundtruth" not in beside
        assert "proponent_correct" not in record
    choices = [record for record in map(wrong.record, range(len(wrong.lines))) if record["kind"] == "choice"]
    assert [record["alternative"] for record in choices] == [[record["groundtruth"]] for record in choices]
    # The two questions are each other's choices: what is wrong for one is right for the other.
    (choice,) = choices
    other = next(
        line for line in map(right.record, range(len(right.lines)))
        if line["kind"] == "choice" and line["example_id"] != choice["example_id"]
    )  # fmt: skip
    assert choice["proponent_ids"] == other["proponent_ids"]
    assert choice["proponent_scores"] == pytest.approx(other["proponent_scores"], abs=1e-5)
    carried = {line["example_id"]: line for line in map(right.record, range(len(right.lines)))}
    assert carried["c1"]["8b_confidence"] == 0.25
    assert carried["f-France"]["has_trex_sentence"] is True
    assert not {"is_8b_correct", "groundtruth", "c4_frequency"} & carried["s1"].keys()


def test_a_second_report_computes_nothing(
    report: EvaluationReport, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    for name in (
        "own_answers.own_answer",
        "own_answers.log_probabilities_of_choice",
        "rankings.GradientRetriever.scores",
    ):
        monkeypatch.setattr(f"trackstar.evaluation.{name}", refuse)
    again = run_evaluation(report.config, folder / "report", progress=False)
    assert again.wrong_answers == report.wrong_answers
    assert again.answers == report.answers


def test_a_report_of_stories_alone_has_no_ranking_metrics(folder: Path, report: EvaluationReport) -> None:
    path = folder / "stories.jsonl"
    path.write_text(json.dumps({"query_id": "s", "kind": "open", "prompt": "Once upon a time", "completion": "rain"}))
    config = dataclasses.replace(report.config, facts=str(path), methods=("BM25", "TrackStar"))
    found = run_evaluation(config, folder / "stories", progress=False)
    page = write_report(found, folder / "stories").read_text(encoding="utf-8")
    assert "tail-patch, top 3 (%)" in page
    assert "MRR" not in page


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "generation", "prompt": "2 + 2 ="}, "no completion"),
        ({"kind": "choice", "prompt": "2 + 2 =", "completion": "4"}, 'no field "alternative"'),
        ({"kind": "open", "messages": [{"role": "user", "content": "Hi"}]}, "expected prompt and completion as text"),
        ({"kind": "fact", "prompt": "2 + 2 =", "completion": "4"}, "neither a fact nor of another kind"),
        ({"prompt": "2 + 2 =", "completion": "4"}, 'or a "kind" choice, generation or open'),
        ({"kind": "open", "prompt": "Hi", "completion": "ho", "8b_confidence": 2}, "expected a number from 0 to 1"),
    ],
)
def test_a_question_that_a_report_cannot_ask_is_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=f"q.jsonl:1: .*{message}"):
        read_facts(written(tmp_path, fields))


def test_open_question_without_an_answer_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = written(tmp_path, {"query_id": "s", "kind": "open", "prompt": "Once upon a time"})
    monkeypatch.setattr("trackstar.evaluation.own_answers.own_answer", lambda *_, **__: "")
    paths = {"model": str(folder / "model"), "corpus": str(folder / "sentences.jsonl"), "facts": str(path)}
    with pytest.raises(OptionError, match="open question s has no completion, and the model says nothing"):
        run_evaluation(settings(paths), tmp_path / "report", progress=False)
