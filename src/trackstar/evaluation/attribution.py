"""Attribution metrics (paper, §5.1): does a method rank the examples that state a fact above the others?"""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from trackstar.errors import OptionError

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attribution:
    """Means over queries, with 95% bootstrap intervals over queries.

    Attributes:
        mrr: Mean reciprocal rank of each query's best-ranked gold example.
        mrr_interval: Its interval.
        recall: Mean share of a query's gold examples among the top `at`.
        recall_interval: Its interval.
        at: How many candidates recall looks at.
        queries: How many queries.
    """

    mrr: float
    mrr_interval: tuple[float, float]
    recall: float
    recall_interval: tuple[float, float]
    at: int
    queries: int


def gold_ranks(scores: Float[Tensor, "queries candidates"], gold: Sequence[Collection[int]]) -> list[list[int]]:
    """Ranks, from 1 and ascending, of each query's gold candidates by descending score.

    Candidates of equal score rank in the index's order.

    Raises:
        OptionError: A query has no gold candidate.
    """
    ranks: list[list[int]] = []
    for number, (row, rows) in enumerate(zip(scores, gold, strict=True)):
        if not rows:
            raise OptionError(f"query {number}: has no gold example, expected one or more; leave it out")
        order = row.sort(descending=True, stable=True).indices
        place = np.empty(len(order), dtype=np.int64)
        place[order.numpy()] = np.arange(1, len(order) + 1)
        ranks.append(sorted(int(place[candidate]) for candidate in rows))
    return ranks


def attribution(ranks: Sequence[Sequence[int]], *, at: int = 10, seed: int = 0) -> Attribution:
    """MRR and recall@k of gold ranks.

    Args:
        ranks: Each query's gold ranks, ascending; see `gold_ranks`.
        at: k of recall@k.
        seed: Of the bootstrap's resampling.
    """
    reciprocal = np.array([1 / query[0] for query in ranks])
    found = np.array([sum(rank <= at for rank in query) / len(query) for query in ranks])
    return Attribution(
        mrr=float(reciprocal.mean()),
        mrr_interval=bootstrap_interval(reciprocal, seed=seed),
        recall=float(found.mean()),
        recall_interval=bootstrap_interval(found, seed=seed),
        at=at,
        queries=len(ranks),
    )


def bootstrap_interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The 95% percentile interval of the mean over resampled queries."""
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)
