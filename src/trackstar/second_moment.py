"""V, the optimizer's second moment of each weight's gradient (paper, §4.1): read from optimizer state or estimated.

A factored V ≈ r cᵀ / mean(r), with r the means over each row and c the means over each column, is what Adafactor
keeps. It is separable, so that G/√V = diag(r)^(-1/2) · G · diag(c)^(-1/2) · √mean(r) folds into the projections and
costs nothing. An elementwise V does not fold; it is the exact, slower choice.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.batching import Batch, make_batch, plan_batches, run_adaptively
from trackstar.errors import GradientError, OptionError, SecondMomentError
from trackstar.examples import TokenizedExample
from trackstar.gradients import gradient_pass
from trackstar.layer_blocks import WeightMatrix
from trackstar.model import LanguageModel

# Entries of V (of its factors, where factored) below this fraction of their mean are raised to it: a weight that has
# never had a gradient must not outweigh all others when it first gets one.
DEFAULT_FLOOR = 1e-8
# Examples whose squares are summed in one go: so many that a batch is full, so few that several workers have some.
_PART_EXAMPLES = 16


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


def estimate_second_moment(
    model: LanguageModel,
    examples: Sequence[TokenizedExample],
    *,
    kind: Literal["factored", "elementwise"] = "factored",
    token_budget: int = 2048,
    floor: float = DEFAULT_FLOOR,
    note: Callable[[str], None] = lambda _line: None,
) -> SecondMoment:
    """V estimated as E[G²] over a sample of training examples (paper, §4.1; design.md).

    Args:
        model: The model.
        examples: The sample.
        kind: Whether only the row and column means are kept.
        token_budget: Most tokens of a batch, padding included.
        floor: See `DEFAULT_FLOOR`.
        note: Told when memory ran out and batches are made smaller.

    Raises:
        OptionError: The sample is empty, or one example does not fit in memory.
        GradientError: An example's loss is not finite.
    """
    if not examples:
        raise OptionError("second moment: found no example to estimate it from, expected one or more")
    with SquaredGradients(model, kind=kind, token_budget=token_budget, note=note) as squares:
        return mean_of_squares((squares.sums(part) for part in estimate_parts(examples, kind)), kind=kind, floor=floor)


def estimate_parts(
    examples: Sequence[TokenizedExample], kind: Literal["factored", "elementwise"]
) -> Iterator[Sequence[TokenizedExample]]:
    """The parts that squares are summed over, each by whoever does it: V's bits do not depend on who that is.

    Elementwise sums are as large as the model, so that all examples are one part.

    Args:
        examples: The sample, one example at least.
        kind: Whether only the row and column means are kept.
    """
    at_once = _PART_EXAMPLES if kind == "factored" else len(examples)
    return (examples[first : first + at_once] for first in range(0, len(examples), at_once))


def mean_of_squares(
    parts: Iterable["SummedSquares"], *, kind: Literal["factored", "elementwise"], floor: float = DEFAULT_FLOOR
) -> SecondMoment:
    """V = E[G²] of the sums over some parts, added in their order (paper, §4.1).

    Rounding may leave a tiny negative sum of a factor, which is zero.

    Args:
        parts: One at least, of the same model; see `estimate_parts`.
        kind: What they hold.
        floor: See `DEFAULT_FLOOR`.

    Returns:
        V in squared units of the gradient, on the CPU.
    """
    examples, sums = 0, {}
    for part in parts:
        sums = {name: [*map(torch.add, sums[name], of)] for name, of in part.sums.items()} if sums else part.sums
        examples += part.examples
    moments: dict[str, Moment] = {}
    for name, of in sums.items():
        if kind == "elementwise":
            moments[name] = ElementwiseMoment(entries=of[0] / examples)
        else:
            row, column = ((one / examples).clamp_min(0).float() for one in of)
            moments[name] = FactoredMoment(row=row, column=column)
    return SecondMoment(kind=kind, moments=moments, source=f"estimated from {examples} examples", floor=floor)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SummedSquares:
    """Sums over some examples, on the CPU.

    Attributes:
        examples: How many.
        sums: By matrix: of the row means [rows] and of the column means [columns] of G² in float64, or of G² itself
            [rows, columns] in float32; in squared units of the gradient.
    """

    examples: int
    sums: dict[str, list[Tensor]]


class SquaredGradients:
    """Sums of squared gradients over examples, in batches of similar length.

    Hooks stay on the model until it is closed; use it as a context manager.

    Args:
        model: The model.
        kind: Whether only the row and column means are kept.
        token_budget: Most tokens of a batch, padding included.
        note: Told when memory ran out and batches are made smaller.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        kind: Literal["factored", "elementwise"],
        token_budget: int,
        note: Callable[[str], None],
    ) -> None:
        self._model = model
        self._squares = FactoredSquares(model) if kind == "factored" else ElementwiseSquares(model)
        # Elementwise sums have no second copy to undo a batch in: one example a batch.
        self._token_budget = token_budget if kind == "factored" else 1
        self._note = note
        self._stack = ExitStack()
        self._pass: Callable[[Batch], Tensor] | None = None

    def __enter__(self) -> "SquaredGradients":
        self._pass = self._stack.enter_context(gradient_pass(self._model, self._squares))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def sums(self, examples: Sequence[TokenizedExample]) -> SummedSquares:
        """Sums over these examples.

        Raises:
            OptionError: One example does not fit in memory.
            GradientError: An example's loss is not finite.
        """
        assert self._pass is not None, "used outside its context"
        run, squares = self._pass, self._squares

        def run_batch(places: list[int]) -> Tensor:
            losses = run(make_batch(examples, places, device=self._model.device))
            squares.commit()
            return losses

        squares.clear()
        plan = plan_batches([len(example.token_ids) for example in examples], self._token_budget)
        for places, losses in run_adaptively(plan, run_batch, self._note):
            if not torch.isfinite(losses).all():
                worst = examples[places[int(torch.isfinite(losses).int().argmin())]]
                raise GradientError(f"{worst.example_id}: its loss is not finite; expected a number; check the weights")
        sums = {name: [one.cpu() for one in of] for name, of in squares.sums().items()}
        return SummedSquares(examples=len(examples), sums=sums)


class FactoredSquares:
    """Sums over examples of the row and column means of G², from the factors alone where that is cheaper.

    With G = Σ_t g_t a_tᵀ: Σ_j G_ij² = Σ_{t,t'} g_ti (a_t·a_t') g_t'i, and the same for columns with g and a
    exchanged.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._row: dict[str, Tensor] = {}
        self._column: dict[str, Tensor] = {}
        self._pending: dict[str, tuple[Tensor, Tensor]] = {}
        self.clear()

    def clear(self) -> None:
        """Begin new sums, all zero."""

        def zeros(matrix: WeightMatrix, size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=self._model.device_of(matrix))

        self._row = {matrix.name: zeros(matrix, matrix.rows) for matrix in self._model.matrices}
        self._column = {matrix.name: zeros(matrix, matrix.columns) for matrix in self._model.matrices}

    def start(self, examples: int) -> None:
        """Forget a batch that did not run to its end."""
        self._pending.clear()

    def commit(self) -> None:
        """Add the batch that ran to its end to the sums."""
        for name, (row_sums, column_sums) in self._pending.items():
            self._row[name] += row_sums
            self._column[name] += column_sums
        self._pending.clear()

    def keep(self, matrix: WeightMatrix, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        """The inputs themselves."""
        return inputs

    def add(
        self,
        matrix: WeightMatrix,
        kept: Float[Tensor, "batch tokens columns"],
        gradients: Float[Tensor, "batch tokens rows"],
    ) -> None:
        """Add the batch's squares, summed over examples."""
        inputs, gradients = kept.float(), gradients.float()
        tokens = inputs.shape[1]
        if tokens * (matrix.rows + matrix.columns) < matrix.rows * matrix.columns:
            row_sums = ((inputs @ inputs.mT) @ gradients * gradients).sum(dim=(0, 1))
            column_sums = ((gradients @ gradients.mT) @ inputs * inputs).sum(dim=(0, 1))
        else:
            squares = torch.zeros(matrix.rows, matrix.columns, device=inputs.device)
            for example in range(inputs.shape[0]):
                squares += (gradients[example].mT @ inputs[example]).square_()
            row_sums, column_sums = squares.sum(dim=1), squares.sum(dim=0)
        self._pending[matrix.name] = (row_sums.double() / matrix.columns, column_sums.double() / matrix.rows)

    def sums(self) -> dict[str, list[Tensor]]:
        """By matrix: the sums for rows and for columns."""
        return {name: [self._row[name], self._column[name]] for name in self._row}


class ElementwiseSquares:
    """Sums over examples of G², an entry a weight."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._sums: dict[str, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Begin new sums, all zero."""
        self._sums.clear()  # first, as there is room for one of them
        self._sums = {
            m.name: torch.zeros(m.rows, m.columns, device=self._model.device_of(m)) for m in self._model.matrices
        }

    def start(self, examples: int) -> None:
        """Nothing is kept from batch to batch but the sums."""

    def commit(self) -> None:
        """Nothing is pending."""

    def keep(self, matrix: WeightMatrix, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        """The inputs themselves."""
        return inputs

    def add(
        self,
        matrix: WeightMatrix,
        kept: Float[Tensor, "batch tokens columns"],
        gradients: Float[Tensor, "batch tokens rows"],
    ) -> None:
        """Add the batch's squares, summed over examples."""
        for example in range(kept.shape[0]):
            gradient = gradients[example].float().mT @ kept[example].float()
            self._sums[matrix.name].addcmul_(gradient, gradient)

    def sums(self) -> dict[str, list[Tensor]]:
        """By matrix: the sums."""
        return {name: [sums] for name, sums in self._sums.items()}
