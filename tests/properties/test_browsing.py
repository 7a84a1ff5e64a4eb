"""Browsing a result file: filters, sorting, pages and metrics equal the obvious loop over its lines."""

import json
import math
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from release_file import write_kinds_file, write_release_file
from trackstar.evaluation.comparisons import estimate
from trackstar.explorer.browsing import QueryFilter, estimates, matching_places, query_page, run_metrics
from trackstar.explorer.insight import groups, insight, rank_correlation, scatter_rows
from trackstar.explorer.result_files import ResultFile, read_result_file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> ResultFile:
    return read_result_file(write_release_file(tmp_path_factory.mktemp("runs") / "a.jsonl", queries=150))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> ResultFile:
    path = write_release_file(tmp_path_factory.mktemp("runs") / "b.jsonl", queries=100, candidates=6)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n")
    return read_result_file(path)


WANTED = st.builds(
    QueryFilter,
    search=st.sampled_from(["", "capital", "CAPITAL of", "ka", "trex-0001", "language", "nowhere at all"]),
    search_candidates=st.booleans(),
    relations=st.frozensets(st.sampled_from(["capital", "instrument", "author", "absent"]), max_size=2),
    buckets=st.frozensets(st.sampled_from(["0", "3", "5"]), max_size=2),
    model_correct=st.none() | st.booleans(),
    proponent_correct=st.none() | st.booleans(),
    score_min=st.none() | st.floats(0, 0.5),
    score_max=st.none() | st.floats(0.2, 1),
    sort=st.sampled_from(["file", "prompt", "relation", "frequency", "score", "rank"]),
    descending=st.booleans(),
)


def fits(record: dict, wanted: QueryFilter) -> bool:
    """Whether a line matches, from its fields."""
    texts = [record["inputs_plaintext"], record["targets_plaintext"], record["example_id"], record["relation"]]
    if wanted.search_candidates:
        texts += [*record["proponents"], *record["opponents"]]
    right = any(record["proponent_correct"])
    return (
        any(wanted.search.lower() in text.lower() for text in texts)
        and (not wanted.relations or record["relation"] in wanted.relations)
        and (not wanted.buckets or str(record["c4_frequency_bucket"]) in wanted.buckets)
        and wanted.model_correct in (None, record["is_8b_correct"])
        and wanted.proponent_correct in (None, right)
        and (wanted.score_min is None or record["proponent_scores"][0] >= wanted.score_min)
        and (wanted.score_max is None or record["proponent_scores"][0] <= wanted.score_max)
    )


@hypothesis.given(wanted=WANTED, offset=st.integers(0, 200), limit=st.integers(1, 60))
@hypothesis.settings(max_examples=80, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_pages_equal_a_loop_over_the_lines(file: ResultFile, wanted: QueryFilter, offset: int, limit: int):
    records = [json.loads(line) for line in file.raw]
    expected = [place for place, record in enumerate(records) if fits(record, wanted)]
    found = matching_places(file, wanted)
    assert sorted(found) == expected
    page = query_page([file], 0, wanted, offset=offset, limit=limit)
    assert page.total == len(records)
    assert page.matching == len(expected)
    assert [row.places for row in page.items] == [[place] for place in found[offset : offset + limit]]
    keys = {
        "file": lambda r: records.index(r),
        "prompt": lambda r: r["inputs_plaintext"].casefold(),
        "relation": lambda r: r["relation"],
        "frequency": lambda r: r["c4_frequency"],
        "score": lambda r: r["proponent_scores"][0],
        "rank": lambda r: r["proponent_correct"].index(True) if True in r["proponent_correct"] else None,
    }
    values = [keys[wanted.sort](records[place]) for place in found]
    present = [value for value in values if value is not None]
    assert present == sorted(present, reverse=wanted.descending)
    assert values[: len(present)] == present  # those without a value come last


def test_facets_count_the_queries_that_match_all_other_filters(file: ResultFile):
    records = [json.loads(line) for line in file.raw]
    wanted = QueryFilter(relations=frozenset({"capital"}), buckets=frozenset({"2", "3"}), model_correct=True)
    page = query_page([file], 0, wanted, offset=0, limit=10)
    right = [r for r in records if r["is_8b_correct"]]
    for facet in page.relations:
        assert facet.queries == sum(r["relation"] == facet.value and r["c4_frequency_bucket"] in (2, 3) for r in right)
    for facet in page.buckets:
        assert facet.queries == sum(
            str(r["c4_frequency_bucket"]) == facet.value and r["relation"] == "capital" for r in right
        )


def test_kinds_are_a_facet_beside_the_others(tmp_path: Path):
    kinds = read_result_file(write_kinds_file(tmp_path / "kinds.jsonl", [{}, {"relation": "capital"}]))
    assert kinds.kinds == ("fact", "choice", "generation", "open")
    wanted = QueryFilter(kinds=frozenset({"choice", "open"}))
    page = query_page([kinds], 0, wanted, offset=0, limit=10)
    assert [row.example_id for row in page.items] == ["kind-1", "kind-3"]
    assert matching_places(kinds, wanted) == [1, 3]
    assert {facet.value: facet.queries for facet in page.kinds} == dict.fromkeys(kinds.kinds, 1)
    assert [(facet.value, facet.queries) for facet in page.relations] == [("capital", 1)]
    wanted = QueryFilter(kinds=frozenset({"choice", "open"}), relations=frozenset({"capital"}), model_correct=False)
    page = query_page([kinds], 0, wanted, offset=0, limit=10)
    assert [row.example_id for row in page.items] == ["kind-1"]
    assert [(facet.value, facet.queries) for facet in page.kinds] == [("choice", 1)]


def test_a_second_run_is_joined_by_name_and_measured_over_the_same_queries(file: ResultFile, other: ResultFile):
    page = query_page([file, other], 0, QueryFilter(search="capital"), offset=0, limit=50)
    for row in page.items:
        place = row.places[1]
        assert place is None or other.lines[place].example_id == row.example_id
    shared = [row.places[1] for row in page.items if row.places[1] is not None]
    assert page.metrics[1] == run_metrics(other, shared)
    assert 0 < len(shared) < len(page.items)


def test_metrics_equal_means_of_values_counted_by_a_loop(file: ResultFile):
    records = [json.loads(line) for line in file.raw]
    found = {metric.name: metric.estimate for metric in run_metrics(file, range(len(records)))}
    marks = [record["proponent_correct"] for record in records]
    reciprocal = [1 / (mark.index(True) + 1) if any(mark) else 0 for mark in marks]
    expected = {
        "MRR": reciprocal,
        "recall@10": [any(mark) for mark in marks],
        "precision@10": [np.mean(mark) for mark in marks],
        "entailing@10": [np.mean([score > 0.5 for score in r["proponent_ais_scores"]]) for r in records],
        "model accuracy": [r["is_8b_correct"] for r in records],
        "top score": [r["proponent_scores"][0] for r in records],
    }
    for name, values in expected.items():
        estimated = found[name]
        assert estimated is not None
        assert estimated.mean == pytest.approx(np.mean(values))
        assert estimated.queries == len(records)
        assert estimated.low <= estimated.mean <= estimated.high


@pytest.mark.parametrize("count", [30, 400, 20_000])
def test_intervals_are_close_to_the_plain_bootstrap(count: int):
    generator = np.random.default_rng(1)
    values = generator.exponential(size=(count, 1)) * (generator.random((count, 1)) < 0.4)
    (found,) = estimates(values)
    expected = estimate(values[:, 0], resamples=2000)
    assert found is not None
    width = expected.high - expected.low
    assert found.low == pytest.approx(expected.low, abs=0.12 * width)
    assert found.high == pytest.approx(expected.high, abs=0.12 * width)


def test_estimates_leave_missing_values_out():
    values = np.array([[1.0, math.nan, math.nan], [0.0, math.nan, 4.0], [1.0, math.nan, math.nan]])
    first, second, third = estimates(values)
    assert second is None
    assert first is not None
    assert third is not None
    assert (first.mean, first.queries) == (pytest.approx(2 / 3), 3)
    assert (third.mean, third.low, third.high, third.queries) == (4.0, 4.0, 4.0, 1)
    assert estimates(np.empty((0, 2))) == [None, None]


@hypothesis.given(values=st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=30))
def test_rank_correlation_is_spearmans(values: list[tuple[int, int]]):
    import pandas as pd

    first, second = (np.array(column, dtype=np.float32) for column in zip(*values, strict=True))
    found = rank_correlation(first, second)
    if found is None:
        assert len(set(first)) == 1 or len(set(second)) == 1
    else:
        expected = np.corrcoef(pd.Series(first).rank(), pd.Series(second).rank())[0, 1]
        assert found == pytest.approx(expected, abs=1e-9)


def test_the_histogram_counts_all_candidates_and_the_scatter_has_the_shown_ones():
    generator = np.random.default_rng(0)
    influences, overlaps = generator.normal(size=(2, 5000)).astype(np.float32)
    shown = {4999, 7}
    rows = scatter_rows(5000, shown)
    found = insight(influences, overlaps, shown, {row: f"text {row}" for row in rows})
    assert sum(found.counts) == 5000
    assert len(found.edges) == len(found.counts) + 1
    assert {point.row for point in found.points if point.shown} == shown
    assert found.shown == sorted((float(influences[row]) for row in shown), reverse=True)
    assert found.mean == pytest.approx(float(influences.mean()), abs=1e-6)
    for point in found.points:
        assert point.influence == influences[point.row]
        assert point.overlap == overlaps[point.row]
    alone = insight(influences[:1], None, {0}, {})
    assert (sum(alone.counts), alone.points, alone.correlation) == (1, [], None)


def test_groups_sum_influences_by_value():
    found = groups("source", "TrackStar", [3, 5, 8, 9], [0.5, 0.3, 0.2, -0.1], ["a", "b", "a", ""], {"a": 0.25})
    assert [(g.value, g.candidates) for g in found.groups] == [("a", 2), ("b", 1), ("", 1)]
    assert [g.influence for g in found.groups] == pytest.approx([0.7, 0.3, -0.1])
    assert [g.share for g in found.groups] == pytest.approx([0.7, 0.3, 0.0])
    assert [g.in_corpus for g in found.groups] == [0.25, 0.0, 0.0]


def test_spectra_are_read_from_the_report_beside_the_results(tmp_path: Path):
    path = write_release_file(tmp_path / "r.jsonl", queries=2)
    mixing = {
        "value": 0.25, "rule": "rule", "rank": 7, "evaluation_value": 1.0, "train_value": 0.5, "queries": 9,
        "evaluation_spectrum": [1 / rank for rank in range(1, 4001)], "train_spectrum": [],
    }  # fmt: skip
    (tmp_path / "r.report.json").write_text(json.dumps({"mixing": mixing, "damping": 0.1, "damping_rule": "given"}))
    found = read_result_file(path).mixing
    assert found is not None
    assert (found.value, found.rank, found.train_spectrum) == (0.25, 7, [])
    assert found.evaluation_ranks[0] == 1
    assert found.evaluation_ranks[-1] == 4000
    assert found.evaluation_spectrum == [1 / rank for rank in found.evaluation_ranks]
