"""Two tests of a score, each a share of pairs of training images that it orders rightly."""

import dataclasses

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

RESAMPLES = 2_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Accuracies:
    """Both tests of one score, per query.

    Attributes:
        same_class: Share of the pairs of a training image of the query's class and one of another class
            in which the first has the larger score; a tie is half.
        right_label: Share of the training images of the query's class whose score is larger with their
            right label than with a wrong one.
    """

    same_class: Float64[np.ndarray, "queries"]
    right_label: Float64[np.ndarray, "queries"]

    @classmethod
    def of(
        cls,
        right: Float[Tensor, "queries train"],
        wrong: Float[Tensor, "queries train"],
        same: Bool[Tensor, "queries train"],
    ) -> "Accuracies":
        """Both tests.

        Args:
            right: Scores of the training images with their labels.
            wrong: Scores of the same images with a wrong label each.
            same: Whether a training image has the query's class.
        """
        pairs = [_share_above(scores[of], scores[~of]) for scores, of in zip(right, same, strict=True)]
        beaten = (right > wrong).double() + 0.5 * (right == wrong)
        labels = [beats[of].mean() for beats, of in zip(beaten, same, strict=True)]
        return cls(same_class=np.array(pairs, dtype=np.float64), right_label=np.array(labels, dtype=np.float64))


def _share_above(first: Float[Tensor, "first"], second: Float[Tensor, "second"]) -> float:
    """Share of the pairs in which the first is larger (the area under the ROC curve)."""
    ascending = second.sort().values
    below = torch.searchsorted(ascending, first, right=False) + torch.searchsorted(ascending, first, right=True)
    return float(below.double().mean()) / (2 * len(second))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float


def interval(values: Float64[np.ndarray, "seeds queries"]) -> Interval:
    """The mean over seeds and queries; the bootstrap's interval draws seeds, and queries of each.

    A seed decides the network, the images and the projections, so that its queries are not independent.
    """
    seeds, queries = values.shape
    generator = np.random.default_rng(0)
    chosen = generator.integers(seeds, size=(RESAMPLES, seeds))
    means = np.zeros(RESAMPLES)
    for column in chosen.T:
        drawn = generator.integers(queries, size=(RESAMPLES, queries))
        means += values[column[:, None], drawn].mean(axis=1) / seeds
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high))
