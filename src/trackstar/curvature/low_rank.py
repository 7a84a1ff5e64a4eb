"""A task's R in train-whitened coordinates: a change of low rank, so that one store answers every task (design.md, §2).

With u = W_train φ and R_train damped, R = λR_eval + (1-λ)R_train becomes in these coordinates

    λA + (1-λ)I,    A = W_train R_eval W_trainᵀ = Σ_k σ_k v_k v_kᵀ,    rank ≤ number of queries,
    (λA + (1-λ)I)⁻¹ = (I - Σ_k w_k v_k v_kᵀ) / (1-λ),    w_k = λσ_k / (λσ_k + 1-λ).

So stored rows stay as they are: the inverse is applied to the queries, and a candidate's norm under the task is
√((‖u‖² - Σ_k w_k (v_k·u)²) / (1-λ)). Any other W_train with WᵀW = R_train⁻¹ turns u and v_k alike, and changes nothing.
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.errors import OptionError
from trackstar.store import StoredRows, quantized_bits

# σ below this fraction of a block's largest are what rounding u to single precision leaves, not directions of the task.
_TOLERANCE = 1e-12
# Of ‖u‖² at least this much is left in a squared norm that is estimated from codes, which may not reach zero.
_LEAST_LEFT = 1e-4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskWhitening:
    """(λA + (1-λ)I)⁻¹ in train-whitened coordinates, block by block.

    Attributes:
        directions: v_k of each block, orthonormal rows; zero rows where a block has fewer. In float64, as the weights:
            of what is like the task all but a share 1 - w_k is taken off, in which single precision would show.
        weights: w_k, from 0 to 1.
        mixing: λ, at least 0 and less than 1.
    """

    directions: Float64[Tensor, "blocks rank dim"]
    weights: Float64[Tensor, "blocks rank"]
    mixing: float

    @classmethod
    def of(cls, task: Float[Tensor, "queries dimensions"], *, blocks: int, mixing: float) -> "TaskWhitening":
        """The whitening for a task.

        Args:
            task: u of the task's queries.
            blocks: Number of layer blocks.
            mixing: λ.

        Raises:
            OptionError: λ is not in [0, 1).
        """
        if not 0 <= mixing < 1:
            raise OptionError(f"--mixing {mixing}: expected a number from 0 to less than 1 for whitened coordinates")
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

    def apply_inverse(self, coordinates: Float[Tensor, "rows dimensions"]) -> Float[Tensor, "rows dimensions"]:
        """(λA + (1-λ)I)⁻¹u: a query in this form meets candidates as stored.

        In float64: near λ = 1 most of u is taken off.
        """
        corrected = torch.empty_like(coordinates, dtype=torch.float32)
        parts = corrected.view(len(coordinates), len(self.directions), -1)
        for number, (u, directions, weights) in enumerate(self._in_double(coordinates)):
            parts[:, number] = ((u - (u @ directions.mT * weights) @ directions) / (1 - self.mixing)).float()
        return corrected

    def norms(self, coordinates: Float[Tensor, "rows dimensions"]) -> Float[Tensor, "rows"]:
        """√(uᵀ(λA + (1-λ)I)⁻¹u) of each row: with W φ in place of φ, the norm of Eq. 1.

        Summed as Σ_k (1-w_k)(v_k·u)² along the task's directions and what lies across them, of which neither is a small
        difference of large numbers where u is like the task.
        """
        squares = torch.zeros(len(coordinates), dtype=torch.float64, device=coordinates.device)
        for u, directions, weights in self._in_double(coordinates):
            along = (u @ directions.mT).square()
            squares += (along * (1 - weights)).sum(dim=1)
            squares += (u.square().sum(dim=1) - along.sum(dim=1)).clamp_min(0)
        return (squares / (1 - self.mixing)).sqrt().float()

    def _in_double(self, coordinates: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each block's u in float64, with its directions and weights."""
        for u, directions, weights in zip(self._blocks(coordinates), self.directions, self.weights, strict=True):
            yield u.double(), directions, weights

    def stored_norms(self, stored: StoredRows) -> Float[Tensor, "rows"]:
        """The same of stored rows, from their exact ‖u‖ and what their codes say of v_k·u.

        Codes are û = u + e with e at right angles to u, otherwise of any direction: (v_k·û)² is too large by ‖e‖²/dim
        on average, which is taken off.
        """
        decoded = stored.decode()
        if quantized_bits(stored.codec) is None:
            return self.norms(decoded)
        squares = stored.norms.square()
        lengths = self._blocks(decoded).square().sum(dim=2)
        share = (1 - squares / lengths.sum(dim=0).clamp_min(1e-30)).clamp_min(0)
        excess = (self.weights.float().sum(dim=1)[:, None] * lengths).sum(dim=0) * share / self.directions.shape[2]
        along = torch.zeros_like(excess)
        for u, directions, weights in zip(self._blocks(decoded), self.directions, self.weights, strict=True):
            along += ((u @ directions.float().mT).square() * weights.float()).sum(dim=1)
        left = (squares - (along - excess).clamp_min(0)).maximum(_LEAST_LEFT * squares)
        return (left / (1 - self.mixing)).sqrt()

    def _blocks(self, coordinates: Tensor) -> Tensor:
        return coordinates.float().reshape(len(coordinates), len(self.directions), -1).transpose(0, 1)


def _principal(u: Float[Tensor, "queries dim"]) -> tuple[Float[Tensor, "rank"], Float[Tensor, "rank dim"]]:
    """Eigenvalues σ_k > 0 of A = uᵀu/n and their directions, by whichever of the two Gram matrices is smaller."""
    count, dim = u.shape
    if count <= dim:
        values, sides = torch.linalg.eigh(u @ u.mT / count)
        kept = values > _TOLERANCE * values[-1]
        values = values[kept]
        vectors = (sides[:, kept].mT @ u) / (values * count).sqrt()[:, None]
    else:
        values, sides = torch.linalg.eigh(u.mT @ u / count)
        kept = values > _TOLERANCE * values[-1]
        values, vectors = values[kept], sides[:, kept].mT
    return values, vectors
