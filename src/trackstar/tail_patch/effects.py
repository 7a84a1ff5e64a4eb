"""What a tail-patch measurement is, as data: pairs, probabilities before and after, and their averages (paper, §5.2).

effect(q, m) = p(completion of q | θ after one step on m) - p(completion of q | θ)
average      = mean over queries of the mean over the query's top k proponents
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from trackstar.errors import OptionError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A query and one of its proponents.

    Attributes:
        query: The query's place in the sequence of queries.
        proponent: The proponent's place in the sequence of proponents; several queries may share one.
    """

    query: int
    proponent: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TailPatch:
    """What one training step on a proponent did to a query's completion, pair by pair.

    Attributes:
        pairs: What was measured.
        before: p(completion | prompt) under the model as it is, the product over the completion's tokens.
        after: The same after one training step on the pair's proponent.
        step: What the step was, for people: `TrainingStep.description`.
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
        result: The measurement; a query's pairs stand in it from the best proponent on.
        k: How many of a query's first pairs count (1, 3, 5 and 10 in the paper).

    Returns:
        One mean a query, in the order in which the queries first appear among the pairs.

    Raises:
        OptionError: k is not positive, there is no pair, or a query has fewer than k.
    """
    if k < 1:
        raise OptionError(f"tail-patch: found k = {k}, expected 1 or more proponents to average over")
    places: dict[int, list[int]] = {}
    for place, pair in enumerate(result.pairs):
        places.setdefault(pair.query, []).append(place)
    if not places:
        raise OptionError("tail-patch: found no pair to average over, expected one or more")
    _refuse_short(places, k)
    effect = result.effect
    return np.array([effect[of_query[:k]].mean() for of_query in places.values()])


def mean_top_effect(result: TailPatch, k: int) -> float:
    """The paper's tail-patch score: the mean over queries of `top_effects`, as a fraction; errors as there."""
    return float(top_effects(result, k).mean())


def _refuse_short(places: dict[int, list[int]], k: int) -> None:
    for query, of_query in places.items():
        if len(of_query) < k:
            raise OptionError(
                f"tail-patch: query {query} was measured with {len(of_query)} proponents, expected at least k = {k}; "
                "average over fewer, or measure more"
            )


def by_proponent(pairs: Sequence[Pair]) -> dict[int, list[int]]:
    """Places of each proponent's pairs, proponents in the order in which they first appear."""
    places: dict[int, list[int]] = {}
    for place, pair in enumerate(pairs):
        places.setdefault(pair.proponent, []).append(place)
    return places
