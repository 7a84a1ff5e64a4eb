"""Compare methods on the same queries: confidence intervals over queries, and paired tests."""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Float

from trackstar.errors import OptionError, check_at_least

RESAMPLES = 10_000
MOST_FLIPPED_EXACTLY = 14
"""Most differing queries for which all 2^n sign flips are tried; for more, flips are drawn at random."""

_VALUES_AT_ONCE = 2**22
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over queries with its 95% interval.

    Attributes:
        mean: The mean.
        low: Lower end of the interval.
        high: Upper end of the interval.
        queries: Number of queries.
    """

    mean: float
    low: float
    high: float
    queries: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A comparison of two methods on the same queries.

    Attributes:
        difference: Mean over queries of the first method's value minus the second's, with its 95%
            interval.
        p_value: Share of sign flips of the queries' differences whose mean is at least as far from
            0 as the observed one. The test is two-sided; its hypothesis is that the methods are
            exchangeable on every query.
        exact: Whether all sign flips were tried, rather than `RESAMPLES` random ones.
        better: Number of queries on which the first method has the higher value.
        worse: Number of queries on which it has the lower one.
    """

    difference: Estimate
    p_value: float
    exact: bool
    better: int
    worse: int


def estimate(values: Float[np.ndarray, "queries"], *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean over queries, with the 95% percentile interval of the bootstrap over queries.

    Args:
        values: One value per query, such as `QueryMetrics.reciprocal_rank`.
        seed: Seed of the resampling.
        resamples: Number of bootstrap samples.

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
    """Compare two methods on the same queries: paired bootstrap and sign-flip permutation test.

    Args:
        first: One value of a metric per query.
        second: The other method's values, in the same order.
        seed: Seed of the resampling and of the sign flips.
        resamples: Number of bootstrap samples, and of random sign flips unless all are tried.

    Raises:
        OptionError: There is no query, the methods have different numbers of queries, or a value is
            not finite.
    """
    if len(first) != len(second):
        raise OptionError(f"`first`, `second`: expected the same queries, found {len(first)} and {len(second)} values")
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
    """The two-sided p-value of the sum of nonzero differences, and whether it is exact.

    Differences of 0 change no sum, so the caller leaves them out. If sign flips are drawn at
    random, the observed signs count as one of them (Phipson and Smyth 2010), so that p is never 0.
    """
    count = len(differences)
    # A sum counts as far as the observed one if it is nearer to 0 only by rounding.
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
    """Split `total` rows of `width` values into portions of at most `_VALUES_AT_ONCE` values."""
    rows = max(1, _VALUES_AT_ONCE // width)
    return [min(rows, total - first) for first in range(0, total, rows)]


def _check(values: np.ndarray, resamples: int) -> None:
    if not len(values):
        raise OptionError("`values`: expected at least one query, found none")
    if not np.isfinite(values).all():
        query = int(np.flatnonzero(~np.isfinite(values))[0])
        raise OptionError(f"`values`: expected finite numbers, found {values[query]} for query {query}")
    check_at_least("resamples", resamples)
