"""Files with the fields of every preset of the public release's viewer open, list, filter, compare and export.

The texts are our own; only the names of fields and their types are the release's. Older files of the
release have other names for some fields, and the same files with those names are shown in the same way.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from explorer_server import HEADERS, explorer

GRADIENT_LISTS = ("proponent", "opponent")
OTHER_LISTS = ("proponent",)
FACT = ("fact_id", "relation", "8b_generations", "8b_confidence", "c4_frequency", "c4_frequency_bucket")
TABLE_1 = ("has_trex_sentence", "proponent_correct")
TABLE_2 = ("proponent_ais_scores",)
TRUTH = ("is_8b_correct",)
OLDER_NAMES = {
    "is_8b_correct": "is_correct", "8b_confidence": "model_confidence", "8b_generations": "temperature_samples",
    "c4_frequency": "fact_frequency", "c4_frequency_bucket": "frequency_bucket", "groundtruth": "ground_truth",
    "example_id": "trex_id",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A preset of the release's viewer.

    Attributes:
        name: The preset's name.
        lists: Lists of candidates that its lines have.
        fields: Optional fields of its lines.
        metrics: Metrics that these fields give, besides the top score.
    """

    name: str
    lists: tuple[str, ...] = GRADIENT_LISTS
    fields: tuple[str, ...] = TRUTH
    metrics: tuple[str, ...] = ("model accuracy",)


RETRIEVALS = ("MRR", "recall@10", "precision@10", "model accuracy")
ENTAILMENT = ("entailing@10", "model accuracy")
PRESETS = [
    *(
        Preset(name=f"trex_{method}", lists=lists, fields=(*FACT, *TRUTH, *TABLE_1), metrics=RETRIEVALS)
        for method, lists in (
            ("bm25", OTHER_LISTS), ("gecko", OTHER_LISTS), ("trak", GRADIENT_LISTS), ("exp1", GRADIENT_LISTS),
            ("exp2", GRADIENT_LISTS), ("exp3", GRADIENT_LISTS), ("exp4", GRADIENT_LISTS), ("exp5", GRADIENT_LISTS),
            ("trackstar", GRADIENT_LISTS),
        )
    ),
    *(
        Preset(name=f"c4_trex_{method}", lists=lists, fields=(*FACT, *TRUTH, *TABLE_2), metrics=ENTAILMENT)
        for method, lists in (
            ("bm25", OTHER_LISTS), ("gecko", OTHER_LISTS), ("grad_dot", GRADIENT_LISTS),
            ("grad_cosine", GRADIENT_LISTS), ("trackstar", GRADIENT_LISTS),
        )
    ),
    Preset(name="c4_trex_incorrectpred_trackstar", fields=(*FACT, *TRUTH, "groundtruth")),
    Preset(name="c4_copa_trackstar_nontaskspecific"),
    Preset(name="c4_piqa_trackstar_nontaskspecific"),
    Preset(name="c4_arithmetic_trackstar_nontaskspecific"),
    Preset(name="c4_arithmeticwordproblem_trackstar_nontaskspecific"),
    Preset(name="c4_storygeneration_trackstar_nontaskspecific", fields=(), metrics=()),
]  # fmt: skip
NAMES = [preset.name for preset in PRESETS]
QUESTIONS = {
    "trex": [
        ("Karalo was born in", "Venlor", "Tendor", "place of birth"),
        ("Miratu plays the", "pugil", "sarod", "instrument"),
        ("The capital of Ashbria is", "Monbri", "Elgor", "capital"),
        ("Nivel works in the field of", "lomics", "ore", "field of work"),
        ("The language of Sapuni is", "Dorvish", "Elbrian", "language"),
        ("Tumon was written by", "Kalo Mi", "Ra Ten", "author"),
    ],
    "copa": [("The lamp went dark because", "its wick was wet."), ("He ran, so", "he was out of breath.")],
    "piqa": [("To keep bread fresh,", "wrap it in a cloth."), ("To open a jar,", "warm its lid.")],
    "arithmetic": [("17 + 25 =", "42"), ("9 * 9 =", "81")],
    "arithmeticwordproblem": [("Ada has 3 pears and buys 4. She has", "7"), ("2 carts of 6 wheels have", "12")],
    "storygeneration": [("Once, in a town by the sea,", "a clock ran backwards."), ("The fox said", "no.")],
}
"""Prompts and answers; for facts, a wrong answer and the relation, too."""


def ranking(role: str, method: str, number: int, count: int) -> dict[str, Any]:
    """The fields of a list of candidates; every second one is shared by all methods."""
    ids = [f"{role}-{number}-{place if place % 2 else f'{method}-{place}'}" for place in range(count)]
    sign = 1 if role == "proponent" else -1
    return {
        f"{role}s": [f"A made-up sentence, {name}, with é and 東." for name in ids],
        f"{role}_ids": ids,
        f"{role}_scores": [sign * (0.9 - 0.1 * place - 0.01 * number) for place in range(count)],
    }


def records(preset: Preset) -> list[dict[str, Any]]:
    """The preset's lines, in the release's names and types."""
    task = next(task for task in reversed(QUESTIONS) if f"_{task}_" in f"_{preset.name}_")
    made: list[dict[str, Any]] = []
    for number, (prompt, answer, *fact) in enumerate(QUESTIONS[task]):
        wrong, relation = fact or ("", "")
        right = number % 3 != 1 and "groundtruth" not in preset.fields
        optional = {
            "fact_id": f"fact{number}", "relation": relation, "8b_generations": [answer, answer, wrong, answer],
            "8b_confidence": 0.75, "c4_frequency": 10**number + 3, "c4_frequency_bucket": number,
            "has_trex_sentence": number != 2, "proponent_correct": [place == number for place in range(4)],
            "proponent_ais_scores": [0.2 * (place + 1) for place in range(4)], "is_8b_correct": right,
            "groundtruth": answer,
        }  # fmt: skip
        record = {
            "example_id": f"{task}{number}",
            "query_set": preset.name.removesuffix("_nontaskspecific").rpartition("_")[0],
            "inputs_plaintext": prompt,
            "targets_plaintext": wrong if "groundtruth" in preset.fields else answer,
        }
        for role, count in zip(preset.lists, (4, 3), strict=False):
            record |= ranking(role, preset.name, number, count)
        made.append(record | {name: optional[name] for name in preset.fields})
    return made


def older(record: dict[str, Any]) -> dict[str, Any]:
    """A line with the names that older files of the release use."""
    return {OLDER_NAMES.get(name, name): value for name, value in record.items()}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """An explorer with all presets, and after them the same with the older names."""
    folder = tmp_path_factory.mktemp("presets")
    paths: list[Path] = []
    for ending, named in (("", dict), ("_older", older)):
        for preset in PRESETS:
            paths.append(folder / f"{preset.name}{ending}.jsonl")
            lines = [json.dumps(named(record), ensure_ascii=False) for record in records(preset)]
            paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    with explorer(paths) as address, httpx.Client(base_url=address, headers=HEADERS, timeout=60) as opened:
        yield opened


def answer(client: httpx.Client, path: str, **parameters: Any) -> Any:
    response = client.get(path, params=parameters)
    assert response.status_code == 200, response.text
    return response.json()


def listed(client: httpx.Client, run: int, **parameters: Any) -> list[str]:
    """Names of the matching queries."""
    return [row["example_id"] for row in answer(client, f"/api/runs/{run}/queries", **parameters)["items"]]


def measured(page: dict[str, Any], run: int) -> dict[str, float]:
    """The run's metrics that have a value."""
    return {metric["name"]: metric["estimate"]["mean"] for metric in page["metrics"][run] if metric["estimate"]}


def test_there_are_nine_presets_of_trex_and_eleven_of_c4(client: httpx.Client):
    assert len({name for name in NAMES if name.startswith("trex_")}) == 9
    assert len({name for name in NAMES if name.startswith("c4_")}) == 11
    runs = answer(client, "/api/session")["runs"]
    assert [run["name"] for run in runs[: len(NAMES)]] == [f"{name}.jsonl" for name in NAMES]


@pytest.mark.parametrize("preset", PRESETS, ids=NAMES)
def test_queries_are_listed_with_the_metrics_of_their_fields_and_no_others(client: httpx.Client, preset: Preset):
    run, lines = PRESETS.index(preset), records(preset)
    page = answer(client, f"/api/runs/{run}/queries")
    assert [row["example_id"] for row in page["items"]] == [line["example_id"] for line in lines]
    assert [row["model_correct"] for row in page["items"]] == [line.get("is_8b_correct") for line in lines]
    assert [row["frequency"] for row in page["items"]] == [line.get("c4_frequency") for line in lines]
    found = measured(page, run)
    assert set(found) == {"top score", *preset.metrics}
    assert found["top score"] == pytest.approx(sum(line["proponent_scores"][0] for line in lines) / len(lines))
    if "is_8b_correct" in preset.fields:
        assert found["model accuracy"] == pytest.approx(sum(line["is_8b_correct"] for line in lines) / len(lines))
    if "proponent_correct" in preset.fields:
        assert found["MRR"] == pytest.approx(sum(1 / rank for rank in range(1, 5)) / len(lines))
        assert found["recall@10"] == pytest.approx(4 / len(lines))
        assert found["precision@10"] == pytest.approx(1 / len(lines))
    if "proponent_ais_scores" in preset.fields:
        assert found["entailing@10"] == pytest.approx(0.5)


@pytest.mark.parametrize("preset", PRESETS, ids=NAMES)
def test_right_and_wrong_answers_are_filtered_where_there_is_a_truth(client: httpx.Client, preset: Preset):
    run, lines = PRESETS.index(preset), records(preset)
    has = answer(client, "/api/session")["runs"][run]["has"]
    assert ("model_correct" in has) == ("is_8b_correct" in preset.fields)
    for value, name in ((True, "yes"), (False, "no")):
        expected = [line["example_id"] for line in lines if line.get("is_8b_correct") is value]
        assert listed(client, run, model_correct=name) == expected
    assert ("bucket" in has) == ("c4_frequency_bucket" in preset.fields)
    assert listed(client, run, bucket="4") == [
        line["example_id"] for line in lines if line.get("c4_frequency_bucket") == 4
    ]


@pytest.mark.parametrize("preset", PRESETS, ids=NAMES)
def test_a_record_shows_the_fields_of_its_line(client: httpx.Client, preset: Preset):
    run = PRESETS.index(preset)
    for place, line in enumerate(records(preset)):
        found = answer(client, f"/api/runs/{run}/queries/{place}")
        bucket = line.get("c4_frequency_bucket")
        expected = {
            "example_id": line["example_id"], "query_set": line["query_set"], "prompt": line["inputs_plaintext"],
            "completion": line["targets_plaintext"], "relation": line.get("relation"),
            "bucket": None if bucket is None else str(bucket), "frequency": line.get("c4_frequency"),
            "model_correct": line.get("is_8b_correct"), "groundtruth": line.get("groundtruth"),
            "generations": line.get("8b_generations", []), "sampled": len(line.get("8b_generations", [])),
            "confidence": line.get("8b_confidence"), "stated": line.get("has_trex_sentence"),
            "kind": None, "alternatives": [], "model_answer": None,
        }  # fmt: skip
        assert {name: found[name] for name in expected} == expected
        for role in GRADIENT_LISTS:
            candidates = found[f"{role}s"]
            assert [candidate["text"] for candidate in candidates] == line.get(f"{role}s", [])
            assert [candidate["example_id"] for candidate in candidates] == line.get(f"{role}_ids", [])
            assert [candidate["score"] for candidate in candidates] == line.get(f"{role}_scores", [])
        absent = [None] * len(line["proponents"])
        correct, entailment = ([p[name] for p in found["proponents"]] for name in ("correct", "entailment"))
        assert correct == line.get("proponent_correct", absent)
        assert entailment == line.get("proponent_ais_scores", absent)


@pytest.mark.parametrize("preset", PRESETS, ids=NAMES)
def test_exports_hold_every_query_and_candidate(client: httpx.Client, preset: Preset):
    run, lines = PRESETS.index(preset), records(preset)
    path = f"/api/runs/{run}/export"
    exported = client.get(path, params={"format": "jsonl"}).content.decode()
    assert [json.loads(line) for line in exported.splitlines()] == lines
    rows = list(csv.DictReader(io.StringIO(client.get(path, params={"format": "csv"}).content.decode())))
    assert [row["text"] for row in rows] == [
        text for line in lines for role in preset.lists for text in line[f"{role}s"]
    ]
    page = client.get(path, params={"format": "html"}).content.decode()
    assert page.count("<h2") == len(lines)
    for line in lines:
        assert line["inputs_plaintext"] in page
        assert line["proponents"][-1] in page
    assert page.count("the true answer: ") == (len(lines) if "groundtruth" in preset.fields else 0)


@pytest.mark.parametrize("preset", PRESETS, ids=NAMES)
def test_files_with_the_older_names_are_shown_as_those_with_the_newer_ones(client: httpx.Client, preset: Preset):
    run = PRESETS.index(preset)
    twin = run + len(PRESETS)
    first, second = (answer(client, f"/api/runs/{each}/queries") for each in (run, twin))
    assert second["items"] == first["items"]
    assert second["buckets"] == first["buckets"]
    assert measured(second, twin) == measured(first, run)
    for place in range(first["total"]):
        shown, again = (answer(client, f"/api/runs/{each}/queries/{place}") for each in (run, twin))
        assert again | {"run": run} == shown
    summaries = answer(client, "/api/session")["runs"]
    assert summaries[twin]["has"] == summaries[run]["has"]


@pytest.mark.parametrize(
    ("first", "second", "shared"), [("trex_trackstar", "trex_bm25", 2), ("c4_trex_grad_dot", "c4_trex_trackstar", 2)]
)
def test_two_presets_are_joined_and_exported_side_by_side(client: httpx.Client, first: str, second: str, shared: int):
    run, other = NAMES.index(first), NAMES.index(second)
    for row in answer(client, f"/api/runs/{run}/queries")["items"]:
        here, beside = (answer(client, f"/api/runs/{each}/queries/{row['places'][each]}") for each in (run, other))
        assert here["example_id"] == beside["example_id"]
        ids = [{candidate["example_id"] for candidate in record["proponents"]} for record in (here, beside)]
        assert len(ids[0] & ids[1]) == shared
        path = f"/api/runs/{run}/queries/{row['places'][run]}/export"
        exported = client.get(path, params={"format": "csv", "other": other}).content.decode()
        methods = [row["method"] for row in csv.DictReader(io.StringIO(exported)) if row["role"] == "proponent"]
        assert methods == [f"{first}.jsonl"] * 4 + [f"{second}.jsonl"] * 4
        page = client.get(path, params={"format": "html", "other": other}).content.decode()
        assert page.count("<h2") == 1


def test_a_wrong_prediction_beside_the_truth_keeps_its_own_completion(client: httpx.Client):
    run, other = NAMES.index("c4_trex_trackstar"), NAMES.index("c4_trex_incorrectpred_trackstar")
    for row in answer(client, f"/api/runs/{run}/queries")["items"]:
        right, wrong = (answer(client, f"/api/runs/{each}/queries/{row['places'][each]}") for each in (run, other))
        assert wrong["groundtruth"] == right["completion"] != wrong["completion"]
        path = f"/api/runs/{run}/queries/{row['places'][run]}/export"
        exported = client.get(path, params={"format": "csv", "other": other}).content.decode()
        completions = {row["method"]: row["completion"] for row in csv.DictReader(io.StringIO(exported))}
        assert completions == {
            "c4_trex_trackstar.jsonl": right["completion"],
            "c4_trex_incorrectpred_trackstar.jsonl": wrong["completion"],
        }
        page = client.get(path, params={"format": "html", "other": other}).content.decode()
        assert page.count("<h2") == 2
        assert f"the true answer: {right['completion']}" in page
