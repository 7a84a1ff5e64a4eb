"""Estimate V = E[G²], the mean of squared gradients, from a sample of the training examples (paper, §4.1).

The row and column means of G² need no materialized gradient. With G = Σ_t g_t a_tᵀ,

    G_ij          = Σ_t g_ti a_tj
    G_ij²         = Σ_{t,t'} g_ti a_tj a_t'j g_t'i
    Σ_j G_ij²     = Σ_{t,t'} g_ti (a_t·a_t') g_t'i      = Σ_t g_ti ((a aᵀ) g)_ti
    Σ_i G_ij²     = Σ_{t,t'} a_tj (g_t·g_t') a_t'j      = Σ_t a_tj ((g gᵀ) a)_tj

with a of shape [tokens, columns] and g of shape [tokens, rows].
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.choices import SecondMomentKind
from trackstar.corpus import TokenizedExample
from trackstar.errors import OptionError, SecondMomentError
from trackstar.gradients.consumer import GradientConsumer, gradient_matrices
from trackstar.gradients.per_example import BatchedPass
from trackstar.gradients.second_moment import (
    DEFAULT_FLOOR,
    ElementwiseMoment,
    FactoredMoment,
    Moment,
    SecondMoment,
    checked_second_moment,
)
from trackstar.model.batching import Batch
from trackstar.model.devices import float64_device, in_float64
from trackstar.model.language_model import LanguageModel
from trackstar.model.layer_blocks import WeightMatrix
from trackstar.model.probe import largest_weight

# Examples whose squares are summed together: enough to fill a batch, few enough to occupy several workers.
_PART_EXAMPLES = 16
# Weights beyond it are taken for the cause of an estimate that is not finite.
_LARGE_WEIGHT = 1e4
# The square of a few times the relative rounding of single precision.
_ROUNDING = (4 * 2.0**-23) ** 2


def estimate_second_moment(
    model: LanguageModel,
    examples: Sequence[TokenizedExample],
    *,
    kind: SecondMomentKind = "factored",
    batch_tokens: int = 2048,
    floor: float = DEFAULT_FLOOR,
    note: Callable[[str], None] = lambda _line: None,
    advance: Callable[[int], None] = lambda _examples: None,
) -> SecondMoment:
    """V estimated as E[G²] over a sample of training examples (paper, §4.1).

    Args:
        model: The model.
        examples: The sample.
        kind: `factored` estimates only the row and column means, `elementwise` all entries.
        batch_tokens: Most tokens per batch, padding included.
        floor: See `DEFAULT_FLOOR`.
        note: Callback that receives a line when memory runs out and batches become smaller.
        advance: Callback that receives the number of examples of each finished batch.

    Raises:
        OptionError: The sample is empty, or a single example does not fit in memory.
        GradientError: An example's loss is not finite.
    """
    if not examples:
        raise OptionError("second moment: found no example to estimate it from, expected one or more")
    with SquaredGradients(model, kind=kind, batch_tokens=batch_tokens, note=note) as squares:
        parts = (squares.sums(part, advance) for part in estimate_parts(examples, kind))
        return mean_of_squares(parts, kind=kind, floor=floor)


def checked_estimate(
    second_moment: SecondMoment, model: LanguageModel, examples: Sequence[TokenizedExample]
) -> SecondMoment:
    """Return an estimate of V after `checked_second_moment`; an error says where its fault comes from.

    Args:
        second_moment: V, estimated from the examples.
        model: The model.
        examples: The sample.

    Raises:
        SecondMomentError: V has a fault; the message names the weights or the texts that cause it.
    """
    try:
        checked = checked_second_moment(second_moment, model.matrices)
        _check_above_rounding(checked)
        return checked
    except SecondMomentError as error:
        cause = _cause(model, examples)
        if cause is None:
            raise
        raise SecondMomentError(cause) from error


def _check_above_rounding(second_moment: SecondMoment) -> None:
    """Raise if V of a matrix is what rounding makes of zero, which some processors give in place of zero.

    Raises:
        SecondMomentError: A matrix's V is so small beside the largest.
    """
    sizes = {
        name: float((moment.row if isinstance(moment, FactoredMoment) else moment.entries).mean())
        for name, moment in second_moment.moments.items()
    }
    most = max(sizes.values(), default=0.0)
    for name, size in sizes.items():
        if size < _ROUNDING * most:
            raise SecondMomentError(
                f"{second_moment.source}: second moment of {name} is zero but for rounding ({size:.1g}, and {most:.1g} "
                'for another matrix); expected means of squares; give other texts, or pass `second_moment="none"`'
            )


def _cause(model: LanguageModel, examples: Sequence[TokenizedExample]) -> str | None:
    """Why an estimate of V from these examples is zero or not finite; None if no cause is known."""
    parameters = dict(model.module.named_parameters())
    zero = [name for name, parameter in parameters.items() if parameter.ndim > 1 and not parameter.any()]
    if zero:
        return (
            f"{model.source}: {len(zero)} of its {len(parameters)} parameters are zero throughout, first {zero[0]}, so "
            "that other weights get no gradient to estimate V from; expected trained weights; load another checkpoint, "
            'or pass `second_moment="none"`'
        )
    longest = max(len(example.token_ids) for example in examples)
    if longest <= 2:
        return (
            f"the longest of the {len(examples)} texts that V is estimated from has {longest} tokens, of which one "
            "precedes the other, so that queries and keys of the attention get no gradient; expected texts of three "
            'tokens or more; give longer texts, or pass `second_moment="none"`'
        )
    if len({token for example in examples for token in example.token_ids.tolist()}) <= 2:
        return (
            f"the {len(examples)} texts that V is estimated from consist of one token that is repeated, such as white "
            "space, so that queries and keys of the attention get no gradient; expected texts of words; name the field "
            'that holds them with `text_field`, or pass `second_moment="none"`'
        )
    if max(float(parameter.abs().max()) for parameter in parameters.values() if parameter.numel()) > _LARGE_WEIGHT:
        return (
            f"{model.source}: gradients are not finite, or vanish, expected finite ones to estimate V from; "
            f"{largest_weight(model.module)}: it is too large; reload or retrain it"
        )
    return None


def estimate_parts(
    examples: Sequence[TokenizedExample], kind: SecondMomentKind
) -> Iterator[Sequence[TokenizedExample]]:
    """The parts that squares are summed over, so that the bits of V do not depend on the number of workers.

    Elementwise sums are as large as the model, so all examples are one part.

    Args:
        examples: The sample, one example at least.
        kind: Kind of V.
    """
    size = _PART_EXAMPLES if kind == "factored" else len(examples)
    return (examples[first : first + size] for first in range(0, len(examples), size))


def mean_of_squares(
    parts: Iterable["SummedSquares"], *, kind: SecondMomentKind, floor: float = DEFAULT_FLOOR
) -> SecondMoment:
    """V = E[G²] from the sums over parts, added in the parts' order (paper, §4.1).

    Rounding may make the sum of a factor slightly negative; it is raised to zero.

    Args:
        parts: Sums of the same model, one part at least; see `estimate_parts`.
        kind: Kind of the sums.
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
    """Sums of squared gradients over some examples, on the CPU.

    Attributes:
        examples: Number of examples.
        sums: By matrix, in squared units of the gradient: sums of the row means [rows] and of the
            column means [columns] of G², in float64; or the sum of G² [rows, columns], in float32.
    """

    examples: int
    sums: dict[str, list[Tensor]]


@final
class SquaredGradients:
    """Sums of squared gradients over examples, in batches of similar length.

    Hooks stay on the model until it is closed; use it as a context manager.

    Args:
        model: The model.
        kind: `factored` sums only the row and column means, `elementwise` all entries.
        batch_tokens: Most tokens per batch, padding included.
        note: Callback that receives a line when memory runs out and batches become smaller.
    """

    def __init__(
        self, model: LanguageModel, *, kind: SecondMomentKind, batch_tokens: int, note: Callable[[str], None]
    ) -> None:
        self._squares = FactoredSquares(model) if kind == "factored" else ElementwiseSquares(model)
        # Elementwise sums have no copy that would undo an unfinished batch, so each batch is one example.
        budget = batch_tokens if kind == "factored" else 1
        self._pass = BatchedPass(model, self._squares, batch_tokens=budget, note=note)

    def __enter__(self) -> "SquaredGradients":
        self._pass.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._pass.__exit__(*error)

    def sums(
        self, examples: Sequence[TokenizedExample], advance: Callable[[int], None] = lambda _examples: None
    ) -> SummedSquares:
        """Sums over these examples.

        Args:
            examples: The examples.
            advance: Callback that receives the number of examples of each finished batch.

        Raises:
            OptionError: A single example does not fit in memory.
            GradientError: An example's loss is not finite.
        """
        self._squares.clear()
        for batch, _, _ in self._pass.batches(examples, self._squares.commit):
            advance(len(batch))
        sums = {name: [one.cpu() for one in of] for name, of in self._squares.sums().items()}
        return SummedSquares(examples=len(examples), sums=sums)


class SquareSums(GradientConsumer):
    """Sums of squared gradients over the examples of many batches, each on its matrix's device."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.clear()

    @abstractmethod
    def clear(self) -> None:
        """Set all sums to zero."""

    @abstractmethod
    def commit(self) -> None:
        """Add the batch that has just finished to the sums."""

    @abstractmethod
    def sums(self) -> dict[str, list[Tensor]]:
        """The sums by matrix, as in `SummedSquares`."""

    def save_for_backward(self, matrix: WeightMatrix, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        """Return the inputs themselves."""
        return inputs


@final
class FactoredSquares(SquareSums):
    """Sums over examples of the row and column means of G², without materializing G where that is cheaper."""

    def clear(self) -> None:
        """Set all sums to zero."""

        def zeros(matrix: WeightMatrix, size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=float64_device(self._model.device_of(matrix)))

        self._row = {matrix.name: zeros(matrix, matrix.rows) for matrix in self._model.matrices}
        self._column = {matrix.name: zeros(matrix, matrix.columns) for matrix in self._model.matrices}
        self._pending: dict[str, tuple[Tensor, Tensor]] = {}

    def start(self, batch: Batch) -> None:
        """Discard a batch that did not finish."""
        self._pending.clear()

    def commit(self) -> None:
        """Add the finished batch to the sums."""
        for name, (row_sums, column_sums) in self._pending.items():
            self._row[name] += row_sums
            self._column[name] += column_sums
        self._pending.clear()

    def add(self, matrix: WeightMatrix, saved: Tensor, gradients: Float[Tensor, "batch tokens rows"]) -> None:
        """Add the row and column means of G², summed over the batch."""
        inputs, gradients = saved.float(), gradients.float()
        tokens = inputs.shape[1]
        if tokens * (matrix.rows + matrix.columns) < matrix.rows * matrix.columns:
            # Σ_t g_ti Σ_t' (a_t·a_t') g_t'i, summed over the batch: [rows]
            row_sums = ((inputs @ inputs.mT) @ gradients * gradients).sum(dim=(0, 1))
            # Σ_t a_tj Σ_t' (g_t·g_t') a_t'j, summed over the batch: [columns]
            column_sums = ((gradients @ gradients.mT) @ inputs * inputs).sum(dim=(0, 1))
        else:
            squares = torch.zeros(matrix.rows, matrix.columns, device=inputs.device)
            for example in range(inputs.shape[0]):
                squares += gradient_matrices(inputs[example], gradients[example]).square_()
            row_sums, column_sums = squares.sum(dim=1), squares.sum(dim=0)
        self._pending[matrix.name] = (in_float64(row_sums) / matrix.columns, in_float64(column_sums) / matrix.rows)

    def sums(self) -> dict[str, list[Tensor]]:
        """The sums of row means and of column means, by matrix."""
        return {name: [self._row[name], self._column[name]] for name in self._row}


@final
class ElementwiseSquares(SquareSums):
    """Sums over examples of G², one number per weight. Batches hold one example, since none can be undone."""

    def __init__(self, model: LanguageModel) -> None:
        self._sums: dict[str, Tensor] = {}
        super().__init__(model)

    def clear(self) -> None:
        """Set all sums to zero."""
        self._sums.clear()  # first, because there may be memory for one set of sums only
        self._sums = {
            m.name: torch.zeros(m.rows, m.columns, device=self._model.device_of(m)) for m in self._model.matrices
        }

    def start(self, batch: Batch) -> None:
        """Do nothing: only the sums outlive a batch."""

    def commit(self) -> None:
        """Do nothing: `add` has added the batch to the sums."""

    def add(self, matrix: WeightMatrix, saved: Tensor, gradients: Float[Tensor, "batch tokens rows"]) -> None:
        """Add G², summed over the batch."""
        for example in range(saved.shape[0]):
            gradient = gradient_matrices(saved[example], gradients[example])
            self._sums[matrix.name].addcmul_(gradient, gradient)

    def sums(self) -> dict[str, list[Tensor]]:
        """The sums of G², by matrix."""
        return {name: [sums] for name, sums in self._sums.items()}
