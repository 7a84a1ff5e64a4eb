"""Attribution metrics of each query (paper, §5.1): where a ranking has the examples that state the fact."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.errors import OptionError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QueryMetrics:
    """One value of each metric a query; the means over queries are what tables show.

    "Right" are the examples that state the query's fact: gold ones, or those that entail it.

    Attributes:
        reciprocal_rank: 1 / rank of the first right example; 0 where none is ranked. Its mean is the MRR.
        recall: 1 where at least one of the first `at` is right, else 0: recall@k as the paper's release counts it.
        gold_share: Share of a query's right examples that are among the first `at` (recall@k as in information
            retrieval); NaN where it is not known how many are right.
        precision: Share of the first `at` places that hold a right example.
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

    Candidates of equal score rank in the pool's order. A rank is counted, not sorted for: the number of candidates
    with a higher score, or with the same one and an earlier place.

    Args:
        scores: Any ranker's.
        gold: Each query's gold candidates, as places in the pool.
        left_out: Candidates taken out of each query's ranking before it is scored, for they are neither right nor
            wrong; None leaves all in.

    Raises:
        OptionError: A query has no gold candidate, one that is not there or is also left out, or a score is NaN.
    """
    leaving = [()] * len(gold) if left_out is None else left_out
    if not len(scores) == len(gold) == len(leaving):
        raise OptionError(
            f"{len(scores)} rows of scores, gold examples of {len(gold)} queries, examples left out of {len(leaving)}; "
            "expected one each a query"
        )
    ranks: list[list[int]] = []
    for number, (row, right, out) in enumerate(zip(scores, gold, leaving, strict=True)):
        values = row.detach().float().cpu().numpy()
        _check(number, values, right, out)
        removed = np.array(sorted(set(out)), dtype=np.int64)
        ranks.append(sorted(_rank(values, candidate, removed) for candidate in set(right)))
    return ranks


def metrics_of_ranks(ranks: Sequence[Sequence[int]], *, at: int = 10) -> QueryMetrics:
    """Each query's metrics from its gold ranks; see `gold_ranks`.

    Raises:
        OptionError: `at` is below 1, or a query has no rank.
    """
    _check_at(at)
    if bare := [number for number, query in enumerate(ranks) if not query]:
        raise OptionError(f"query {bare[0]}: has no gold example, expected one or more; leave it out")
    among = np.array([sum(rank <= at for rank in query) for query in ranks], dtype=np.float64)
    return QueryMetrics(
        reciprocal_rank=np.array([1 / min(query) for query in ranks], dtype=np.float64),
        recall=(among > 0).astype(np.float64),
        gold_share=among / np.array([len(query) for query in ranks], dtype=np.float64),
        precision=among / at,
        at=at,
    )


def metrics_of_labels(right: Sequence[Sequence[bool]], *, at: int = 10) -> QueryMetrics:
    """Each query's metrics where only what was retrieved is known to be right or wrong (paper, §6: open set).

    Args:
        right: Whether each retrieved example is right, the best-ranked first; what was not retrieved counts as wrong.
        at: k.

    Raises:
        OptionError: `at` is below 1.
    """
    _check_at(at)
    first = [next((place for place, label in enumerate(query, start=1) if label), None) for query in right]
    among = np.array([sum(bool(label) for label in query[:at]) for query in right], dtype=np.float64)
    return QueryMetrics(
        reciprocal_rank=np.array([1 / place if place else 0.0 for place in first], dtype=np.float64),
        recall=(among > 0).astype(np.float64),
        gold_share=np.full(len(right), np.nan),
        precision=among / at,
        at=at,
    )


def _check(number: int, values: np.ndarray, gold: Collection[int], left_out: Collection[int]) -> None:
    if not gold:
        raise OptionError(f"query {number}: has no gold example, expected one or more; leave it out")
    for candidate in (*gold, *left_out):
        if not 0 <= candidate < len(values):
            raise OptionError(f"query {number}: candidate {candidate} is not among the {len(values)} that were ranked")
    if both := set(gold) & set(left_out):
        raise OptionError(f"query {number}: candidate {min(both)} is gold and left out; expected one or the other")
    if np.isnan(values).any():
        found = int(np.isnan(values).argmax())
        raise OptionError(f"query {number}: the score of candidate {found} is NaN; expected a number")


def _rank(values: np.ndarray, candidate: int, removed: np.ndarray) -> int:
    """1 + how many candidates come before this one, those removed not counted."""
    own = values[candidate]
    before = np.count_nonzero(values > own) + np.count_nonzero(values[:candidate] == own)
    out = values[removed]
    before -= np.count_nonzero((out > own) | ((out == own) & (removed < candidate)))
    return 1 + int(before)


def _check_at(at: int) -> None:
    if at < 1:
        raise OptionError(f"metrics at {at}: expected the number of places to look at, 1 or more")
