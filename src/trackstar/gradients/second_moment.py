"""V, the second moment of each weight's gradient (paper, §4.1): read from optimizer state or estimated.

Adafactor maintains a factored V ≈ r cᵀ / mean(r), with r the means of the rows and c the means of
the columns. It is separable, so G/√V = diag(r)^(-1/2) · G · diag(c)^(-1/2) · √mean(r) folds into
the projections at no cost (`projection.py`). An elementwise V does not fold; it is the exact,
slower choice.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.choices import SecondMomentKind
from trackstar.errors import SecondMomentError
from trackstar.model.layer_blocks import WeightMatrix

DEFAULT_FLOOR = 1e-8
"""Entries of V (of its factors if it is factored) below this fraction of their mean are raised to it.

Otherwise a weight that has never had a gradient would outweigh all others once it gets one.
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FactoredMoment:
    """V ≈ row columnᵀ / mean(row) of one matrix.

    Attributes:
        row: r, the mean of each row of V, in squared units of the gradient.
        column: c, the mean of each column of V, in the same units.
    """

    row: Float[Tensor, "rows"]
    column: Float[Tensor, "columns"]

    def values(self) -> Float[Tensor, "rows columns"]:
        """V in full."""
        return torch.outer(self.row, self.column) / self.row.mean()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ElementwiseMoment:
    """V of one matrix, one entry per weight, in squared units of the gradient."""

    entries: Float[Tensor, "rows columns"]

    def values(self) -> Float[Tensor, "rows columns"]:
        """V in full."""
        return self.entries

    def factored(self) -> FactoredMoment:
        """The row means and column means of V."""
        return FactoredMoment(row=self.entries.mean(dim=1), column=self.entries.mean(dim=0))


Moment = FactoredMoment | ElementwiseMoment


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SecondMoment:
    """V of every covered matrix.

    Attributes:
        kind: `none` (V = 1), `factored` or `elementwise`.
        moments: V of each matrix by the matrix's name; empty for `none`.
        source: Origin of V, for notes and manifests.
        floor: Smallest entry, as a fraction of the mean.
    """

    kind: Literal["none"] | SecondMomentKind
    moments: Mapping[str, Moment]
    source: str
    floor: float = DEFAULT_FLOOR

    def tensors(self) -> dict[str, Tensor]:
        """V as an index stores it: `row/NAME` and `column/NAME`, or `entries/NAME`."""
        tensors: dict[str, Tensor] = {}
        for name, moment in self.moments.items():
            if isinstance(moment, FactoredMoment):
                tensors[f"row/{name}"] = moment.row.float().cpu().contiguous()
                tensors[f"column/{name}"] = moment.column.float().cpu().contiguous()
            else:
                tensors[f"entries/{name}"] = moment.entries.float().cpu().contiguous()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, source: str, floor: float) -> "SecondMoment":
        """The inverse of `tensors`; tensors with other names, shapes or dtypes are ignored."""
        moments: dict[str, Moment] = {}
        stored = {key: tensor for key, tensor in tensors.items() if tensor.dtype is torch.float32}
        for key, tensor in stored.items():
            part, _, name = key.partition("/")
            column = stored.get(f"column/{name}")
            if part == "entries" and tensor.ndim == 2:
                moments[name] = ElementwiseMoment(entries=tensor)
            elif part == "row" and tensor.ndim == 1 and column is not None and column.ndim == 1:
                moments[name] = FactoredMoment(row=tensor, column=column)
        kind = "elementwise" if any(isinstance(m, ElementwiseMoment) for m in moments.values()) else "factored"
        return cls(kind=kind if moments else "none", moments=moments, source=source, floor=floor)


NO_SECOND_MOMENT = SecondMoment(kind="none", moments={}, source="none")


def checked_second_moment(second_moment: SecondMoment, matrices: Sequence[WeightMatrix]) -> SecondMoment:
    """Return V after checking that each matrix has one of its shape, finite, not negative and not all zero.

    V is moved to main memory, where projections are drawn; an optimizer's state is where its model is.
    V of a fused expert that no token has reached is zero; it becomes the mean over its layer's other
    experts, and `source` says so.

    Raises:
        SecondMomentError: V lacks a matrix, has another shape, or holds values that no mean of
            squares can have.
    """
    if second_moment.kind == "none":
        return second_moment
    second_moment = _with_unreached_experts(_in_main_memory(second_moment), matrices)
    for matrix in matrices:
        moment = second_moment.moments.get(matrix.name)
        if moment is None:
            raise SecondMomentError(f"{second_moment.source}: holds no second moment of {matrix.name}; expected one")
        parts = [moment.row, moment.column] if isinstance(moment, FactoredMoment) else [moment.entries]
        shape = (
            (len(moment.row), len(moment.column)) if isinstance(moment, FactoredMoment) else tuple(moment.entries.shape)
        )
        if shape != (matrix.rows, matrix.columns):
            raise SecondMomentError(
                f"{second_moment.source}: second moment of {matrix.name} is for shape {shape}, expected "
                f"{(matrix.rows, matrix.columns)}; it belongs to another model"
            )
        for part in parts:
            if not torch.isfinite(part).all() or (part < 0).any() or not (part > 0).any():
                raise SecondMomentError(
                    f"{second_moment.source}: second moment of {matrix.name} has NaN, infinite or negative entries or "
                    "is zero throughout; expected means of squares; train the model longer, or pass "
                    '`second_moment="none"`'
                )
    return second_moment


def _in_main_memory(second_moment: SecondMoment) -> SecondMoment:
    moments: dict[str, Moment] = {}
    for name, moment in second_moment.moments.items():
        if isinstance(moment, FactoredMoment):
            moments[name] = FactoredMoment(row=moment.row.cpu(), column=moment.column.cpu())
        else:
            moments[name] = ElementwiseMoment(entries=moment.entries.cpu())
    return dataclasses.replace(second_moment, moments=moments)


def _with_unreached_experts(second_moment: SecondMoment, matrices: Sequence[WeightMatrix]) -> SecondMoment:
    """V with the mean over the other experts of the same parameter for each expert whose V is zero."""
    stacks: dict[str, list[str]] = {}
    for matrix in matrices:
        if matrix.expert is not None and matrix.name in second_moment.moments:
            stacks.setdefault(matrix.parameter, []).append(matrix.name)
    moments = dict(second_moment.moments)
    filled = 0
    for names in stacks.values():
        zero = [name for name in names if not any(bool(part.any()) for part in _parts(moments[name]))]
        others = [moments[name] for name in names if name not in zero]
        if not zero or not others:
            continue
        mean = [torch.stack(of).mean(dim=0) for of in zip(*map(_parts, others), strict=True)]
        for name in zero:
            factored = isinstance(others[0], FactoredMoment)
            moments[name] = (
                FactoredMoment(row=mean[0], column=mean[1]) if factored else ElementwiseMoment(entries=mean[0])
            )
        filled += len(zero)
    if not filled:
        return second_moment
    note = f"; {filled} matrices of experts that no token reached have the mean of their layer's others"
    return dataclasses.replace(second_moment, moments=moments, source=second_moment.source + note)


def _parts(moment: Moment) -> list[Tensor]:
    return [moment.row, moment.column] if isinstance(moment, FactoredMoment) else [moment.entries]
