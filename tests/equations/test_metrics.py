"""Metrics of rankings, intervals and paired tests, by hand and by brute force."""

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from trackstar.errors import OptionError
from trackstar.evaluation.comparisons import MOST_FLIPPED_EXACTLY, compare, estimate
from trackstar.evaluation.metrics import gold_ranks, metrics_of_labels, metrics_of_ranks


def raised(run: Callable[[], object]) -> str:
    with pytest.raises(OptionError) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    return message


def sorted_ranks(scores: torch.Tensor, gold: Collection[int], left_out: Collection[int]) -> list[int]:
    """The slow, obvious version: sort the remaining candidates, then look up the gold ones."""
    order = sorted(range(len(scores)), key=lambda candidate: (-float(scores[candidate]), candidate))
    order = [candidate for candidate in order if candidate not in left_out]
    return sorted(1 + order.index(candidate) for candidate in gold)


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.9, -1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert gold_ranks(scores, [[2, 4], [3, 0]]) == [[3, 5], [1, 4]]
    assert gold_ranks(scores, [[2, 4], [3, 0]], left_out=[[1, 0], [1]]) == [[2, 3], [1, 3]]
    assert gold_ranks(scores, [[3], [1]], left_out=[[1], [2, 3]]) == [[1], [2]]
    assert gold_ranks(scores, [[2, 2], [1]], left_out=[[1, 1], [0, 0]]) == [[2], [1]]  # each counts once


def test_ranks_equal_those_of_a_full_sort_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-6, 6, (40, 57), generator=generator).float()
    scores[:3, :5] = torch.tensor([float("inf"), float("-inf"), 0.0, -0.0, 1.0])
    chosen = [torch.randperm(57, generator=generator).tolist() for _ in scores]
    gold = [order[: 1 + number % 5] for number, order in enumerate(chosen)]
    left_out = [order[5 : 5 + number % 9] for number, order in enumerate(chosen)]
    expected = [sorted_ranks(*each) for each in zip(scores, gold, left_out, strict=True)]
    assert gold_ranks(scores, gold, left_out=left_out) == expected
    assert gold_ranks(scores.bfloat16(), gold, left_out=left_out) == expected
    assert gold_ranks(scores, gold) == [sorted_ranks(row, g, ()) for row, g in zip(scores, gold, strict=True)]


@pytest.mark.parametrize(
    ("gold", "left_out", "message"),
    [
        ([[0], []], None, "query 1: has no gold example, expected one or more; leave it out"),
        ([[0], [3]], None, "query 1: candidate 3 is not among the 3 that were ranked"),
        ([[0], [-1]], None, "query 1: candidate -1 is not among the 3 that were ranked"),
        ([[0], [2]], [[], [5]], "query 1: candidate 5 is not among the 3 that were ranked"),
        ([[0], [2]], [[], [1, 2]], "query 1: candidate 2 is gold and left out; expected one or the other"),
        (
            [[0]],
            None,
            "`scores`, `gold`, `left_out`: expected one entry per query in each, found 2, 1, 1",
        ),
        (
            [[0], [2]],
            [[]],
            "`scores`, `gold`, `left_out`: expected one entry per query in each, found 2, 2, 1",
        ),
    ],
)
def test_bad_evidence_is_one_line(gold: list[list[int]], left_out: list[list[int]] | None, message: str) -> None:
    assert raised(lambda: gold_ranks(torch.zeros(2, 3), gold, left_out=left_out)) == message


def test_score_that_is_nan_is_refused() -> None:
    scores = torch.tensor([[1.0, 2.0], [1.0, float("nan")]])
    assert raised(lambda: gold_ranks(scores, [[0], [0]])) == (
        "query 1: the score of candidate 1 is NaN; expected a number"
    )


def test_metrics_by_hand() -> None:
    found = metrics_of_ranks([[1, 2, 11], [4], [12, 40]], at=10)
    assert found.reciprocal_rank.tolist() == [1, 0.25, 1 / 12]
    assert found.recall.tolist() == [1, 1, 0]
    assert found.gold_share.tolist() == [2 / 3, 1, 0]
    assert found.precision.tolist() == [0.2, 0.1, 0]
    at_one = metrics_of_ranks([[1, 2, 11], [4], [12, 40]], at=1)
    assert (at_one.recall.tolist(), at_one.precision.tolist()) == ([1, 0, 0], [1, 0, 0])


def test_metrics_of_labels_by_hand() -> None:
    found = metrics_of_labels([[False, True, True], [False, False, False, True], [], [False]], at=3)
    assert found.reciprocal_rank.tolist() == [0.5, 0.25, 0, 0]
    assert found.recall.tolist() == [1, 0, 0, 0]
    assert found.precision.tolist() == [2 / 3, 0, 0, 0]
    assert np.isnan(found.gold_share).all()


def test_metrics_without_ranks_or_below_one_are_refused() -> None:
    assert raised(lambda: metrics_of_ranks([[1]], at=0)) == "`at`: expected 1 or more, found 0"
    assert raised(lambda: metrics_of_labels([[True]], at=-1)) == "`at`: expected 1 or more, found -1"
    assert raised(lambda: metrics_of_ranks([[1], []])).startswith("query 1: has no gold example, ")


# Intervals and paired tests


def test_interval_of_two_queries_covers_all_their_resamples() -> None:
    # Means 0, ½ and 1 with probabilities ¼, ½ and ¼: the percentiles 2.5 and 97.5 are 0 and 1.
    found = estimate(np.array([0.0, 1.0]))
    assert (found.mean, found.low, found.high, found.queries) == (0.5, 0.0, 1.0, 2)
    same = estimate(np.full(5, 0.25))
    assert (same.mean, same.low, same.high) == (0.25, 0.25, 0.25)


def test_interval_of_many_queries_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(2.0, 3.0, size=4000)
    found = estimate(values, seed=3)
    half = 1.96 * values.std() / np.sqrt(4000)
    np.testing.assert_allclose([found.low, found.high], [values.mean() - half, values.mean() + half], atol=0.1 * half)
    assert estimate(values, seed=3) == found
    assert estimate(values, seed=4) != found


@pytest.mark.parametrize(
    ("first", "second", "p_value"),
    [
        ([1, 1, 1, 1], [0, 0, 0, 0], 2 / 16),  # only all + and all - are as far from 0
        ([3, 1], [0, 0], 2 / 4),  # sums 4, 2, -2, -4
        ([1, 0], [0, 1], 4 / 4),  # the observed sum is 0, and all are as far
        ([5, 2, 1], [1, 3, 1], 4 / 4),  # differences 4, -1, 0: sums 3, 5, -5, -3, all at least 3
        ([4, 1, 2], [0, 0, 0], 2 / 8),  # 7 and -7 alone
        ([4, 1, 0], [0, 0, 2], 6 / 8),  # differences 4, 1, -2: of ±7, ±5, ±3, ±1 all but ±1 are as far as 3
        ([0.5], [0.5], 1.0),
        ([0.3, 0.1, 0.2], [0.0, 0.0, 0.6], 8 / 8),  # 0.3 + 0.1 - 0.4, 0 but for rounding
    ],
)
def test_sign_flips_of_few_queries_are_exact(first: list[float], second: list[float], p_value: float) -> None:
    found = compare(np.array(first, dtype=np.float64), np.array(second, dtype=np.float64))
    assert found.p_value == p_value
    assert found.exact


def test_random_sign_flips_approximate_all_of_them() -> None:
    generator = np.random.default_rng(0)
    differences = generator.normal(0.5, 1.0, size=MOST_FLIPPED_EXACTLY + 2)
    signs = np.array(list(itertools.product((1, -1), repeat=len(differences))))
    exact = np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9)
    found = compare(differences, np.zeros(len(differences)), resamples=20_000)
    assert not found.exact
    assert 0.01 < exact < 0.5
    assert abs(found.p_value - exact) < 4 * np.sqrt(exact * (1 - exact) / 20_000)


def test_comparison_is_paired_and_does_not_depend_on_order() -> None:
    generator = np.random.default_rng(0)
    second = generator.uniform(size=300)
    first = second + 0.01 + 0.02 * generator.normal(size=300)  # far smaller than the spread over queries
    found = compare(first, second)
    assert found.p_value == 1 / 10_001
    assert found.difference.low > 0
    assert found.difference.mean == pytest.approx(float((first - second).mean()))
    assert (found.better + found.worse, found.difference.queries) == (300, 300)
    assert found.better == int((first > second).sum())
    assert compare(first, second) == found
    backwards = compare(second, first)
    assert backwards.p_value == found.p_value
    assert backwards.difference.high == pytest.approx(-found.difference.low)


def test_comparison_of_methods_that_do_not_differ_finds_nothing() -> None:
    values = np.random.default_rng(0).uniform(size=100)
    found = compare(values, values)
    assert (found.p_value, found.exact, found.better, found.worse) == (1.0, True, 0, 0)
    assert (found.difference.mean, found.difference.low, found.difference.high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "`values`: expected at least one query, found none"),
        ([0.0, float("nan")], {}, "`values`: expected finite numbers, found nan for query 1"),
        ([0.0], {"resamples": 0}, "`resamples`: expected 1 or more, found 0"),
    ],
)
def test_values_without_a_mean_are_refused(values: Sequence[float], options: dict[str, Any], message: str) -> None:
    assert raised(lambda: estimate(np.array(values, dtype=np.float64), **options)) == message
    assert raised(lambda: compare(np.zeros(len(values)), np.array(values, dtype=np.float64), **options)) == message
