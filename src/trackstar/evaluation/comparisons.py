"""Is one method better than another? Intervals over queries, and paired tests over the same queries."""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float

from trackstar.errors import OptionError

RESAMPLES = 10_000
MOST_FLIPPED_EXACTLY = 14
"""Most differing queries for which all 2^n flips of sign are tried; above it, random ones."""

_VALUES_AT_ONCE = 2**22
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over queries with its 95% interval.

    Attributes:
        mean: Over the queries.
        low: The interval's lower end.
        high: Its upper end.
        queries: How many.
    """

    mean: float
    low: float
    high: float
    queries: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The first method against the second, over the same queries.

    Attributes:
        difference: Mean over queries of the first's value minus the second's, with its 95% interval.
        p_value: How often flipping the signs of queries' differences at random gives a mean at least as far from 0:
            two-sided, for the hypothesis that the two methods are exchangeable on every query.
        exact: Whether all flips were tried, rather than `RESAMPLES` random ones.
        better: Queries on which the first has the higher value.
        worse: Queries on which it has the lower one.
    """

    difference: Estimate
    p_value: float
    exact: bool
    better: int
    worse: int


def estimate(values: Float[np.ndarray, "queries"], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """The mean of one value a query, with the 95% percentile interval of its bootstrap over queries.

    Args:
        values: One a query, such as `QueryMetrics.reciprocal_rank`.
        seed: Of the resampling.
        resamples: How many times as many queries are drawn with replacement.

    Raises:
        OptionError: There is no query, or a value is not finite.
    """
    _check(values, resamples)
    generator = np.random.default_rng(seed)
    count = len(values)
    means = [
        values[generator.integers(count, size=(draws, count))].mean(axis=1) for draws in _portions(resamples, count)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Estimate(mean=float(values.mean()), low=float(low), high=float(high), queries=count)


def compare(
    first: Float[np.ndarray, "queries"],
    second: Float[np.ndarray, "queries"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Two methods' values of one metric on the same queries: paired bootstrap and sign-flip permutation test.

    Args:
        first: One value a query.
        second: The other method's, in the same order.
        seed: Of the resampling and the flips.
        resamples: Bootstrap resamples, and random flips where not all are tried.

    Raises:
        OptionError: There is no query, the two have not as many, or a value is not finite.
    """
    if len(first) != len(second):
        raise OptionError(f"values of {len(first)} and of {len(second)} queries; expected the same queries for both")
    _check(first, resamples)
    _check(second, resamples)
    differences = first.astype(np.float64) - second.astype(np.float64)
    p_value, exact = _sign_flips(differences[differences != 0], seed, resamples)
    return Comparison(
        difference=estimate(differences, seed=seed, resamples=resamples),
        p_value=p_value,
        exact=exact,
        better=int(np.count_nonzero(differences > 0)),
        worse=int(np.count_nonzero(differences < 0)),
    )


def _sign_flips(differences: np.ndarray, seed: int, resamples: int) -> tuple[float, bool]:
    """The two-sided p-value of the sum of differences, none of which is 0, and whether it is exact.

    Differences of 0 change no sum, so that leaving them out changes nothing. Where flips are drawn at random, the
    observed signs count as one of them (Phipson and Smyth 2010): p is never 0.
    """
    count = len(differences)
    bound = abs(differences.sum()) - _ROUNDING * np.abs(differences).sum()
    if count <= MOST_FLIPPED_EXACTLY:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=count))).reshape(2**count, count)
        return float(np.mean(np.abs(signs @ differences) >= bound)), True
    generator = np.random.default_rng(seed)
    as_far = 0
    for draws in _portions(resamples, count):
        signs = generator.integers(2, size=(draws, count), dtype=np.int8)
        as_far += int(np.count_nonzero(np.abs((2.0 * signs - 1) @ differences) >= bound))
    return (1 + as_far) / (1 + resamples), False


def _portions(total: int, width: int) -> list[int]:
    """`total` rows in portions of at most `_VALUES_AT_ONCE` values."""
    rows = max(1, _VALUES_AT_ONCE // width)
    return [min(rows, total - first) for first in range(0, total, rows)]


def _check(values: np.ndarray, resamples: int) -> None:
    if not len(values):
        raise OptionError("a mean over no query; expected at least one")
    if not np.isfinite(values).all():
        found = int(np.flatnonzero(~np.isfinite(values))[0])
        raise OptionError(f"query {found}: its value is {values[found]}; expected a finite number")
    if resamples < 1:
        raise OptionError(f"{resamples} resamples; expected at least 1")
