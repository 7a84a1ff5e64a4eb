"""Estimate V, the mean of squared gradients, from a sample of the training examples."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.corpus import TokenizedExample
from trackstar.errors import GradientError, OptionError
from trackstar.gradients.per_example import gradient_pass
from trackstar.gradients.second_moment import DEFAULT_FLOOR, ElementwiseMoment, FactoredMoment, Moment, SecondMoment
from trackstar.model.batching import Batch, make_batch, plan_batches, run_adaptively
from trackstar.model.language_model import LanguageModel
from trackstar.model.layer_blocks import WeightMatrix

# Examples whose squares are summed in one go: so many that a batch is full, so few that several workers have some.
_PART_EXAMPLES = 16


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
