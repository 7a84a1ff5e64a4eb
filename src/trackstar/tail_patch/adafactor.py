"""Adafactor's next step on one example, from the gradient's factors (Shazeer and Stern 2018, Alg. 4-5).

For a matrix, with G = Σ_t l_t r_tᵀ of shape n×m (l and r in the order in which the parameter is
stored) and S tokens:

    R  ← β̂₂ R + (1-β̂₂) (1/m Σ_j G_ij² + ε₁)       Σ_j G_ij² = Σ_{t,t'} l_ti (r_t·r_t') l_t'i          [n]
    C  ← β̂₂ C + (1-β̂₂) (1/n Σ_i G_ij² + ε₁)       Σ_i G_ij² = Σ_{t,t'} r_tj (l_t·l_t') r_t'j          [m]
    V  = R Cᵀ/mean(R)
    U  = G/√V  = diag(√(mean(R)/R)) G diag(√(1/C)) = Σ_t (l_t∘√(mean(R)/R)) (r_t∘√(1/C))ᵀ = Σ_t l̂_t r̂_tᵀ
    ΔW = -α U / max(1, RMS(U)/d)                   ‖U‖² = Σ_{t,t'} (l̂_t·l̂_t') (r̂_t·r̂_t')

with β̂₂ = 1 - step^(-0.8) for the number of the step that is made, and α = η max(ε₂, RMS(W)). The
rescaling by rank-one factors leaves the rank unchanged, so ΔW has rank at most S and needs no n×m
matrix.

For a vector, V is not factored: V ← β̂₂ V + (1-β̂₂)(g² + ε₁), U = g/√V. The formulas are those of
`transformers.optimization.Adafactor`, in which R and C are means instead of the paper's sums.
"""

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.optimization import Adafactor

from trackstar.errors import OptionError
from trackstar.tail_patch.step import TrainingStep

_ADVICE = 'the fast tail-patch supports only Adafactor\'s factored update; use the exact path, `path="exact"`'


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParameterStep:
    """The quantities besides the gradient that determine the next step of one parameter.

    Attributes:
        decay: β̂₂ of the step.
        epsilon: ε₁, in squared units of the gradient.
        clip: d, the bound on the update's root mean square.
        rate: α; with d = 1, the root mean square of a clipped step.
        moments: R and C of a matrix, or V of a vector, before the step.
    """

    decay: float
    epsilon: float
    clip: float
    rate: float
    moments: tuple[Tensor, ...]

    def updated(self, moment: int, squares: Float[Tensor, "*batch size"]) -> Float[Tensor, "*batch size"]:
        """R, C or V after the step.

        Args:
            moment: Index of the moment in `moments`.
            squares: Mean squares of each example's gradient.
        """
        return self.moments[moment] * self.decay + (squares + self.epsilon) * (1.0 - self.decay)

    def factor(self, squared_norm: Float[Tensor, "*batch"], entries: int) -> Float[Tensor, "*batch"]:
        """-α/max(1, RMS(U)/d), given ‖U‖² and the number of U's entries."""
        root = (squared_norm.clamp_min(0) / entries).sqrt()
        return -self.rate / (root / self.clip).clamp_min(1.0)


@torch.no_grad()
def parameter_steps(step: TrainingStep, parameters: dict[str, nn.Parameter]) -> dict[str, ParameterStep]:
    """The next step of every parameter.

    Raises:
        OptionError: The optimizer is not Adafactor, or has weight decay, a first moment or a bound
            on the gradient's norm.
    """
    if type(step.optimizer) is not Adafactor:
        name = f"{type(step.optimizer).__module__.partition('.')[0]}.{type(step.optimizer).__name__}"
        raise OptionError(f"tail-patch: found the optimizer {name}, expected transformers.Adafactor; {_ADVICE}")
    if step.max_gradient_norm is not None:
        raise OptionError(
            f"tail-patch: the step clips gradients to the norm {step.max_gradient_norm}, expected no clipping; "
            f"{_ADVICE}"
        )
    for group in step.optimizer.param_groups:
        for option in ("weight_decay", "beta1"):
            if group[option]:
                raise OptionError(
                    f"tail-patch: found Adafactor with {option} {group[option]}, expected none; {_ADVICE}"
                )
    groups = {id(parameter): group for group in step.optimizer.param_groups for parameter in group["params"]}
    return {name: _parameter_step(step.optimizer, groups[id(p)], p) for name, p in parameters.items()}


def _parameter_step(optimizer: Adafactor, group: dict[str, Any], parameter: nn.Parameter) -> ParameterStep:
    state = optimizer.state.get(parameter, {})
    number = int(state.get("step", 0)) + 1
    rate = group["lr"]
    if group["relative_step"]:
        rate = min(1e-6 * number if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(number))
    if group["scale_parameter"]:
        rate *= max(group["eps"][1], float(parameter.norm(2)) / math.sqrt(parameter.numel()))
    keys = ("exp_avg_sq_row", "exp_avg_sq_col") if parameter.ndim > 1 else ("exp_avg_sq",)
    sizes = parameter.shape
    return ParameterStep(
        decay=1.0 - math.pow(number, group["decay_rate"]),
        epsilon=group["eps"][0],
        clip=group["clip_threshold"],
        rate=rate,
        moments=tuple(
            state[key].to(parameter) if key in state else parameter.new_zeros(size)
            for key, size in zip(keys, sizes, strict=True)
        ),
    )


def low_rank_update(
    step: ParameterStep, left: Float[Tensor, "batch tokens rows"], right: Float[Tensor, "batch tokens columns"]
) -> tuple[Float[Tensor, "batch tokens rows"], Float[Tensor, "batch tokens columns"]]:
    """ΔW of a matrix for each example, as factors like the gradient's.

    Args:
        step: The step of the matrix.
        left: l of each token, zero for tokens that do not contribute.
        right: r of each token.

    Returns:
        l' and r' with ΔW = Σ_t l'_t r'_tᵀ.
    """
    rows, columns = left.shape[-1], right.shape[-1]
    # 1/m Σ_j G_ij² = 1/m Σ_t l_ti ((r rᵀ) l)_ti: [batch, rows]
    row_squares = ((right @ right.mT) @ left).mul_(left).sum(dim=1).clamp_min_(0) / columns
    # 1/n Σ_i G_ij² = 1/n Σ_t r_tj ((l lᵀ) r)_tj: [batch, columns]
    column_squares = ((left @ left.mT) @ right).mul_(right).sum(dim=1).clamp_min_(0) / rows
    row_scale, column_scale = _scales(step, row_squares, column_squares)
    left, right = left * row_scale[:, None], right * column_scale[:, None]  # l̂ and r̂
    squared_norm = ((left @ left.mT) * (right @ right.mT)).sum(dim=(1, 2))  # ‖U‖²: [batch]
    return left, right.mul_(step.factor(squared_norm, rows * columns)[:, None, None])


def vector_update(step: ParameterStep, gradients: Float[Tensor, "batch size"]) -> Float[Tensor, "batch size"]:
    """The change of a vector for each example."""
    update = gradients * step.updated(0, gradients.square()).rsqrt()  # U = g/√V
    return update * step.factor(update.square().sum(dim=1), gradients.shape[1])[:, None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TableUpdate:
    """The change of an embedding, a head, or a tied matrix by one example: full rows plus a low-rank rest.

    Attributes:
        ids: The rows of the example's own tokens, each once.
        rows: The changes of these rows.
        left: l' of the other rows, zero at `ids`; None if only `ids` change.
        right: r'; the change of row i is Σ_t left_ti right_t.
    """

    ids: Int[Tensor, "ids"]
    rows: Float[Tensor, "ids width"]
    left: Float[Tensor, "tokens vocabulary"] | None
    right: Float[Tensor, "tokens width"] | None

    def looked_up(self, token_ids: Int[Tensor, "positions"]) -> Float[Tensor, "positions width"]:
        """The changes of the rows of these tokens."""
        change = (token_ids[:, None] == self.ids).to(self.rows.dtype) @ self.rows
        if self.left is not None and self.right is not None:
            change.addmm_(self.left[:, token_ids].T, self.right)
        return change

    def add_to(self, linear: Float[Tensor, "positions vocabulary"], states: Float[Tensor, "positions width"]) -> None:
        """Add h ΔWᵀ to `linear`, in place."""
        if self.left is not None and self.right is not None:
            # h ΔWᵀ = (h r'ᵀ) l': [positions, tokens] by [tokens, vocabulary]
            linear.addmm_(states @ self.right.T, self.left)
        linear.index_add_(1, self.ids, states @ self.rows.T)


def table_update(
    step: ParameterStep,
    ids: Int[Tensor, "ids"],
    rows: Float[Tensor, "ids width"],
    left: Float[Tensor, "tokens vocabulary"] | None = None,
    right: Float[Tensor, "tokens width"] | None = None,
) -> TableUpdate:
    """The change of a table by one example whose gradient is G = Σ_t l_t r_tᵀ + rows at `ids`.

    The rows at `ids` are computed in full and removed from the low-rank part, so that the two do not overlap.

    Args:
        step: The step of the table.
        ids: Distinct rows.
        rows: The part of G that comes from looking these rows up.
        left: l of a head, or None; changed in place.
        right: r of a head, or None.
    """
    vocabulary, width = len(step.moments[0]), rows.shape[1]
    column_squares = rows.new_zeros(width)
    row_squares = rows.new_zeros(vocabulary)
    if left is not None and right is not None:
        rows = rows + left[:, ids].T @ right
        left[:, ids] = 0
        row_squares = ((right @ right.T) @ left).mul_(left).sum(dim=0).clamp_min_(0)
        column_squares = ((left @ left.T) @ right).mul_(right).sum(dim=0).clamp_min_(0)
    # Rows of the two parts are disjoint, so squares of the parts add up to squares of G.
    squares = rows.square()
    row_squares[ids] = squares.sum(dim=1)
    column_squares = column_squares + squares.sum(dim=0)
    row_scale, column_scale = _scales(step, row_squares / width, column_squares / vocabulary)
    rows = rows * row_scale[ids, None] * column_scale
    squared_norm = rows.square().sum()
    if left is not None and right is not None:
        left, right = left.mul_(row_scale), right * column_scale
        squared_norm = squared_norm + ((left @ left.T) * (right @ right.T)).sum()
    factor = step.factor(squared_norm, vocabulary * width)
    return TableUpdate(ids=ids, rows=rows * factor, left=left, right=None if right is None else right * factor)


def _scales(step: ParameterStep, row_squares: Tensor, column_squares: Tensor) -> tuple[Tensor, Tensor]:
    """√(mean(R)/R) and √(1/C) after the step."""
    row, column = step.updated(0, row_squares), step.updated(1, column_squares)
    return (row / row.mean(dim=-1, keepdim=True)).rsqrt(), column.rsqrt()
