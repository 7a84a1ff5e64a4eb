"""Attribution metrics per query: the ranks of the examples that state its fact (paper, §5.1)."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.errors import OptionError, check_at_least


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QueryMetrics:
    """One value of each metric per query; tables show the means over queries.

    Correct examples are those that state the query's fact: gold examples, or examples that entail
    it.

    Attributes:
        reciprocal_rank: 1 / rank of the first correct example; 0 if none is ranked. Its mean is the
            MRR.
        recall: 1 if at least one of the first k is correct, else 0: recall@k as the paper's release
            counts it.
        gold_share: Share of a query's correct examples among the first k (recall@k in information
            retrieval); NaN if the number of correct examples is unknown.
        precision: Share of the first k ranks that hold a correct example.
        at: k.
    """

    reciprocal_rank: Float64[np.ndarray, "queries"]
    recall: Float64[np.ndarray, "queries"]
    gold_share: Float64[np.ndarray, "queries"]
    precision: Float64[np.ndarray, "queries"]
    at: int


def gold_ranks(
    scores: Float[Tensor, "queries candidates"],
    gold: Sequence[Collection[int]],
    *,
    left_out: Sequence[Collection[int]] | None = None,
) -> list[list[int]]:
    """Ranks, from 1 and ascending, of each query's gold candidates by descending score.

    Candidates with equal scores rank in the pool's order. Ranks are counted without sorting: 1 +
    the number of candidates with a higher score, or with the same score and an earlier row.

    Args:
        scores: Scores of any method.
        gold: Rows of each query's gold candidates.
        left_out: Rows of candidates that are removed from each query's ranking, because they are
            neither correct nor wrong; None removes none.

    Raises:
        OptionError: A query has no gold candidate, a row does not exist or is both gold and left
            out, or a score is NaN.
    """
    removed_of = [()] * len(gold) if left_out is None else left_out
    if not len(scores) == len(gold) == len(removed_of):
        raise OptionError(
            f"`scores`, `gold`, `left_out`: expected one entry per query in each, found {len(scores)}, {len(gold)}, "
            f"{len(removed_of)}"
        )
    ranks: list[list[int]] = []
    for query, (row, correct, out) in enumerate(zip(scores, gold, removed_of, strict=True)):
        values = row.detach().float().cpu().numpy()  # (candidates,)
        _check(query, values, correct, out)
        removed = np.array(sorted(set(out)), dtype=np.int64)
        ranks.append(sorted(_rank(values, candidate, removed) for candidate in set(correct)))
    return ranks


def metrics_of_ranks(ranks: Sequence[Sequence[int]], *, at: int = 10) -> QueryMetrics:
    """Metrics from the gold ranks of each query; see `gold_ranks`.

    Raises:
        OptionError: `at` is below 1, or a query has no rank.
    """
    check_at_least("at", at)
    if without_ranks := [query for query, query_ranks in enumerate(ranks) if not query_ranks]:
        raise OptionError(f"query {without_ranks[0]}: has no gold example, expected one or more; leave it out")
    among_first = np.array([sum(rank <= at for rank in query_ranks) for query_ranks in ranks], dtype=np.float64)
    return QueryMetrics(
        reciprocal_rank=np.array([1 / min(query_ranks) for query_ranks in ranks], dtype=np.float64),
        recall=(among_first > 0).astype(np.float64),
        gold_share=among_first / np.array([len(query_ranks) for query_ranks in ranks], dtype=np.float64),
        precision=among_first / at,
        at=at,
    )


def metrics_of_labels(correct: Sequence[Sequence[bool]], *, at: int = 10) -> QueryMetrics:
    """Metrics if only retrieved examples have been judged (paper, §6: open set).

    Args:
        correct: Whether each retrieved example is correct, the best-ranked first; others count as
            wrong.
        at: k.

    Raises:
        OptionError: `at` is below 1.
    """
    check_at_least("at", at)
    first = [next((rank for rank, label in enumerate(labels, start=1) if label), None) for labels in correct]
    among_first = np.array([sum(bool(label) for label in labels[:at]) for labels in correct], dtype=np.float64)
    return QueryMetrics(
        reciprocal_rank=np.array([1 / rank if rank else 0.0 for rank in first], dtype=np.float64),
        recall=(among_first > 0).astype(np.float64),
        gold_share=np.full(len(correct), np.nan),
        precision=among_first / at,
        at=at,
    )


def _check(query: int, values: np.ndarray, gold: Collection[int], left_out: Collection[int]) -> None:
    if not gold:
        raise OptionError(f"query {query}: has no gold example, expected one or more; leave it out")
    for candidate in (*gold, *left_out):
        if not 0 <= candidate < len(values):
            raise OptionError(f"query {query}: candidate {candidate} is not among the {len(values)} that were ranked")
    if both := set(gold) & set(left_out):
        raise OptionError(f"query {query}: candidate {min(both)} is gold and left out; expected one or the other")
    if np.isnan(values).any():
        candidate = int(np.isnan(values).argmax())
        raise OptionError(f"query {query}: the score of candidate {candidate} is NaN; expected a number")


def _rank(values: np.ndarray, candidate: int, removed: np.ndarray) -> int:
    """1 + the number of candidates before this one, removed ones not counted."""
    score = values[candidate]
    before = np.count_nonzero(values > score) + np.count_nonzero(values[:candidate] == score)
    out = values[removed]
    before -= np.count_nonzero((out > score) | ((out == score) & (removed < candidate)))
    return 1 + int(before)
