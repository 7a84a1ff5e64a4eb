"""Results of a tail-patch measurement: pairs, probabilities before and after, and averages (paper, §5.2).

effect(q, m) = p(completion of q | θ after one step on m) - p(completion of q | θ)
average      = mean over queries of the mean over the query's top k proponents
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from trackstar.errors import OptionError, check_at_least


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A query and one of its proponents.

    Attributes:
        query: Index of the query in the sequence of queries.
        proponent: Index of the proponent in the sequence of proponents; several queries may share one.
    """

    query: int
    proponent: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TailPatch:
    """The effect of one training step on a proponent on a query's completion, pair by pair.

    Attributes:
        pairs: The measured pairs.
        before: p(completion | prompt) before the step, the product over the completion's tokens.
        after: p(completion | prompt) after one training step on the pair's proponent.
        step: Description of the step: `TrainingStep.description`.
    """

    pairs: tuple[Pair, ...]
    before: Float64[np.ndarray, "pairs"]
    after: Float64[np.ndarray, "pairs"]
    step: str

    @property
    def effect(self) -> Float64[np.ndarray, "pairs"]:
        """`after - before`: a difference of probabilities, as a fraction."""
        return self.after - self.before


def top_effects(result: TailPatch, k: int) -> Float64[np.ndarray, "queries"]:
    """Each query's mean effect over its top k proponents, a fraction (paper, §5.2).

    Args:
        result: The measurement, with a query's pairs in descending order of their proponents' influence.
        k: Number of a query's first pairs to average over (1, 3, 5 and 10 in the paper).

    Returns:
        One mean per query, in the order in which the queries first appear among the pairs.

    Raises:
        OptionError: k is not positive, there is no pair, or a query has fewer than k.
    """
    check_at_least("k", k)
    by_query: dict[int, list[int]] = {}  # query to the indices of its pairs
    for number, pair in enumerate(result.pairs):
        by_query.setdefault(pair.query, []).append(number)
    if not by_query:
        raise OptionError("tail-patch: found no pair to average over, expected one or more")
    for query, numbers in by_query.items():
        if len(numbers) < k:
            raise OptionError(
                f"`k`: expected at most {len(numbers)}, the number of proponents measured for query {query}, found "
                f"{k}; average over fewer, or measure more"
            )
    effect = result.effect
    return np.array([effect[numbers[:k]].mean() for numbers in by_query.values()])


def mean_top_effect(result: TailPatch, k: int) -> float:
    """The paper's tail-patch score: the mean of `top_effects` over queries, a fraction; errors as there."""
    return float(top_effects(result, k).mean())


def by_proponent(pairs: Sequence[Pair]) -> dict[int, list[int]]:
    """Indices of each proponent's pairs; proponents are in the order in which they first appear."""
    numbers: dict[int, list[int]] = {}
    for number, pair in enumerate(pairs):
        numbers.setdefault(pair.proponent, []).append(number)
    return numbers
