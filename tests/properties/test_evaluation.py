"""A report on a tiny model: its content, resuming it, and its settings."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_models import save_tiny_model
from trackstar.baselines.gradients import TRACKSTAR
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.corpus import tokenize_query
from trackstar.errors import OptionError
from trackstar.evaluation import open_set
from trackstar.evaluation import rankings as rankings_module
from trackstar.evaluation.config import EvaluationConfig, TailPatchConfig, read_config
from trackstar.evaluation.effects import chosen_queries
from trackstar.evaluation.facts import to_queries
from trackstar.evaluation.open_set import open_set_metrics
from trackstar.evaluation.own_answers import first_phrase
from trackstar.evaluation.rankings import Ranking
from trackstar.evaluation.release_results import result_file_name
from trackstar.evaluation.report_files import write_report
from trackstar.evaluation.run import (
    EvaluationReport,
    chosen_facts,
    half_of,
    planned_evaluation,
    run_evaluation,
    training_step,
)
from trackstar.evaluation.tables import tables
from trackstar.evaluation.variants import Variants
from trackstar.evaluation.workspace import Workspace
from trackstar.explorer.result_files import read_result_file
from trackstar.indexing import plan as index_plan
from trackstar.model.language_model import load_model
from trackstar.store import Index
from trackstar.tail_patch import Pair, mean_top_effect, tail_patch

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Cuba": "Havana",
    "Chad": "Ndjamena", "Oman": "Muscat",
}  # fmt: skip
METHODS = (
    "gold", "random", "BM25", "experiment 1", "experiment 2", "experiment 3", "experiment 4", "experiment 5",
    "TrackStar", "TrackStar, margin", "TrackStar, logit", "TrackStar, one-sided", "TRAK", "TRAK, R over tokens",
)  # fmt: skip


def write_world(folder: Path) -> dict[str, str]:
    """Write a model, a corpus and facts."""
    save_tiny_model(folder / "model", "llama")
    lines = []
    for country, city in CAPITALS.items():
        lines.append({"sentence_id": f"{country}-capital", "text": f"The capital of {country} is {city}."})
        lines.append({"sentence_id": f"{country}-rain", "text": f"In {country} it rains."})
        lines.append({"sentence_id": f"{city}-people", "text": f"Many people live in {city}."})
    (folder / "sentences.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    facts = [
        {
            "fact_id": f"f-{country}", "subject": country, "subject_id": f"Q{n}", "subject_aliases": [],
            "relation": "capital", "relation_id": "P36", "object": city, "object_id": f"Q1{n}", "object_aliases": [],
            "gold": [f"{country}-capital"], "gold_strict": [f"{country}-capital"], "coref": [], "maybe_gold": [],
            "prompt": f"The capital of {country} is", "prompt_no_colon": f"{country} is ruled from",
            "prompt_reworded": f"The seat of the government of {country}:", "completion": city,
        }
        for n, (country, city) in enumerate(CAPITALS.items())
    ]  # fmt: skip
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)), encoding="utf-8")
    return {
        "model": str(folder / "model"), "corpus": str(folder / "sentences.jsonl"), "facts": str(folder / "facts.jsonl"),
    }  # fmt: skip


def settings(paths: dict[str, str], **others: Any) -> EvaluationConfig:
    given: dict[str, Any] = {
        **paths, "methods": METHODS, "templates": (0, 2), "side": (4, 2), "damping": 0.1,
        "tail_patch": TailPatchConfig(queries=4, top_k=(1, 3), learning_rate=(0.01, 0.001)), **others,
    }  # fmt: skip
    return EvaluationConfig(**given)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report") / "report"


@pytest.fixture(scope="module")
def report(paths: dict[str, str], folder: Path) -> EvaluationReport:
    return run_evaluation(settings(paths), folder, progress=False)


def test_every_method_ranks_every_candidate_for_every_query(report: EvaluationReport):
    assert report.candidates == 3 * len(CAPITALS)
    assert set(report.rankings) == {(method, template) for method in METHODS for template in (0, 2)}
    for (method, _), ranking in report.rankings.items():
        assert len(ranking.ranks) == len(CAPITALS)
        assert all(1 <= rank <= report.candidates for ranks in ranking.ranks for rank in ranks)
        for rows, scores in zip(ranking.rows, ranking.scores, strict=True):
            assert len(rows) == (1 if method == "gold" else 10)
            assert list(scores) == sorted(scores, reverse=True)
    assert report.rankings["TrackStar, one-sided", 0] != report.variants.by_side[2]
    assert set(report.rankings["gold", 0].metrics().reciprocal_rank) == {1.0}
    assert report.rankings["BM25", 0].metrics().reciprocal_rank.mean() > 0.9


def test_the_plan_counts_what_the_report_then_holds(
    paths: dict[str, str], report: EvaluationReport, folder: Path, tmp_path: Path
):
    planned = planned_evaluation(settings(paths), tmp_path / "other")
    assert list(tmp_path.iterdir()) == []
    built = sorted(entry.name for entry in (folder / "indexes").iterdir())
    assert planned.narrowed == sum("-of-" in name for name in built) > 0
    assert len(planned.indexes) == len(built) - planned.narrowed
    assert sorted(Path(plan.out).name for plan in planned.indexes) == [name for name in built if "-of-" not in name]
    assert planned.queries == len(report.facts)
    assert Path(planned.indexes[0].out).name == "loss-V-4"
    assert planned.indexes[0].corpus.examples == report.candidates
    assert len(planned.methods) * planned.templates == len(report.rankings)
    assert report.effects is not None
    assert planned.patched == len(report.effects.queries)
    measured = sum(len(path.read_text().splitlines()) - 1 for path in (folder / "tail-patch").glob("*.jsonl"))
    assert 0 < measured <= planned.most_pairs
    again = planned_evaluation(settings(paths), folder)
    assert all(plan.begun.complete for plan in again.indexes)
    assert f"{len(again.indexes)} of them complete" in str(again)


def test_a_report_that_does_not_fit_is_refused_before_its_folder_is_made(
    paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(index_plan, "free_disk", lambda _path: 2048)
    with pytest.raises(OptionError, match=r"^`out`: expected a disk with room"):
        run_evaluation(settings(paths), tmp_path / "report", progress=False)
    assert list(tmp_path.iterdir()) == []
    assert "plan: evaluate 14 methods by 8 queries" in capfd.readouterr().err


def test_tail_patch_of_a_method_is_the_mean_over_its_first_proponents(
    report: EvaluationReport, paths: dict[str, str], folder: Path
):
    assert report.effects is not None
    assert report.effects.queries == tuple(chosen_queries(report.facts, 4))
    model = load_model(paths["model"])
    ranking = report.rankings["TrackStar", 0]
    opened = Index.open(folder / "indexes" / "loss-V-4")
    queries = [tokenize_query(q, model.tokenizer, window_tokens=64) for q in to_queries(report.facts)]
    examples = [stored.example for stored in opened.examples()]
    pairs = [Pair(query=q, proponent=row) for q in report.effects.queries for row in ranking.rows[q][:3]]
    step = training_step(model, opened, 0.01)
    exact = tail_patch(model, step, queries, examples, pairs, path="exact")
    found = float(report.effects.by_method["TrackStar", 3].mean())
    assert found == pytest.approx(mean_top_effect(exact, 3), rel=1e-3)
    smaller = training_step(model, opened, 0.001)
    exact = tail_patch(model, smaller, queries, examples, pairs, path="exact")
    found = float(report.effects.by_learning_rate["TrackStar", 0.001].mean())
    assert found == pytest.approx(mean_top_effect(exact, 3), rel=1e-3)
    np.testing.assert_array_equal(
        report.effects.by_learning_rate["TrackStar", 0.01], report.effects.by_method["TrackStar", 3]
    )


def test_second_run_computes_nothing_and_gives_the_same(
    report: EvaluationReport, paths: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("recomputed")

    monkeypatch.setattr(rankings_module.Rankings, "_compute", refuse)
    monkeypatch.setattr("trackstar.evaluation.effects.tail_patch", refuse)
    monkeypatch.setattr("trackstar.evaluation.own_answers.own_answer", refuse)
    again = run_evaluation(settings(paths), folder, progress=False)
    assert again.rankings == report.rankings
    assert again.answers == report.answers
    assert again.effects is not None
    assert report.effects is not None
    for key, values in report.effects.by_method.items():
        np.testing.assert_allclose(again.effects.by_method[key], values, rtol=1e-12)


def test_results_of_other_settings_are_not_reused(report: EvaluationReport, paths: dict[str, str], folder: Path):
    other = run_evaluation(
        settings(paths, damping=0.5, tail_patch=None, methods=("BM25", "TrackStar"), templates=(0,)),
        folder, progress=False,
    )  # fmt: skip
    assert other.rankings["TrackStar", 0].scores != report.rankings["TrackStar", 0].scores
    assert other.rankings["BM25", 0] == report.rankings["BM25", 0]


def test_smaller_sides_rank_like_an_index_built_with_that_side(
    report: EvaluationReport, paths: dict[str, str], tmp_path: Path
):
    anew = run_evaluation(
        settings(paths, side=(2,), methods=("TrackStar",), tail_patch=None, templates=(0,)), tmp_path, progress=False
    )
    small, expected = report.variants.by_side[2], anew.rankings["TrackStar", 0]
    np.testing.assert_allclose(small.scores, expected.scores, atol=0.02)
    assert report.variants.by_side[4] == report.rankings["TrackStar", 0]
    assert report.effects is not None
    assert ("TrackStar, side 2", 3) in report.effects.by_method


def test_tables_have_the_structure_of_the_paper(report: EvaluationReport):
    made = {table.name: table for table in tables(report)}
    assert {
        "table-1",
        "table-2",
        "table-a3",
        "table-a5",
        "table-a6",
        "tail-patch-steps",
        "figure-2",
        "figure-3",
    } <= set(made)
    first = made["table-1"]
    assert [row[0] for row in first.rows] == [f"experiment {n}" for n in range(1, 6)] + [TRACKSTAR.name]
    assert [row[1:4] for row in first.rows] == [
        ("", "", ""), ("", "", "yes"), ("", "R_train", "yes"), ("yes", "", "yes"), ("yes", "R_train", "yes"),
        ("yes", "mixed", "yes"),
    ]  # fmt: skip
    for table in made.values():
        assert all(len(row) == len(table.header) for row in table.rows)
        assert table.to_csv().count("\n") == len(table.rows) + 1
    shares = [float(cell.rstrip("%")) for cell in made["figure-3"].rows[0][1:]]
    assert sum(shares) == pytest.approx(100, abs=0.3)


def test_report_is_written_as_markdown_csv_json_and_figures(report: EvaluationReport, tmp_path: Path):
    page = write_report(report, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "Effect of each correction (Table 1)" in text
    assert text.count("![") == len(list((tmp_path / "figures").glob("*.png"))) == 3
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["methods"]["gold"]["template 0"]["reciprocal_rank"]["mean"] == 1
    assert found["tail_patch"]["queries"] == 4
    assert (tmp_path / "tables" / "table-1.csv").exists()


def test_result_files_of_each_method_open_in_the_explorer(report: EvaluationReport, tmp_path: Path):
    write_report(report, tmp_path)
    written = {path.name for path in (tmp_path / "results").iterdir()}
    assert written == {*(result_file_name(m) for m in report.config.methods), "trackstar-wrong-answers.jsonl"}
    for method in report.config.methods:
        file = read_result_file(tmp_path / "results" / result_file_name(method))
        ranking = report.rankings[method, report.config.templates[0]]
        assert [line.example_id for line in file.lines] == [fact.fact_id for fact in report.facts]
        for place, line in enumerate(file.lines):
            record = file.record(place)
            assert record["proponent_ids"] == [report.pool.example_ids[row] for row in ranking.rows[place]]
            assert record["proponents"] == [report.pool.texts[row] for row in ranking.rows[place]]
            assert line.model_correct == report.correct[place]
            assert line.correct is not None
            assert any(line.correct) == bool(set(record["proponent_ids"]) & set(report.facts[place].gold))
    gold = read_result_file(tmp_path / "results" / "gold.jsonl")
    assert all(line.first_correct == 1 for line in gold.lines)


def test_step_of_a_checkpoint_continues_its_training(
    paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shape = "--width 16 --layers 2 --heads 2 --mlp-width 24 --vocabulary 300 --context-tokens 32 --steps 4".split()
    shape += ["--checkpoint-steps", "2"]
    arguments = ["pretrain", "--data", paths["corpus"], "--out", str(tmp_path / "run"), *shape]
    assert framework.run(command_group, arguments) == 0
    config = tmp_path / "report.toml"
    config.write_text(
        f'model = "run/checkpoint-000004"\ncorpus = "{paths["corpus"]}"\nfacts = "{paths["facts"]}"\nside = 4\n'
        'checkpoints = ["run/checkpoint-000000", "run/checkpoint-000002"]\n'
        'methods = ["gold", "BM25", "TrackStar"]\ntop_k = 3\n[tail_patch]\nqueries = 3\ntop_k = [1, 3]\n',
        encoding="utf-8",
    )
    arguments = ["evaluate", "--config", str(config), "--out", str(tmp_path / "report")]
    assert framework.run(command_group, arguments) == 0
    assert "8 queries, 24 candidates" in capsys.readouterr().out
    found = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert found["tail_patch"]["step"].startswith("Adafactor step 5 of checkpoint-000004's run")
    assert "TrackStar, checkpoint-000002, top 3" in found["tail_patch"]["mean_effect"]
    assert list(found["by_checkpoint"]) == ["checkpoint-000000", "checkpoint-000002", "checkpoint-000004"]
    assert (tmp_path / "report" / "figures" / "checkpoints.png").exists()
    later = config.with_name("later.toml")
    text = config.read_text(encoding="utf-8")
    later.write_text(text.replace("-000004", "-000003").replace("-000002", "-000004").replace("-000003", "-000002"))
    arguments = ["evaluate", "--config", str(later), "--out", str(tmp_path / "later")]
    capsys.readouterr()
    assert framework.run(command_group, arguments) == 1
    assert "has 4 steps, the model 2; expected an earlier checkpoint of" in capsys.readouterr().err
    rate = config.with_name("rate.toml")
    rate.write_text(text + "learning_rate = 0.5\n", encoding="utf-8")
    assert framework.run(command_group, ["evaluate", "--config", str(rate), "--out", str(tmp_path / "rate")]) == 1
    assert "whose step continues its training, found [0.5]; leave it out" in capsys.readouterr().err
    # The ranking of a checkpoint equals that of a report on it.
    alone = config.with_name("alone.toml")
    text = text.replace("run/checkpoint-000004", "run/checkpoint-000002", 1)
    alone.write_text(text.split("checkpoints =")[0] + 'methods = ["TrackStar"]\n', encoding="utf-8")
    assert framework.run(command_group, ["evaluate", "--config", str(alone), "--out", str(tmp_path / "alone")]) == 0
    other = json.loads((tmp_path / "alone" / "report.json").read_text(encoding="utf-8"))
    expected = other["methods"]["TrackStar"]["template 0"]["reciprocal_rank"]
    assert found["by_checkpoint"]["checkpoint-000002"] == pytest.approx(expected)


def test_changed_facts_are_recomputed_and_others_reused(paths: dict[str, str], tmp_path: Path):
    facts = tmp_path / "facts.jsonl"
    lines = [json.loads(line) for line in Path(paths["facts"]).read_text(encoding="utf-8").splitlines()]
    facts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    asked = settings(
        paths | {"facts": str(facts)}, methods=("gold", "BM25", "TrackStar"), side=(4,), templates=(0,),
        tail_patch=TailPatchConfig(top_k=(1,)),
    )  # fmt: skip
    run_evaluation(asked, tmp_path / "report", progress=False)
    gold = [line["gold"] for line in lines]
    for line, other in zip(lines, (*gold[1:], gold[0]), strict=True):
        line["gold"] = line["gold_strict"] = other
    lines[0] |= {"object": "Rome", "completion": "Rome"}
    facts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    again = run_evaluation(asked, tmp_path / "report", progress=False)
    anew = run_evaluation(asked, tmp_path / "anew", progress=False)
    assert again.effects is not None
    assert anew.effects is not None
    for name in asked.methods:
        assert again.rankings[name, 0] == anew.rankings[name, 0]
        np.testing.assert_allclose(again.effects.by_method[name, 1], anew.effects.by_method[name, 1], rtol=1e-3)
    assert again.categories == anew.categories


def test_a_single_query_has_no_interval(paths: dict[str, str], tmp_path: Path):
    asked = settings(paths, methods=("gold", "BM25"), queries=1, side=(4,), tail_patch=None, templates=(0,))
    made = {table.name: table for table in tables(run_evaluation(asked, tmp_path, progress=False))}
    assert made["table-2"].rows[0][1] == "1.000 (one query)"


def test_gold_ranks_all_gold_examples_with_the_strict_ones_first(paths: dict[str, str], tmp_path: Path):
    facts = tmp_path / "facts.jsonl"
    lines = [json.loads(line) for line in Path(paths["facts"]).read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["gold"] = [f"{line['subject']}-rain", *line["gold_strict"]]
    facts.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for strict, expected in ((False, ["capital", "rain"]), (True, ["capital"])):
        asked = settings(
            paths | {"facts": str(facts)}, methods=("gold", "BM25"), side=(4,), tail_patch=None, strict=strict
        )
        found = run_evaluation(asked, tmp_path / str(strict), progress=False)
        names = [
            stored.example.example_id for stored in Index.open(tmp_path / str(strict) / "indexes/loss-V-4").examples()
        ]
        for fact, rows in zip(found.facts, found.rankings["gold", 0].rows, strict=True):
            assert [names[row] for row in rows] == [f"{fact.subject.name}-{kind}" for kind in expected]


def test_tables_and_figures_of_other_settings_are_removed(report: EvaluationReport, tmp_path: Path):
    write_report(report, tmp_path)
    assert (tmp_path / "tables" / "figure-2.csv").exists()
    write_report(dataclasses.replace(report, variants=Variants(by_side={}, by_checkpoint={})), tmp_path)
    assert not (tmp_path / "tables" / "figure-2.csv").exists()
    assert not (tmp_path / "figures" / "projection-size.png").exists()
    assert (tmp_path / "tables" / "table-1.csv").exists()


def test_fact_without_gold_examples_is_refused_before_any_computation(paths: dict[str, str], tmp_path: Path):
    facts = tmp_path / "facts.jsonl"
    line = json.loads(Path(paths["facts"]).read_text(encoding="utf-8").splitlines()[0])
    facts.write_text(json.dumps(line | {"gold": [], "gold_strict": []}), encoding="utf-8")
    with pytest.raises(OptionError, match=r"`facts`: fact f-France of .* has no gold example"):
        run_evaluation(settings(paths | {"facts": str(facts)}), tmp_path / "report", progress=False)
    assert not (tmp_path / "report").exists()


def test_side_whose_r_is_larger_than_the_memory_is_refused_before_anything_is_written(
    paths: dict[str, str], tmp_path: Path
):
    with pytest.raises(
        OptionError,
        match=r"`side`: expected work that fits into memory, found .* needed at peak .* choose a smaller `side`",
    ):
        run_evaluation(settings(paths, side=(8000,), methods=("BM25",), tail_patch=None), tmp_path, progress=False)
    assert not list((tmp_path / "indexes").glob("*"))


class CapitalScorer:
    """Judges that a text entails a hypothesis that is a substring of it."""

    def __init__(self) -> None:
        self.judged = 0

    def scores(self, premises: Sequence[str], hypotheses: Sequence[str]) -> torch.Tensor:
        self.judged += len(premises)
        return torch.tensor([0.9 if h in p else 0.5 for p, h in zip(premises, hypotheses, strict=True)])


def test_open_set_evaluation_counts_proponents_judged_to_entail_the_fact(
    report: EvaluationReport, paths: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
):
    scorer = CapitalScorer()
    monkeypatch.setattr(open_set, "load_entailment_classifier", lambda *_, **__: scorer)
    asked = settings(paths, methods=("gold", "random", "BM25"), side=(4,), tail_patch=None, entailment_model="nli")
    found = run_evaluation(asked, folder, progress=False)
    assert found.judgements is not None
    assert scorer.judged == len(found.judgements)
    for method in asked.methods:
        ranking = found.rankings[method, 0]
        reciprocal, precision = open_set_metrics(ranking, found.judgements, at=10)
        for place, ranks in enumerate(ranking.ranks):
            # Only gold sentences contain prompt and completion, so that both evaluations agree.
            assert reciprocal[place] == (1 / ranks[0] if ranks[0] <= len(ranking.rows[place]) else 0)
            assert precision[place] == (ranks[0] <= len(ranking.rows[place])) / 10
    assert found.categories["gold"] == (("entails",),) * len(CAPITALS)
    table = next(table for table in tables(found) if table.name == "open-set")
    assert table.rows[0][1].startswith("1.000")
    again = run_evaluation(asked, folder, progress=False)
    assert scorer.judged == len(found.judgements)
    assert again.judgements == found.judgements


def test_open_set_metrics_by_hand():
    ranking = Ranking(ranks=((1,),) * 3, rows=((4, 7, 2), (1, 0, 3), (5, 6, 1)), scores=((3.0, 2.0, 1.0),) * 3)
    judgements = {(0, 4): 0.1, (0, 7): 0.8, (0, 2): 0.51, (1, 1): 0.5, (1, 0): 0.2, (1, 3): 0.0}
    judgements |= {(2, 5): 0.9, (2, 6): 0.0, (2, 1): 0.1}
    reciprocal, precision = open_set_metrics(ranking, judgements, at=3)
    assert reciprocal.tolist() == [1 / 2, 0, 1]
    assert precision.tolist() == [2 / 3, 0, 1 / 3]


def test_halves_are_disjoint_and_complete(paths: dict[str, str]):
    halves = [chosen_facts(settings(paths, half=half)) for half in ("development", "report", "all")]
    names = [{fact.fact_id for fact in facts} for facts in halves]
    assert names[0] | names[1] == names[2]
    assert not names[0] & names[1]
    assert all(half_of(name) == "development" for name in names[0])


def test_a_smaller_sample_is_a_subset(paths: dict[str, str]):
    few = chosen_facts(settings(paths, queries=3))
    assert len(few) == 3
    assert {fact.fact_id for fact in few} <= {fact.fact_id for fact in chosen_facts(settings(paths, queries=5))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`model`: expected a value, found none; add the key"),
        ("modle = 'x'", "`modle`: no such key; expected one of model, corpus"),
        ("model = ", "is not TOML ("),
        ("model = 3\ncorpus = 'c'\nfacts = 'f'", "`model`: expected str, found 3"),
        ("{base}\nmethods = ['BM26']", "`methods`: expected one of 'gold', 'random'"),
        ("{base}\nmethods = []", "`methods`: expected one or more values, each once, found []"),
        ("{base}\nmethods = ['embeddings']", "`embedding_model`: the method embeddings needs a model folder"),
        ("{base}\nside = true", "`side`: expected int, found True"),
        (
            "{base}\nside = [4, 2]\nmethods = ['BM25']",
            "`methods`: expected TrackStar, by which several values of `side` or",
        ),
        ("{base}\ncheckpoints = ['a', 'a']", "`checkpoints`: expected one or more values, each once, found ['a', 'a']"),
        ("{base}\nside = [4, 0]\nmethods = ['TrackStar']", "`side`: expected numbers of 1 or more, found [4, 0]"),
        ("{base}\ntemplates = [-1]", "`templates`: expected numbers of 0 or more, found [-1]"),
        (
            "{base}\ndamping = -1.0",
            "`damping`: expected 0 or more, as a fraction of R_train's mean eigenvalue, found -1.0",
        ),
        (
            "{base}\nsecond_moment = 'none'",
            "`second_moment`: expected a source of V for the methods that need V, found none",
        ),
        (
            "model = './none'\ncorpus = 'c'\nfacts = 'f'",
            "`model`: expected a model folder, a .gguf file or a hub name, found no file",
        ),
        ("{base}\ntop_k = 0", "`top_k`: expected 1 or more, found 0"),
        ("{base}\nhalf = 'other'", "`half`: expected one of all, development, report, found other"),
        ("{base}\n[tail_patch]\nspeed = 1", "`tail_patch.speed`: no such key"),
        ("{base}\ntail_patch = 3", "`tail_patch`: expected a table, found int"),
        (
            "{base}\n[tail_patch]\ntop_k = [99]",
            "`tail_patch.top_k`: expected numbers from 1 to 10 (`top_k`), found [99]",
        ),
        (
            "{base}\n[tail_patch]\nlearning_rate = -1",
            "`tail_patch.learning_rate`: expected finite numbers above 0, each once, found [-1.0]",
        ),
        ("{base}\n[tail_patch]\npath = 'slow'", "`tail_patch.path`: expected one of fast, exact, found slow"),
    ],
)
def test_bad_setting_is_one_line_that_names_file_and_key(text: str, message: str, tmp_path: Path):
    file = tmp_path / "report.toml"
    file.write_text(text.replace("{base}", "model = 'm'\ncorpus = 'c'\nfacts = 'f'"), encoding="utf-8")
    with pytest.raises(OptionError) as caught:
        read_config(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_settings_file_is_one_line(tmp_path: Path):
    with pytest.raises(OptionError, match="cannot be read"):
        read_config(tmp_path / "none.toml")


def test_lines_of_a_killed_run_are_reused_except_an_incomplete_last_one(tmp_path: Path):
    workspace = Workspace(tmp_path)
    lines = workspace.lines("pairs", {"a": 1})
    lines.add([{"x": 1}, {"x": 2}])
    path = tmp_path / "pairs.jsonl"
    path.write_text(path.read_text() + '{"x": 3', encoding="utf-8")
    assert [line["x"] for line in workspace.lines("pairs", {"a": 1})] == [1, 2]
    assert list(workspace.lines("pairs", {"a": 2})) == []
    workspace.lines("pairs", {"a": 1}).add([{"x": 4}])
    assert [line["x"] for line in workspace.lines("pairs", {"a": 1})] == [1, 2, 4]


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        (" Belgrade, the capital", "Belgrade"),
        ("New Delhi.", "New Delhi"),
        ("...", ""),
        ("", ""),
        ("Rome\nItaly", "Rome"),
        ("$1,000 each", "$1,000"),
        ("3.50 more", "3.50"),
        ("3/4 cup, or less", "3/4 cup"),
    ],
)
def test_wrong_answer_is_the_text_before_the_first_punctuation(answer: str, phrase: str):
    assert first_phrase(answer) == phrase
