"""Fold V into random projections, and project gradients from their factors: P₀ (G/√V) P₁ᵀ (paper, Eq. 4).

P₀ is [side, rows] and P₁ [side, columns], with normal entries of mean 0 and *variance* 1/side (the
side is √d in the paper), so that ⟨P₀GP₁ᵀ, P₀G'P₁ᵀ⟩ is an unbiased estimate of ⟨G, G'⟩ for every
shape of the matrix: E[P₀ᵀP₀] and E[P₁ᵀP₁] are identities. Each matrix has independent projections,
drawn from the seed and the matrix's name. A layer block is the sum of its matrices' projected
gradients, which equals the projection of their block-diagonal concatenation.

Nothing as large as G exists for an example: with G = Σ_t g_t a_tᵀ,

    P₀ G P₁ᵀ = Σ_t (P₀ g_t)(P₁ a_t)ᵀ

A factored V = r cᵀ/mean(r) folds into the projections and costs nothing per example:

    (G/√V)_ij       = G_ij √mean(r) / √(r_i c_j)
    G/√V            = diag(√(mean(r)/r)) G diag(1/√c)
    P₀ (G/√V) P₁ᵀ   = (P₀ diag(√(mean(r)/r))) G (P₁ diag(1/√c))ᵀ
"""

from collections.abc import Iterable, Mapping
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.corpus.digests import draw_bytes, running_digest
from trackstar.errors import check_at_least
from trackstar.gradients.consumer import GradientConsumer, gradient_matrices
from trackstar.gradients.second_moment import ElementwiseMoment, FactoredMoment, SecondMoment
from trackstar.model.batching import Batch
from trackstar.model.devices import in_float64
from trackstar.model.experts import Routing
from trackstar.model.language_model import LanguageModel
from trackstar.model.layer_blocks import WeightMatrix


def random_projection(seed: int, name: str, length: int, side: int) -> Float[Tensor, "length side"]:
    """Pᵀ: independent normal entries of variance 1/side, a function of seed and name on all machines (Eq. 4).

    Up to their scale, projections of several sides are nested: the first columns are those of a
    smaller side, so that a smaller φ can be cut out of a larger one.
    """
    key = draw_bytes(f"{seed} {name}".encode("utf-8", "surrogatepass"))
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    entries = generator.standard_normal((side, length), dtype=np.float32)
    return torch.from_numpy(entries).T.contiguous().mul_(side**-0.5)


def projections(
    matrix: WeightMatrix, *, seed: int, side: int
) -> tuple[Float[Tensor, "side rows"], Float[Tensor, "side columns"]]:
    """P₀ and P₁ of one matrix, without V."""
    left = random_projection(seed, f"{matrix.name} left", matrix.rows, side)
    right = random_projection(seed, f"{matrix.name} right", matrix.columns, side)
    return left.T, right.T


def projection_digest(matrices: Iterable[tuple[str, int, int]], *, seed: int, side: int) -> str:
    """BLAKE2b-128 of the first entries of all projections: equal digests mean equal projections.

    Args:
        matrices: Name, rows and columns of each matrix, in the order of the layer blocks.
        seed: Seed of the projections.
        side: Side of the projections.
    """
    digest = running_digest()
    for name, rows, columns in matrices:
        digest.update(f"{name} {rows} {columns}\n".encode("utf-8", "surrogatepass"))
        for half in ("left", "right"):
            digest.update(random_projection(seed, f"{name} {half}", 2, side).numpy().tobytes())
    return digest.hexdigest()


class BlockSums(GradientConsumer):
    """φ of a batch: each of its layer blocks is the sum of the projected gradients of the block's matrices.

    Subclasses add each matrix's projected gradients to `_sums[matrix.block]`, [batch, side, side].

    Args:
        model: The model, whose layer blocks φ has.
        side: √d, the rows and columns of a block of φ.

    Raises:
        OptionError: The side is not positive.
    """

    def __init__(self, model: LanguageModel, side: int) -> None:
        check_at_least("side", side)
        self.side = side
        self.dimensions = len(model.blocks) * side * side
        self._blocks = len(model.blocks)
        self._device = model.device
        self._sums = torch.zeros(0)

    def start(self, batch: Batch) -> None:
        """Set all sums to zero."""
        self._sums = torch.zeros(self._blocks, len(batch.token_ids), self.side, self.side, device=self._device)

    def result(self) -> Float[Tensor, "batch dimensions"]:
        """φ of each example of the last batch, its blocks one after the other, in float32."""
        return self._sums.transpose(0, 1).reshape(self._sums.shape[1], self.dimensions)


@final
class ProjectedGradients(BlockSums):
    """φ by two-sided projection: P₀ (G/√V) P₁ᵀ, summed over the matrices of each block (Eq. 4).

    A factored V (or none) is folded into the projections once, here. An elementwise V needs each
    example's G: exact, and slower by about a training pass.

    Args:
        model: The model, whose layer blocks φ has.
        second_moment: V, checked against the model.
        seed: Seed of the projections.
        side: √d, the rows and columns of a block of φ.

    Raises:
        OptionError: The side is not positive.
    """

    def __init__(self, model: LanguageModel, second_moment: SecondMoment, *, seed: int = 0, side: int = 64) -> None:
        super().__init__(model, side)
        self._groups = model.input_groups
        self._dtype_of = {matrix.name: model.module.get_parameter(matrix.parameter).dtype for matrix in model.matrices}
        self._device_of = {matrix.name: model.device_of(matrix) for matrix in model.matrices}
        self._left: dict[str, Tensor] = {}
        self._right: dict[str, Tensor] = {}
        self._inverse_roots: dict[str, Tensor] = {}
        members: dict[str, list[Tensor]] = {}
        self._slices: dict[str, slice] = {}
        for matrix in model.matrices:
            left, right = self._folded(matrix, second_moment, seed)
            self._left[matrix.name] = left
            group = members.setdefault(self._groups[matrix.name], [])
            self._slices[matrix.name] = slice(len(group) * side, (len(group) + 1) * side)
            group.append(right)
        # Matrices that read the same input share one product with their right projections side by side.
        for leader, group in members.items():
            self._right[leader] = torch.cat(group, dim=1)  # [columns, members · side]
        self._of_several = {leader for leader, group in members.items() if len(group) > 1}
        self._shared: dict[str, Tensor] = {}

    def _folded(
        self, matrix: WeightMatrix, second_moment: SecondMoment, seed: int
    ) -> tuple[Float[Tensor, "rows side"], Float[Tensor, "columns side"]]:
        """P₀ᵀ and P₁ᵀ, with 1/√V folded in if V is separable."""
        device = self._device_of[matrix.name]
        left, right = (half.T for half in projections(matrix, seed=seed, side=self.side))
        inverse_root = inverse_roots(matrix, second_moment)
        if isinstance(inverse_root, tuple):
            left, right = left * inverse_root[0][:, None], right * inverse_root[1][:, None]
        elif inverse_root is not None:
            self._inverse_roots[matrix.name] = inverse_root.to(device)
        left, right = left.contiguous(), right.contiguous()
        if matrix.name in self._inverse_roots:
            return left.to(device), right.to(device)
        dtype = self._dtype_of[matrix.name]
        return left.to(device, dtype), right.to(device, dtype)

    def start(self, batch: Batch) -> None:
        """Set all sums to zero."""
        super().start(batch)
        self._shared.clear()

    def save_for_backward(self, matrix: WeightMatrix, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        """Return P₁ a of each token, `side` numbers instead of `columns`; a itself if V is elementwise."""
        if matrix.name in self._inverse_roots:
            return inputs
        leader = self._groups[matrix.name]
        if leader not in self._of_several:
            return _product(inputs, self._right[leader])
        if leader not in self._shared:  # whichever of them the model computes first
            self._shared[leader] = _product(inputs, self._right[leader])
        return self._shared[leader][..., self._slices[matrix.name]]  # [batch, tokens, side]

    def add(self, matrix: WeightMatrix, saved: Tensor, gradients: Float[Tensor, "batch tokens rows"]) -> None:
        """Add Σ_t (P₀ g_t)(P₁ a_t)ᵀ to the matrix's block."""
        if matrix.name in self._inverse_roots:
            self._add_elementwise(matrix, saved, gradients)
            return
        left = _product(gradients, self._left[matrix.name])  # P₀ g of each token: [batch, tokens, side]
        # Σ_t (P₀ g_t)(P₁ a_t)ᵀ: [batch, side, side]
        if left.device == self._device:
            self._sums[matrix.block].baddbmm_(left.mT.float(), saved.float())
        else:
            self._sums[matrix.block] += (left.mT.float() @ saved.float()).to(self._device)

    def save_routed(
        self, matrices: Mapping[int, WeightMatrix], inputs: Float[Tensor, "pairs columns"], routing: Routing
    ) -> Any:
        """Return P₁ a of each pair of a token and an expert; a padded by expert if V is elementwise."""
        if any(matrix.name in self._inverse_roots for matrix in matrices.values()):
            return super().save_routed(matrices, inputs, routing)
        right = inputs.new_zeros(len(inputs), self.side)
        for number, part in routing.hit():
            if number in matrices:
                right[part] = _product(inputs[part], self._right[matrices[number].name])
        return right

    def add_routed(
        self,
        matrices: Mapping[int, WeightMatrix],
        saved: Any,
        gradients: Float[Tensor, "pairs rows"],
        routing: Routing,
    ) -> None:
        """Add Σ (P₀ g)(P₁ a)ᵀ over the pairs of each example, all experts in one product."""
        if not isinstance(saved, Tensor):
            super().add_routed(matrices, saved, gradients, routing)
            return
        left = gradients.new_zeros(len(gradients), self.side)
        for number, part in routing.hit():
            if number in matrices:
                left[part] = _product(gradients[part], self._left[matrices[number].name])
        block = next(iter(matrices.values())).block
        left, right = routing.by_example(left), routing.by_example(saved)  # [batch, pairs, side]
        self._sums[block] += (left.mT.float() @ right.float()).to(self._device)

    def _add_elementwise(self, matrix: WeightMatrix, inputs: Tensor, gradients: Tensor) -> None:
        left = self._left[matrix.name]  # [rows, side]
        right = self._right[self._groups[matrix.name]][:, self._slices[matrix.name]]  # [columns, side]
        for example in range(inputs.shape[0]):
            gradient = gradient_matrices(inputs[example], gradients[example])
            gradient *= self._inverse_roots[matrix.name]
            self._sums[matrix.block][example] += (left.T @ gradient @ right).to(self._device)


def _product(vectors: Tensor, projection: Tensor) -> Tensor:
    """Vectors times a projection; a model may compute in another number format than its weights have."""
    return vectors.to(projection.dtype) @ projection


def inverse_roots(
    matrix: WeightMatrix, second_moment: SecondMoment
) -> Float[Tensor, "rows columns"] | tuple[Float[Tensor, "rows"], Float[Tensor, "columns"]] | None:
    """1/√V of a matrix: √(mean(r)/r) and 1/√c if V is factored, all entries if elementwise, None without V.

    Entries below the floor of V are raised to it first.
    """
    moment: Any = second_moment.moments.get(matrix.name)
    floor = second_moment.floor
    if isinstance(moment, FactoredMoment):
        row, column = (_floored(in_float64(factor), floor) for factor in (moment.row, moment.column))
        return (row.mean() / row).sqrt().float(), column.rsqrt().float()
    if isinstance(moment, ElementwiseMoment):
        return _floored(in_float64(moment.entries), floor).rsqrt().float()
    return None


def _floored(values: Tensor, floor: float) -> Tensor:
    return values.clamp_min(floor * float(values.mean()))


def floored_entries(second_moment: SecondMoment) -> Mapping[str, int]:
    """Number of entries that the floor raises, by matrix, for the matrices that have any.

    The entries are those of the row and column factors if V is factored.
    """
    raised: dict[str, int] = {}
    for name, moment in second_moment.moments.items():
        parts = [moment.row, moment.column] if isinstance(moment, FactoredMoment) else [moment.entries]
        count = sum(int((part < second_moment.floor * part.mean()).sum()) for part in parts)
        if count:
            raised[name] = count
    return raised
