"""Fold V into random projections and project gradients from their factors: P₀ (G/√V) P₁ᵀ (paper, Eq. 4).

P₀ is side×rows and P₁ side×columns, entries normal with mean 0 and *variance* 1/side (√d in the paper is the side), so
that ⟨P₀GP₁ᵀ, P₀G'P₁ᵀ⟩ is an unbiased estimate of ⟨G, G'⟩ whatever the matrix's shape: E[P₀ᵀP₀] and E[P₁ᵀP₁] are
identities. Every matrix has projections of its own, drawn from the seed and its name, and a layer block is the sum of
its matrices' projected gradients, which equals the projection of their block-diagonal concatenation.

Per example nothing as large as G exists: P₀ (Σ_t g_t a_tᵀ) P₁ᵀ = Σ_t (P₀ g_t)(P₁ a_t)ᵀ.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.errors import OptionError
from trackstar.gradients.second_moment import ElementwiseMoment, FactoredMoment, SecondMoment
from trackstar.model.language_model import LanguageModel
from trackstar.model.layer_blocks import WeightMatrix


def random_projection(seed: int, name: str, length: int, side: int) -> Float[Tensor, "length side"]:
    """Pᵀ: independent normal entries of variance 1/side, the same on every machine for a seed and a name (Eq. 4).

    Projections of several sides are nested but for their scale: the first columns are those of a smaller side, so that
    a smaller φ can be cut out of a larger one.
    """
    key = hashlib.blake2b(f"{seed} {name}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    entries = generator.standard_normal((side, length), dtype=np.float32)
    return torch.from_numpy(entries).T.contiguous().mul_(side**-0.5)


def projections(
    matrix: WeightMatrix, *, seed: int, side: int
) -> tuple[Float[Tensor, "side rows"], Float[Tensor, "side columns"]]:
    """P₀ and P₁ of one matrix, V not folded in."""
    left = random_projection(seed, f"{matrix.name} left", matrix.rows, side)
    right = random_projection(seed, f"{matrix.name} right", matrix.columns, side)
    return left.T, right.T


def projection_digest(matrices: Iterable[tuple[str, int, int]], *, seed: int, side: int) -> str:
    """BLAKE2b-128 of the first entries of every projection: equal digests mean equal projections.

    Args:
        matrices: Name, rows and columns of each, in the order of the layer blocks.
        seed: Of the projections.
        side: Of the projections.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, rows, columns in matrices:
        digest.update(f"{name} {rows} {columns}\n".encode("utf-8", "surrogatepass"))
        for half in ("left", "right"):
            digest.update(random_projection(seed, f"{name} {half}", 2, side).numpy().tobytes())
    return digest.hexdigest()


class ProjectedGradients:
    """Sums φ = P (G/√V) of a batch, block by block, while the gradients pass by.

    A factored V (or none) is folded into the projections here, once. An elementwise V needs every example's G: exact,
    and slower by about a training pass.

    Args:
        model: The model, whose layer blocks φ follows.
        second_moment: V, checked against the model.
        seed: Of the projections.
        side: √d, the rows and columns of a block of φ.

    Raises:
        OptionError: The side is not positive.
    """

    def __init__(self, model: LanguageModel, second_moment: SecondMoment, *, seed: int = 0, side: int = 64) -> None:
        if side < 1:
            raise OptionError(f"--side {side}: expected 1 or more rows and columns a layer block")
        self.side = side
        self.dimensions = len(model.blocks) * side * side
        self._groups = model.input_groups
        self._blocks = len(model.blocks)
        self._device, self._dtype = model.device, model.dtype
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
        # Matrices that share an input share one product with their right projections side by side.
        for leader, group in members.items():
            self._right[leader] = torch.cat(group, dim=1)
        self._shared: dict[str, Tensor] = {}
        self._sums = torch.zeros(0)

    def _folded(self, matrix: WeightMatrix, second_moment: SecondMoment, seed: int) -> tuple[Tensor, Tensor]:
        """P₀ᵀ and P₁ᵀ with V's inverse roots folded in where V is separable."""
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
        return left.to(device, self._dtype), right.to(device, self._dtype)

    def start(self, examples: int) -> None:
        """Begin a batch: all sums are zero."""
        self._sums = torch.zeros(self._blocks, examples, self.side, self.side, device=self._device)
        self._shared.clear()

    def keep(self, matrix: WeightMatrix, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        """P₁ a of every token, 64 numbers instead of `columns`; a itself under an elementwise V."""
        if matrix.name in self._inverse_roots:
            return inputs
        leader = self._groups[matrix.name]
        if matrix.name == leader:
            self._shared[leader] = inputs @ self._right[leader]
        return self._shared[leader][..., self._slices[matrix.name]]

    def add(
        self,
        matrix: WeightMatrix,
        kept: Float[Tensor, "batch tokens kept"],
        gradients: Float[Tensor, "batch tokens rows"],
    ) -> None:
        """Add Σ_t (P₀ g_t)(P₁ a_t)ᵀ to the matrix's block."""
        if matrix.name in self._inverse_roots:
            self._add_elementwise(matrix, kept, gradients)
            return
        left = gradients @ self._left[matrix.name]
        if left.device == self._device:
            self._sums[matrix.block].baddbmm_(left.mT.float(), kept.float())
        else:
            self._sums[matrix.block] += (left.mT.float() @ kept.float()).to(self._device)

    def _add_elementwise(self, matrix: WeightMatrix, inputs: Tensor, gradients: Tensor) -> None:
        left = self._left[matrix.name]
        right = self._right[self._groups[matrix.name]][:, self._slices[matrix.name]]
        for example in range(inputs.shape[0]):
            gradient = gradients[example].float().mT @ inputs[example].float()
            gradient *= self._inverse_roots[matrix.name]
            self._sums[matrix.block][example] += (left.T @ gradient @ right).to(self._device)

    def result(self) -> Float[Tensor, "batch dimensions"]:
        """φ of each example of the batch that has just run, its blocks one after the other, in float32."""
        return self._sums.transpose(0, 1).reshape(self._sums.shape[1], self.dimensions)


def inverse_roots(matrix: WeightMatrix, second_moment: SecondMoment) -> Tensor | tuple[Tensor, Tensor] | None:
    """1/√V of a matrix: a factor a row and one a column where V is separable, [rows, columns] where not, None without.

    Small entries of V are raised to its floor first.
    """
    moment: Any = second_moment.moments.get(matrix.name)
    floor = second_moment.floor
    if isinstance(moment, FactoredMoment):
        row, column = _floored(moment.row.double(), floor), _floored(moment.column.double(), floor)
        return (row.mean() / row).sqrt().float(), column.rsqrt().float()
    if isinstance(moment, ElementwiseMoment):
        return _floored(moment.entries.double(), floor).rsqrt().float()
    return None


def _floored(values: Tensor, floor: float) -> Tensor:
    return values.clamp_min(floor * float(values.mean()))


def floored_entries(second_moment: SecondMoment) -> Mapping[str, int]:
    """How many entries of each matrix's V (rows and columns, where factored) the floor raises; only those with any."""
    raised: dict[str, int] = {}
    for name, moment in second_moment.moments.items():
        parts = [moment.row, moment.column] if isinstance(moment, FactoredMoment) else [moment.entries]
        count = sum(int((part < second_moment.floor * part.mean()).sum()) for part in parts)
        if count:
            raised[name] = count
    return raised
