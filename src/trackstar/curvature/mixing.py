"""R = λ R_eval + (1-λ) R_train, and λ by the paper's rule (Eq. 3, §4.3)."""

import dataclasses
from collections.abc import Iterable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.errors import CurvatureError, OptionError

# The paper equates the 1000th singular values of 65,536 (§4.3); for fewer dimensions the rank is scaled.
PAPER_RANK, PAPER_DIMENSIONS = 1000, 65_536

# Eigenvalues below this fraction of the largest are rounding noise of single precision, not spectrum.
RANK_TOLERANCE = 1e-6

# Fewer queries than this cannot say what a task has in common: R is then R_train alone (λ = 0).
MIN_TASK_QUERIES = 8


def mixed(
    evaluation: Float[Tensor, "blocks dim dim"], train: Float[Tensor, "blocks dim dim"], mixing: float
) -> Float[Tensor, "blocks dim dim"]:
    """R = λ R_eval + (1-λ) R_train (Eq. 3).

    Raises:
        OptionError: λ is not in [0, 1].
    """
    if not 0 <= mixing <= 1:
        raise OptionError(f"--mixing {mixing}: expected a number from 0 (only R_train) to 1 (only R_eval)")
    return torch.lerp(train, evaluation, mixing)


def spectrum_of_autocorrelation(
    autocorrelation: Iterable[Float[Tensor, "dim dim"]],
) -> Float[Tensor, "eigenvalues"]:
    """All blocks' eigenvalues pooled, largest first, in float64.

    Raises:
        CurvatureError: A number is not finite.
    """
    values = torch.cat([_eigenvalues(block.double()) for block in autocorrelation])
    return values.clamp_min(0).sort(descending=True).values


def spectrum_of_examples(
    projected_gradients: Float[Tensor, "examples dimensions"], blocks: int
) -> Float[Tensor, "eigenvalues"]:
    """The same from φ itself, by the examples' Gram matrices: cheaper where they are fewer than a block's dimensions.

    The eigenvalues of ΦᵀΦ/n that are not zero are those of ΦΦᵀ/n.

    Raises:
        CurvatureError: A number is not finite.
    """
    count = len(projected_gradients)
    phi = projected_gradients.double().reshape(count, blocks, -1).transpose(0, 1)
    values = torch.cat([_eigenvalues(block @ block.mT / count) for block in phi])
    return values.clamp_min(0).sort(descending=True).values


def _eigenvalues(block: Float64[Tensor, "dim dim"]) -> Float64[Tensor, "dim"]:
    if not torch.isfinite(block).all():
        raise CurvatureError(
            "spectrum: found numbers that are not finite, expected gradients that are; is the index damaged "
            "(trackstar verify)?"
        )
    return torch.linalg.eigvalsh(block)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """λ and how it was found.

    Attributes:
        value: λ.
        rule: In words, which rule gave it.
        rank: The rank at which the two spectra cross, from 1; 0 where the rule was not applied.
        evaluation_value: That singular value of R_eval, before weighing.
        train_value: That singular value of R_train, before weighing.
        evaluation_rank: Pooled numerical rank of R_eval.
        train_rank: Pooled numerical rank of R_train.
        queries: How many queries R_eval is the mean of.
        evaluation_spectrum: R_eval's largest singular values, descending.
        train_spectrum: R_train's largest singular values, descending.
    """

    value: float
    rule: str
    rank: int = 0
    evaluation_value: float | None = None
    train_value: float | None = None
    evaluation_rank: int | None = None
    train_rank: int | None = None
    queries: int = 0
    evaluation_spectrum: tuple[float, ...] = ()
    train_spectrum: tuple[float, ...] = ()


def mixing_by_spectra(
    evaluation: Float[Tensor, "values"],
    train: Float[Tensor, "train_values"],
    *,
    dimensions: int,
    queries: int,
) -> Mixing:
    """λ by the paper's rule (§4.3): at rank k, the singular values of λR_eval and (1-λ)R_train are equal.

    k = 1000 at 65,536 dimensions and in proportion at fewer. R_eval has no more singular values above rounding than
    blocks × queries, and so may R_train; where one of them has fewer than 2k, k is lowered to half of the smaller
    number: a singular value near the end of a rank-deficient spectrum says how many queries there were, not what
    the task needs.

    Args:
        evaluation: R_eval's singular values, all blocks pooled, descending.
        train: R_train's.
        dimensions: Dimensions of φ.
        queries: Number of queries in R_eval.
    """
    ranks = [int((values > RANK_TOLERANCE * values[0]).sum()) if len(values) else 0 for values in (evaluation, train)]
    wanted = max(1, round(PAPER_RANK * dimensions / PAPER_DIMENSIONS))
    rank = min(wanted, max(1, min(ranks) // 2))
    shown = {
        "evaluation_rank": ranks[0],
        "train_rank": ranks[1],
        "queries": queries,
        "evaluation_spectrum": _thinned(evaluation),
        "train_spectrum": _thinned(train),
    }
    if min(ranks) == 0:
        raise CurvatureError(
            "λ: found a spectrum that is zero throughout, expected gradients that are not; give --mixing"
        )
    rule = f"singular values equal at rank {rank} of {dimensions} dimensions"
    if rank < wanted:
        rule += f" (the paper's rank {wanted} lowered to half of the smaller spectrum's {min(ranks)})"
    evaluation_value, train_value = float(evaluation[rank - 1]), float(train[rank - 1])
    return Mixing(
        value=train_value / (evaluation_value + train_value),
        rule=rule,
        rank=rank,
        evaluation_value=evaluation_value,
        train_value=train_value,
        **shown,
    )


def _thinned(values: Tensor, most: int = 4096) -> tuple[float, ...]:
    return tuple(float(value) for value in values[:most])
