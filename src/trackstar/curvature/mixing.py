"""Mixing: R = λ R_eval + (1-λ)(R_train + cI), and λ by the paper's rule (Eq. 3, §4.3).

The ridge c is a fraction of R_train's mean eigenvalue. It belongs to R_train alone, since R_train
is what too few examples leave singular, and since an index in whitened coordinates is whitened by
R_train + cI before any task is known.
"""

import dataclasses
from collections.abc import Iterable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.errors import CurvatureError, check_mixing

# The paper equates the 1000th of 65,536 singular values (§4.3). For fewer dimensions the rank is
# scaled.
PAPER_RANK, PAPER_DIMENSIONS = 1000, 65_536

# Eigenvalues below this fraction of the largest one are rounding noise of single precision.
RANK_TOLERANCE = 1e-6

# Fewer queries than this do not show what a task has in common, and R is R_train alone (λ = 0).
MIN_TASK_QUERIES = 8


def mixed(
    evaluation: Float[Tensor, "dim dim"] | None, train: Float[Tensor, "dim dim"], mixing: float, *, damping: float = 0.0
) -> Float64[Tensor, "dim dim"]:
    """R = λ R_eval + (1-λ)(R_train + cI) of one layer block, in float64 (Eq. 3).

    Args:
        evaluation: R_eval; None only if λ is 0.
        train: R_train.
        mixing: λ.
        damping: c as a fraction of R_train's mean eigenvalue.

    Raises:
        OptionError: λ is not in [0, 1].
    """
    check_mixing(mixing)
    r = train.to(torch.float64, copy=True)
    r.diagonal().add_(damping * float(r.diagonal().mean()))
    if mixing == 0:
        return r
    assert evaluation is not None, "λ above 0 mixes in R_eval"
    return torch.lerp(r, evaluation.double(), mixing)


def spectrum_of_autocorrelation(
    autocorrelation: Iterable[Float[Tensor, "dim dim"]],
) -> Float[Tensor, "eigenvalues"]:
    """Eigenvalues of all blocks, pooled and sorted from the largest, in float64.

    Raises:
        CurvatureError: An entry is not finite.
    """
    values = torch.cat([_eigenvalues(block.double()) for block in autocorrelation])
    return values.clamp_min(0).sort(descending=True).values


def spectrum_of_examples(
    projected_gradients: Float[Tensor, "examples dimensions"], blocks: int
) -> Float[Tensor, "eigenvalues"]:
    """`spectrum_of_autocorrelation` of the φ's R, computed from their Gram matrices.

    The nonzero eigenvalues of ΦᵀΦ/n are those of ΦΦᵀ/n, which is smaller for fewer examples than
    dimensions.

    Raises:
        CurvatureError: An entry is not finite.
    """
    count = len(projected_gradients)
    phi = projected_gradients.double().reshape(count, blocks, -1).transpose(0, 1)
    values = torch.cat([_eigenvalues(block @ block.mT / count) for block in phi])
    return values.clamp_min(0).sort(descending=True).values


def _eigenvalues(block: Float64[Tensor, "dim dim"]) -> Float64[Tensor, "dim"]:
    if not torch.isfinite(block).all():
        raise CurvatureError(
            "spectrum: expected finite gradients, found NaN or infinite ones; check the index with `verify`"
        )
    return torch.linalg.eigvalsh(block)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """λ and its derivation.

    Attributes:
        value: λ.
        rule: The rule that gave λ, in words.
        rank: Rank, from 1, at which the weighted spectra are equal; 0 if λ does not come from
            spectra.
        evaluation_value: R_eval's singular value at that rank, unweighted.
        train_value: R_train's singular value at that rank, unweighted.
        evaluation_rank: Pooled numerical rank of R_eval.
        train_rank: Pooled numerical rank of R_train.
        queries: Number of queries that R_eval is the mean of.
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
    """λ by the paper's rule (§4.3): the k-th singular values of λR_eval and (1-λ)R_train are equal.

    k is 1000 for 65,536 dimensions and proportional for fewer. R_eval has at most blocks × queries
    singular values above rounding, and R_train at most blocks × examples. If either has fewer than
    2k, k is half of the smaller number: near the end of a rank-deficient spectrum a singular value
    depends on the number of queries, not on the task.

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
            "`mixing`: the spectrum of R_eval or of R_train is zero, so the paper's rule gives no λ; pass `mixing`"
        )
    rule = f"the paper's rule: λ R_eval and (1-λ) R_train are equally strong at rank {rank:,} of {dimensions:,}"
    if rank < wanted:
        rule += f", lowered from rank {wanted:,} to half of the smaller spectrum's {min(ranks):,}"
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
