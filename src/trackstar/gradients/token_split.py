"""Split an influence exactly over token positions.

φ is a sum over token positions, so its inner product with a vector q is one too. With Q the block
of q that a matrix belongs to, as [side, side], and V folded into P₀ and P₁ as in `projection.py`,

    q·φ = Σ_matrices ⟨Q, Σ_t (P₀ g_t)(P₁ a_t)ᵀ⟩ = Σ_t c_t
    c_t = Σ_matrices (P₀ g_t)ᵀ Q (P₁ a_t)

A candidate's influence, vector_q · φ_m · multiplier_m, is split over the candidate's tokens with
q = vector_q · multiplier_m. The influence is symmetric: with the candidate's side as the vector, it
is split over the query's tokens.

Position t holds the inputs a_t that were read there, and the gradients g_t of all losses that the
position contributes to: that of its own prediction, the next token, and those of later positions
that attend to it.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.choices import Output, ProjectionKind
from trackstar.corpus import TokenizedExample
from trackstar.errors import OptionError, check_at_least
from trackstar.gradients.consumer import GradientConsumer
from trackstar.gradients.dense_projection import check_flattened_size, example_slices
from trackstar.gradients.per_example import BatchedPass
from trackstar.gradients.projection import inverse_roots, projections, random_projection
from trackstar.gradients.second_moment import SecondMoment
from trackstar.model.batching import Batch
from trackstar.model.experts import Routing
from trackstar.model.input_layouts import FLAT
from trackstar.model.language_model import LanguageModel
from trackstar.model.layer_blocks import WeightMatrix


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionSettings:
    """How φ is computed from a loss gradient, as `GradientProjector` takes it.

    Attributes:
        seed: Seed of the projections.
        side: Rows and columns of a block of φ.
        output: The function that is differentiated.
        kind: Whether P is two-sided, or dense for flattened gradients.

    Raises:
        OptionError: The side is not positive.
    """

    seed: int
    side: int
    output: Output = "loss"
    kind: ProjectionKind = "two-sided"

    def __post_init__(self) -> None:
        check_at_least("side", self.side)


def split_over_tokens(
    model: LanguageModel,
    second_moment: SecondMoment,
    examples: Sequence[TokenizedExample],
    vectors: Float[Tensor, "examples dimensions"],
    settings: ProjectionSettings,
    *,
    batch_tokens: int = 2048,
    advance: Callable[[int], None] = lambda _examples: None,
    note: Callable[[str], None] = lambda _line: None,
) -> list[Float[Tensor, "tokens"]]:
    """Split the inner product of each example's φ with the example's vector over its token positions.

    Entry t is position t's part; up to float32 rounding, the parts add up to the product. The cost
    is that of φ itself, one forward and backward pass. A factored V adds nothing; an elementwise V
    or the one-sided projection adds, for each example, a matrix of the size of every weight matrix.

    Args:
        model: The model.
        second_moment: V.
        examples: Examples to split, each over its own tokens.
        vectors: q of each example, in the space of φ.
        settings: How φ is computed.
        batch_tokens: Most tokens per batch, padding included.
        advance: Callback that receives the number of examples of each finished batch.
        note: Callback that receives a line when memory runs out and batches become smaller.

    Returns:
        The parts of each example, one number per token, in float32 on the CPU, in the units of q·φ.

    Raises:
        OptionError: The vectors are not one per example, not of φ's dimensions or not finite;
            `batch_tokens` is not positive; one-sided projections would not fit; a single example
            does not fit in memory.
        GradientError: A loss or gradient is not finite; the message names the example.
    """
    _check(model, examples, vectors, settings.side)
    consumer = _TokenParts(model, second_moment, vectors, settings)
    result = [torch.zeros(0)] * len(examples)
    with BatchedPass(model, consumer, batch_tokens=batch_tokens, note=note, output=settings.output) as run:
        for indices, parts, _ in run.batches(examples, consumer.result):
            for row, index in zip(parts.cpu(), indices, strict=True):
                result[index] = row[: len(examples[index].token_ids)].clone()
            advance(len(indices))
    return result


def _check(model: LanguageModel, examples: Sequence[TokenizedExample], vectors: Tensor, side: int) -> None:
    flat = [path for path, layout in model.layouts.items() if layout is FLAT]
    if flat:
        raise OptionError(
            f"influence split over tokens: {flat[0]} of {model.architecture} does not read one row per token, expected "
            "layers that do; ask for influences of whole examples"
        )
    expected = (len(examples), len(model.blocks) * side * side)
    if vectors.shape != expected:
        raise OptionError(
            f"`vectors`: found {' × '.join(str(length) for length in vectors.shape)}, expected one for each example in "
            f"the dimensions of φ, {expected[0]} × {expected[1]}"
        )
    finite = torch.isfinite(vectors).all(dim=1)
    if not finite.all():
        wrong = examples[int(finite.int().argmin())]
        raise OptionError(f"`vectors`: that of {wrong.example_id} holds an entry that is not finite, expected numbers")


class _MatrixSplit(ABC):
    """The parts of token positions in q·φ that come from one matrix."""

    @abstractmethod
    def save_for_backward(self, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        """Return what `parts` needs of the matrix's inputs a."""

    @abstractmethod
    def parts(
        self, saved: Tensor, gradients: Float[Tensor, "batch tokens rows"], blocks: Float[Tensor, "batch side side"]
    ) -> Float[Tensor, "batch tokens"]:
        """Each position's part.

        Args:
            saved: The tensor that `save_for_backward` returned.
            gradients: g, the gradients of the loss with respect to the matrix's outputs.
            blocks: Q of each example.
        """


@final
class _SeparableSplit(_MatrixSplit):
    """(P₀ g_t)ᵀ Q (P₁ a_t), with 1/√V folded into P₀ and P₁: nothing as large as the matrix is formed."""

    def __init__(self, left: Float[Tensor, "rows side"], right: Float[Tensor, "columns side"]) -> None:
        self._left, self._right = left, right

    def save_for_backward(self, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        return inputs @ self._right  # P₁ a of each token: [batch, tokens, side]

    def parts(
        self, saved: Tensor, gradients: Float[Tensor, "batch tokens rows"], blocks: Float[Tensor, "batch side side"]
    ) -> Float[Tensor, "batch tokens"]:
        left = (gradients @ self._left).float()  # P₀ g of each token: [batch, tokens, side]
        return ((left @ blocks) * saved.float()).sum(dim=2)


@final
class _DenseSplit(_MatrixSplit):
    """g_tᵀ M a_t with M = (Pᵀq)∘1/√V of the matrix's own shape, for a few examples at a time.

    q·P vec(G∘1/√V) = (Pᵀq)·vec(G∘1/√V) = ⟨M, G⟩ = Σ_t ⟨M, g_t a_tᵀ⟩ = Σ_t g_tᵀ M a_t.

    Args:
        matrix: The matrix.
        transposed_projection: Pᵀq of several vectors' blocks, [vectors, rows, columns].
        roots: 1/√V; None without V.
    """

    def __init__(
        self,
        matrix: WeightMatrix,
        transposed_projection: Callable[[Tensor], Tensor],
        roots: Float[Tensor, "rows columns"] | None,
    ) -> None:
        self._matrix, self._transposed_projection, self._roots = matrix, transposed_projection, roots

    def save_for_backward(self, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        return inputs

    def parts(
        self, saved: Tensor, gradients: Float[Tensor, "batch tokens rows"], blocks: Float[Tensor, "batch side side"]
    ) -> Float[Tensor, "batch tokens"]:
        parts = torch.empty(saved.shape[:2], device=saved.device)
        for some in example_slices(len(saved), self._matrix):
            middle = self._transposed_projection(blocks[some])  # M: [examples, rows, columns]
            if self._roots is not None:
                middle = middle * self._roots
            parts[some] = ((gradients[some].float() @ middle) * saved[some].float()).sum(dim=2)
        return parts


@final
class _TokenParts(GradientConsumer):
    """q·φ of a batch by token positions, summed over the matrices."""

    def __init__(
        self, model: LanguageModel, second_moment: SecondMoment, vectors: Tensor, settings: ProjectionSettings
    ) -> None:
        if settings.kind == "one-sided":
            check_flattened_size(model.matrices, settings.side)
        split = _two_sided if settings.kind == "two-sided" else _one_sided
        self._splits = {m.name: split(m, model, second_moment, settings) for m in model.matrices}
        self._vectors = vectors
        self._side = settings.side
        self._device = model.device
        self._blocks = torch.zeros(0)
        self._sums = torch.zeros(0)

    def start(self, batch: Batch) -> None:
        vectors = self._vectors[list(batch.indices)].to(self._device, torch.float32)
        # Q of each block and example: [blocks, batch, side, side]
        self._blocks = vectors.reshape(len(vectors), -1, self._side, self._side).transpose(0, 1)
        self._sums = torch.zeros(batch.token_ids.shape, device=self._device)

    def save_for_backward(self, matrix: WeightMatrix, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        return self._splits[matrix.name].save_for_backward(inputs)

    def add(self, matrix: WeightMatrix, saved: Tensor, gradients: Float[Tensor, "batch tokens rows"]) -> None:
        blocks = self._blocks[matrix.block].to(gradients.device)
        parts = self._splits[matrix.name].parts(saved, gradients, blocks).to(self._device)
        # A layer that reads several rows per token has its rows beside each other.
        self._sums += parts if parts.shape == self._sums.shape else parts.unflatten(1, (self._sums.shape[1], -1)).sum(2)

    def add_routed(
        self,
        matrices: Mapping[int, WeightMatrix],
        saved: Any,
        gradients: Float[Tensor, "pairs rows"],
        routing: Routing,
    ) -> None:
        hit = [(number, part) for number, part in routing.hit() if number in matrices]
        blocks = self._blocks[next(iter(matrices.values())).block].to(gradients.device)
        for (number, part), of_expert in zip(hit, saved, strict=True):
            slots, matrix = routing.slots(part), matrices[number]
            split = self._splits[matrix.name]
            parts = slots.gathered(split.parts(of_expert, slots.padded(gradients[part]), blocks))
            self._sums.view(-1).index_add_(0, routing.token_rows[part].to(self._device), parts.to(self._device))

    def result(self) -> Float[Tensor, "batch tokens"]:
        """c_t of each position of the last batch, in float32; zero on padding."""
        return self._sums


def _two_sided(
    matrix: WeightMatrix, model: LanguageModel, second_moment: SecondMoment, settings: ProjectionSettings
) -> _MatrixSplit:
    left, right = (half.T for half in projections(matrix, seed=settings.seed, side=settings.side))
    roots, device = inverse_roots(matrix, second_moment), model.device_of(matrix)
    if isinstance(roots, Tensor):
        left, right = left.to(device), right.to(device)
        # Pᵀq of the two-sided projection is P₀ᵀ Q P₁.
        return _DenseSplit(matrix, lambda blocks: left @ blocks @ right.T, roots.to(device))
    if roots is not None:
        left, right = left * roots[0][:, None], right * roots[1][:, None]
    # In the model's dtype, as φ itself is computed.
    left, right = left.contiguous(), right.contiguous()
    return _SeparableSplit(left.to(device, model.dtype), right.to(device, model.dtype))


def _one_sided(
    matrix: WeightMatrix, model: LanguageModel, second_moment: SecondMoment, settings: ProjectionSettings
) -> _MatrixSplit:
    entries = matrix.rows * matrix.columns
    projection = random_projection(settings.seed, f"{matrix.name} flattened", entries, settings.side**2)
    device = model.device_of(matrix)
    projection = projection.to(device)  # Pᵀ: [rows · columns, side²]
    roots = inverse_roots(matrix, second_moment)
    if isinstance(roots, tuple):
        roots = torch.outer(*roots)

    def transposed_projection(blocks: Tensor) -> Tensor:
        return (blocks.flatten(1) @ projection.T).unflatten(1, (matrix.rows, matrix.columns))

    return _DenseSplit(matrix, transposed_projection, None if roots is None else roots.to(device))
