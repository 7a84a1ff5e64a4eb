"""An influence split over token positions, exactly, and where each token stands in its example's text.

φ is a sum over token positions, so its inner product with a vector q is one too. With Q the block of q that a matrix
belongs to, as side×side, and V folded into P₀ and P₁ as in `projection.py`,

    q·φ = Σ_t c_t,   c_t = Σ_matrices (P₀ g_t)ᵀ Q (P₁ a_t)

A candidate's influence, vector_q · φ_m · multiplier_m, is split over the candidate's tokens with q = vector_q ·
multiplier_m. The influence is symmetric: with the candidate's side as the vector it is split over the query's tokens.

Position t holds the inputs a_t that were read there and the gradients g_t of all losses that the position had a part
in: those of its own prediction, the next token, and of later ones that attend to it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.choices import Output, ProjectionKind
from trackstar.corpus import TokenizedExample
from trackstar.errors import GradientError, OptionError
from trackstar.gradients.dense_projection import check_flattened_size
from trackstar.gradients.per_example import gradient_pass
from trackstar.gradients.projection import inverse_roots, projections, random_projection
from trackstar.gradients.second_moment import SecondMoment
from trackstar.model.batching import make_batch, plan_batches, run_adaptively
from trackstar.model.language_model import LanguageModel
from trackstar.model.layer_blocks import WeightMatrix

_ENTRIES_AT_ONCE = 2**25


def split_over_tokens(
    model: LanguageModel,
    second_moment: SecondMoment,
    examples: Sequence[TokenizedExample],
    vectors: Float[Tensor, "examples dimensions"],
    *,
    seed: int,
    side: int,
    output: Output = "loss",
    kind: ProjectionKind = "two-sided",
    batch_tokens: int = 2048,
    advance: Callable[[int], None] = lambda _examples: None,
    note: Callable[[str], None] = lambda _message: None,
) -> list[Float[Tensor, "tokens"]]:
    """Each example's inner product of its own vector with φ, split over its token positions.

    Entry t is position t's part; the parts' sum is the product, but for float32 rounding. The cost is that of φ
    itself, one forward and backward pass; a factored V adds nothing, and an elementwise V or the one-sided projection
    adds a matrix of every weight matrix's size an example.

    Args:
        model: The model.
        second_moment: V.
        examples: What is split, each over its own tokens.
        vectors: q of each example, in the space of φ.
        seed: Of the projections.
        side: Rows and columns of a block of φ.
        output: What is differentiated.
        kind: Whether P is two-sided, or dense for flattened gradients.
        batch_tokens: Most tokens of a batch, padding included.
        advance: Told how many examples have been done.
        note: Told when memory runs out and batches are made smaller.

    Returns:
        The parts of each example, a number a token, in float32 on the CPU, in the units of q·φ.

    Raises:
        OptionError: The vectors are not one for each example, not of φ's dimensions or not finite; the side or the
            batch is not positive; one-sided projections would not fit; one example alone does not fit in memory.
        GradientError: A loss or gradient is not finite; the message names the example.
    """
    _check(model, examples, vectors, side)
    parts = _TokenParts(model, second_moment, seed=seed, side=side, kind=kind)
    result = [torch.zeros(0)] * len(examples)
    with gradient_pass(model, parts, output=output) as run:

        def run_batch(places: list[int]) -> tuple[Tensor, Tensor]:
            batch = make_batch(examples, places, device=model.device)
            parts.meet(vectors[places].to(model.device, torch.float32), batch.token_ids.shape[1])
            losses = run(batch)
            return parts.result(), losses

        plan = plan_batches([len(example.token_ids) for example in examples], batch_tokens)
        for places, (values, losses) in run_adaptively(plan, run_batch, note):
            finite = torch.isfinite(values).all(dim=1) & torch.isfinite(losses)
            if not finite.all():
                worst = examples[places[int(finite.int().argmin())]]
                raise GradientError(
                    f"{worst.example_id}: its loss or gradient is not finite, expected numbers; check the model's "
                    "weights and V, or leave the example out"
                )
            for row, place in zip(values.cpu(), places, strict=True):
                result[place] = row[: len(examples[place].token_ids)].clone()
            advance(len(places))
    return result


def _check(model: LanguageModel, examples: Sequence[TokenizedExample], vectors: Tensor, side: int) -> None:
    model.check_on_one_device("influence split over tokens")
    if side < 1:
        raise OptionError(f"--side {side}: expected 1 or more rows and columns a layer block")
    wanted = (len(examples), len(model.blocks) * side * side)
    if vectors.shape != wanted:
        raise OptionError(
            f"vectors: found {' × '.join(str(length) for length in vectors.shape)}, expected one for each example in "
            f"the dimensions of φ, {wanted[0]} × {wanted[1]}"
        )
    finite = torch.isfinite(vectors).all(dim=1)
    if not finite.all():
        worst = examples[int(finite.int().argmin())]
        raise OptionError(f"vectors: that of {worst.example_id} holds an entry that is not finite, expected numbers")


class _Separable:
    """(P₀ g_t)ᵀ Q (P₁ a_t), V's inverse roots folded into P₀ and P₁: nothing as large as the matrix is formed."""

    def __init__(self, left: Float[Tensor, "rows side"], right: Float[Tensor, "columns side"]) -> None:
        self._left, self._right = left, right

    def keep(self, inputs: Float[Tensor, "batch tokens columns"]) -> Float[Tensor, "batch tokens side"]:
        """P₁ a of every token."""
        return inputs @ self._right

    def parts(
        self,
        kept: Float[Tensor, "batch tokens side"],
        gradients: Float[Tensor, "batch tokens rows"],
        blocks: Float[Tensor, "batch side side"],
    ) -> Float[Tensor, "batch tokens"]:
        """Each position's part of the inner products with the vectors' blocks Q."""
        left = (gradients @ self._left).float()
        return ((left @ blocks) * kept.float()).sum(dim=2)


class _Dense:
    """g_tᵀ M a_t with M = (Pᵀq)∘1/√V of the matrix's own shape, a few examples' at once.

    Args:
        backward: Pᵀq of several vectors' blocks, [vectors, rows, columns].
        inverse_roots: 1/√V; None without V.
        entries: The matrix's number of entries.
    """

    def __init__(
        self, backward: Callable[[Tensor], Tensor], inverse_roots: Float[Tensor, "rows columns"] | None, entries: int
    ) -> None:
        self._backward, self._inverse_roots = backward, inverse_roots
        self._at_once = max(1, _ENTRIES_AT_ONCE // entries)

    def keep(self, inputs: Float[Tensor, "batch tokens columns"]) -> Float[Tensor, "batch tokens columns"]:
        """The inputs themselves."""
        return inputs

    def parts(
        self,
        kept: Float[Tensor, "batch tokens columns"],
        gradients: Float[Tensor, "batch tokens rows"],
        blocks: Float[Tensor, "batch side side"],
    ) -> Float[Tensor, "batch tokens"]:
        """Each position's part of the inner products with the vectors' blocks Q."""
        found = torch.empty(kept.shape[:2], device=kept.device)
        for first in range(0, len(kept), self._at_once):
            part = slice(first, first + self._at_once)
            middle = self._backward(blocks[part])
            if self._inverse_roots is not None:
                middle = middle * self._inverse_roots
            found[part] = ((gradients[part].float() @ middle) * kept[part].float()).sum(dim=2)
        return found


class _TokenParts:
    """Sums q·φ of a batch by token positions, matrix by matrix, while the gradients pass by."""

    def __init__(
        self, model: LanguageModel, second_moment: SecondMoment, *, seed: int, side: int, kind: ProjectionKind
    ) -> None:
        if kind == "one-sided":
            check_flattened_size(model.matrices, side)
        make = _two_sided if kind == "two-sided" else _one_sided
        self._splits = {m.name: make(m, model, second_moment, seed, side) for m in model.matrices}
        self._side = side
        self._blocks = torch.zeros(0)
        self._sums = torch.zeros(0)

    def meet(self, vectors: Float[Tensor, "batch dimensions"], tokens: int) -> None:
        """The vectors of the batch that comes next, and how many tokens wide it is."""
        self._blocks = vectors.reshape(len(vectors), -1, self._side, self._side).transpose(0, 1)
        self._sums = torch.zeros(len(vectors), tokens, device=vectors.device)

    def start(self, examples: int) -> None:
        """Begin a batch: all sums are zero."""
        assert len(self._sums) == examples, "another batch than was announced"
        self._sums.zero_()

    def keep(self, matrix: WeightMatrix, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        """P₁ a of every token; a itself where M has the matrix's shape."""
        return self._splits[matrix.name].keep(inputs)

    def add(self, matrix: WeightMatrix, kept: Any, gradients: Float[Tensor, "batch tokens rows"]) -> None:
        """Add the matrix's part of every position."""
        self._sums += self._splits[matrix.name].parts(kept, gradients, self._blocks[matrix.block])

    def result(self) -> Float[Tensor, "batch tokens"]:
        """c_t of every position of the batch that has just run, in float32; zero on padding."""
        return self._sums


def _two_sided(
    matrix: WeightMatrix, model: LanguageModel, second_moment: SecondMoment, seed: int, side: int
) -> _Separable | _Dense:
    left, right = (half.T for half in projections(matrix, seed=seed, side=side))
    roots = inverse_roots(matrix, second_moment)
    if isinstance(roots, Tensor):
        left, right = left.to(model.device), right.to(model.device)
        return _Dense(lambda blocks: left @ blocks @ right.T, roots.to(model.device), matrix.rows * matrix.columns)
    if roots is not None:
        left, right = left * roots[0][:, None], right * roots[1][:, None]
    # In the model's dtype, as φ itself is computed.
    left, right = left.contiguous(), right.contiguous()
    return _Separable(left.to(model.device, model.dtype), right.to(model.device, model.dtype))


def _one_sided(
    matrix: WeightMatrix, model: LanguageModel, second_moment: SecondMoment, seed: int, side: int
) -> _Separable | _Dense:
    entries = matrix.rows * matrix.columns
    projection = random_projection(seed, f"{matrix.name} flattened", entries, side * side).to(model.device)
    roots = inverse_roots(matrix, second_moment)
    if isinstance(roots, tuple):
        roots = torch.outer(*roots)

    def backward(blocks: Tensor) -> Tensor:
        return (blocks.flatten(1) @ projection.T).unflatten(1, (matrix.rows, matrix.columns))

    return _Dense(backward, None if roots is None else roots.to(model.device), entries)
