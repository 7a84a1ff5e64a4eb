"""A task's R in train-whitened coordinates: a low-rank change, so that one store answers every
task.

With u = W_train φ and W_train (R_train + cI) W_trainᵀ = I, R = λR_eval + (1-λ)(R_train + cI)
becomes

    λA + (1-λ)I,    A = W_train R_eval W_trainᵀ = Σ_k σ_k v_k v_kᵀ,    rank ≤ number of queries,
    (λA + (1-λ)I)⁻¹ = (I - Σ_k w_k v_k v_kᵀ) / (1-λ),    w_k = λσ_k / (λσ_k + 1-λ).

The last line is the Woodbury identity, block by block. Stored rows do not change: the inverse is
applied to the queries, and a candidate's norm under the task is √((‖u‖² - Σ_k w_k (v_k·u)²) /
(1-λ)). Another W_train with the same WᵀW rotates u and v_k alike, and scores stay the same.

A candidate's φ need not be whitened for that: v_k·u = (W_trainᵀ v_k)·φ, and ‖u‖ is stored
(`GradientDirections`).
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.curvature.whitening import AnyWhitening
from trackstar.errors import OptionError
from trackstar.store import StoredRows, quantized_bits

# σ_k below this fraction of a block's largest come from rounding u to single precision.
_TOLERANCE = 1e-12
# Smallest squared norm under the task, as a fraction of ‖u‖², if it is estimated from codes.
_LEAST_LEFT = 1e-4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskWhitening:
    """(λA + (1-λ)I)⁻¹ in train-whitened coordinates, block by block.

    Attributes:
        directions: v_k of each block, orthonormal rows; rows beyond a block's rank are zero. They
            and the weights are in float64: along v_k only the fraction 1 - w_k of u remains, in
            which single precision would show.
        weights: w_k, from 0 to 1.
        mixing: λ, from 0 to less than 1.
    """

    directions: Float64[Tensor, "blocks rank dim"]
    weights: Float64[Tensor, "blocks rank"]
    mixing: float

    @classmethod
    def of(cls, task: Float[Tensor, "queries dimensions"], *, blocks: int, mixing: float) -> "TaskWhitening":
        """The whitening for a task.

        Args:
            task: u of the task's queries, the rows whose mean of uuᵀ is A.
            blocks: Number of layer blocks.
            mixing: λ.

        Raises:
            OptionError: λ is not in [0, 1).
        """
        if not 0 <= mixing < 1:
            raise OptionError(f"`mixing`: expected 0 to less than 1 for whitened coordinates, found {mixing}")
        queries, dimensions = task.shape
        dim = dimensions // blocks
        rank = min(queries, dim) if mixing > 0 else 0
        directions = torch.zeros(blocks, rank, dim, dtype=torch.float64)
        weights = torch.zeros(blocks, rank, dtype=torch.float64)
        if rank:
            for number, u in enumerate(task.double().reshape(queries, blocks, dim).unbind(1)):
                values, vectors = _principal(u)
                scaled = mixing * values
                directions[number, : len(values)] = vectors
                weights[number, : len(values)] = scaled / (scaled + 1 - mixing)
        return cls(directions=directions, weights=weights, mixing=mixing)

    @property
    def rank(self) -> int:
        """Most directions of a block; 0 if R is R_train alone."""
        return self.directions.shape[1]

    def in_gradients(self, train: AnyWhitening) -> "GradientDirections":
        """The task's directions in φ's space.

        Args:
            train: W_train.
        """
        blocks, rank, dim = self.directions.shape
        rows = self.directions.transpose(0, 1).reshape(rank, blocks * dim).float()
        turned = train.apply_transposed(rows) if rank else rows
        directions = turned.reshape(rank, blocks, dim).transpose(0, 1).contiguous()
        return GradientDirections(directions=directions, weights=self.weights, mixing=self.mixing)

    def apply_inverse(self, coordinates: Float[Tensor, "rows dimensions"]) -> Float[Tensor, "rows dimensions"]:
        """(λA + (1-λ)I)⁻¹u: its inner product with a stored u' is that of Eq. 2, before
        normalisation.

        Computed in float64, since near λ = 1 most of u is subtracted.
        """
        corrected = torch.empty_like(coordinates, dtype=torch.float32)
        parts = corrected.view(len(coordinates), len(self.directions), -1)
        for number, (u, directions, weights) in enumerate(self._in_double(coordinates)):
            parts[:, number] = ((u - (u @ directions.mT * weights) @ directions) / (1 - self.mixing)).float()
        return corrected

    def norms(self, coordinates: Float[Tensor, "rows dimensions"]) -> Float[Tensor, "rows"]:
        """√(uᵀ(λA + (1-λ)I)⁻¹u) of each row, the norm in Eq. 1.

        The square is the sum of Σ_k (1-w_k)(v_k·u)² along the task's directions and of ‖u‖² - Σ_k
        (v_k·u)² across them. Neither is a small difference of large numbers if u lies close to the
        task.
        """
        squares = torch.zeros(len(coordinates), dtype=torch.float64, device=coordinates.device)
        for u, directions, weights in self._in_double(coordinates):
            along = (u @ directions.mT).square()
            squares += (along * (1 - weights)).sum(dim=1)
            squares += (u.square().sum(dim=1) - along.sum(dim=1)).clamp_min(0)
        return (squares / (1 - self.mixing)).sqrt().float()

    def _in_double(self, coordinates: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """u, directions and weights of each block, in float64."""
        for u, directions, weights in zip(self._blocks(coordinates), self.directions, self.weights, strict=True):
            yield u.double(), directions, weights

    def stored_norms(self, stored: StoredRows) -> Float[Tensor, "rows"]:
        """`norms` of stored rows, from their exact ‖u‖ and from v_k·û of their codes.

        Codes are û = u + e, with e orthogonal to u and otherwise of uniform direction. So (v_k·û)²
        exceeds (v_k·u)² by ‖e‖²/dim on average, which is subtracted.
        """
        is_quantized = quantized_bits(stored.codec) is not None
        if is_quantized and not self.rank:
            return self.of_train_norms(stored.norms)
        decoded = stored.decode()
        if not is_quantized:
            return self.norms(decoded)
        squares = stored.norms.square()
        lengths = self._blocks(decoded).square().sum(dim=2)
        # ‖e‖² = ‖û‖² - ‖u‖², as a share of ‖û‖²; each block of û carries the same share.
        share = (1 - squares / lengths.sum(dim=0).clamp_min(1e-30)).clamp_min(0)
        excess = (self.weights.float().sum(dim=1)[:, None] * lengths).sum(dim=0) * share / self.directions.shape[2]
        along = torch.zeros_like(excess)
        for u, directions, weights in zip(self._blocks(decoded), self.directions, self.weights, strict=True):
            along += ((u @ directions.float().mT).square() * weights.float()).sum(dim=1)
        left = (squares - (along - excess).clamp_min(0)).maximum(_LEAST_LEFT * squares)
        return (left / (1 - self.mixing)).sqrt()

    def of_train_norms(self, norms: Float[Tensor, "rows"]) -> Float[Tensor, "rows"]:
        """The norms of rows without a component along the task's directions, from ‖u‖."""
        return norms / (1 - self.mixing) ** 0.5

    def _blocks(self, coordinates: Tensor) -> Tensor:
        return coordinates.float().reshape(len(coordinates), len(self.directions), -1).transpose(0, 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientDirections:
    """A task's directions in φ's space: candidates' norms under the task without whitening candidates.

    Attributes:
        directions: W_trainᵀ v_k of each block.
        weights: w_k; see `TaskWhitening`.
        mixing: λ.
    """

    directions: Float[Tensor, "blocks rank dim"]
    weights: Float64[Tensor, "blocks rank"]
    mixing: float

    def squares(self, phi: Float[Tensor, "rows dimensions"]) -> Float64[Tensor, "2 rows"]:
        """Σ_k (1-w_k)(v_k·u)² and Σ_k (v_k·u)² of each row, from φ."""
        sums = torch.zeros(2, len(phi), dtype=torch.float64, device=phi.device)
        if self.directions.shape[1]:
            blocks = phi.reshape(len(phi), len(self.directions), -1).unbind(1)
            for part, directions, weights in zip(blocks, self.directions, self.weights, strict=True):
                along = (part.double() @ directions.to(part).double().mT).square()
                sums[0] += along @ (1 - weights.to(along))
                sums[1] += along.sum(dim=1)
        return sums

    def norms(self, train_norms: Float[Tensor, "rows"], squares: Float64[Tensor, "2 rows"]) -> Float[Tensor, "rows"]:
        """The norms under the task, as `TaskWhitening.norms` computes them.

        Args:
            train_norms: ‖u‖, which the index stores.
            squares: See `squares`.
        """
        along, every = squares
        across = (train_norms.double() ** 2 - every).clamp_min(0)
        return ((along + across) / (1 - self.mixing)).sqrt().float()


def _principal(u: Float[Tensor, "queries dim"]) -> tuple[Float[Tensor, "rank"], Float[Tensor, "rank dim"]]:
    """Eigenvalues σ_k > 0 of A = uᵀu/n and their directions, from the smaller of the two Gram matrices."""
    count, dim = u.shape
    if count <= dim:
        # uuᵀ/n = SΣSᵀ has the same nonzero eigenvalues, and v_k = uᵀs_k / √(nσ_k).
        values, sides = torch.linalg.eigh(u @ u.mT / count)
        positive = values > _TOLERANCE * values[-1]
        values = values[positive]
        vectors = (sides[:, positive].mT @ u) / (values * count).sqrt()[:, None]
    else:
        values, sides = torch.linalg.eigh(u.mT @ u / count)
        positive = values > _TOLERANCE * values[-1]
        values, vectors = values[positive], sides[:, positive].mT
    return values, vectors
