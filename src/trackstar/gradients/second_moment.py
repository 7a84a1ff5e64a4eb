"""V, the optimizer's second moment of each weight's gradient (paper, §4.1): read from optimizer state or estimated.

A factored V ≈ r cᵀ / mean(r), with r the means over each row and c the means over each column, is what Adafactor
keeps. It is separable, so that G/√V = diag(r)^(-1/2) · G · diag(c)^(-1/2) · √mean(r) folds into the projections and
costs nothing. An elementwise V does not fold; it is the exact, slower choice.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.errors import SecondMomentError
from trackstar.model.layer_blocks import WeightMatrix

# Entries of V (of its factors, where factored) below this fraction of their mean are raised to it: a weight that has
# never had a gradient must not outweigh all others when it first gets one.
DEFAULT_FLOOR = 1e-8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FactoredMoment:
    """V ≈ row columnᵀ / mean(row) of one matrix.

    Attributes:
        row: Mean over the columns of each row of V, in squared units of the gradient.
        column: Mean over the rows of each column of V, in the same units.
    """

    row: Float[Tensor, "rows"]
    column: Float[Tensor, "columns"]

    def values(self) -> Float[Tensor, "rows columns"]:
        """V in full."""
        return torch.outer(self.row, self.column) / self.row.mean()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ElementwiseMoment:
    """V of one matrix, an entry a weight, in squared units of the gradient."""

    entries: Float[Tensor, "rows columns"]

    def values(self) -> Float[Tensor, "rows columns"]:
        """V in full."""
        return self.entries

    def factored(self) -> FactoredMoment:
        """Its row means and column means."""
        return FactoredMoment(row=self.entries.mean(dim=1), column=self.entries.mean(dim=0))


Moment = FactoredMoment | ElementwiseMoment


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SecondMoment:
    """V of every covered matrix.

    Attributes:
        kind: `none` (V = 1), `factored` or `elementwise`.
        moments: By matrix name; empty for `none`.
        source: Where it comes from, for people.
        floor: Smallest entry, as a fraction of the mean.
    """

    kind: Literal["none", "factored", "elementwise"]
    moments: Mapping[str, Moment]
    source: str
    floor: float = DEFAULT_FLOOR

    def tensors(self) -> dict[str, Tensor]:
        """What an index keeps of it: `row/NAME` and `column/NAME`, or `entries/NAME`."""
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
        """The inverse of `tensors`; what is none of a matrix's V is left out."""
        moments: dict[str, Moment] = {}
        kept = {key: tensor for key, tensor in tensors.items() if tensor.dtype is torch.float32}
        for key, tensor in kept.items():
            part, _, name = key.partition("/")
            column = kept.get(f"column/{name}")
            if part == "entries" and tensor.ndim == 2:
                moments[name] = ElementwiseMoment(entries=tensor)
            elif part == "row" and tensor.ndim == 1 and column is not None and column.ndim == 1:
                moments[name] = FactoredMoment(row=tensor, column=column)
        kind = "elementwise" if any(isinstance(m, ElementwiseMoment) for m in moments.values()) else "factored"
        return cls(kind=kind if moments else "none", moments=moments, source=source, floor=floor)


NO_SECOND_MOMENT = SecondMoment(kind="none", moments={}, source="none")


def checked_second_moment(second_moment: SecondMoment, matrices: Sequence[WeightMatrix]) -> SecondMoment:
    """The same, once every matrix is known to have a finite V of its shape, nowhere negative and not zero throughout.

    Raises:
        SecondMomentError: It lacks a matrix, has another shape, or holds values that no mean of squares can have.
    """
    if second_moment.kind == "none":
        return second_moment
    for matrix in matrices:
        moment = second_moment.moments.get(matrix.name)
        if moment is None:
            raise SecondMomentError(f"{second_moment.source}: holds no second moment of {matrix.name}; expected one")
        parts = [moment.row, moment.column] if isinstance(moment, FactoredMoment) else [moment.entries]
        found = (
            (len(moment.row), len(moment.column)) if isinstance(moment, FactoredMoment) else tuple(moment.entries.shape)
        )
        if found != (matrix.rows, matrix.columns):
            raise SecondMomentError(
                f"{second_moment.source}: second moment of {matrix.name} is for shape {found}, expected "
                f"{(matrix.rows, matrix.columns)}; it belongs to another model"
            )
        for part in parts:
            if not torch.isfinite(part).all() or (part < 0).any() or not (part > 0).any():
                raise SecondMomentError(
                    f"{second_moment.source}: second moment of {matrix.name} has NaN, infinite or negative entries or "
                    "is zero throughout; expected means of squares"
                )
    return second_moment
