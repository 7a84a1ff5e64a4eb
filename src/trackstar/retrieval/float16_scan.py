"""A float16 store's exact top-k from products in float16, with a bound on their error: few candidates are scored twice.

The plain scan turns codes into float32 and multiplies: memory is read once and written and read twice more. Products of
float16 codes with float16 queries need none of that, but round. A row's scale is the power of two nearest to its root
mean square, so that ‖c‖ ≤ √(2D)·(1 + 2⁻¹⁰); and by Cauchy and Schwarz,

    |coarse - exact| ≤ ε ‖v‖ ‖c‖,    ε = 2⁻¹¹ (query) + 2⁻¹¹ (result) + D/8 · 2⁻²⁴ (sums in float32, 8 lanes or more)

so that only candidates whose coarse score plus its bound reaches the k-th best coarse score minus its bound can be
among the first k. Those are scored again in float32, and the ranking is that of the plain scan.
"""

import math

import torch
from jaxtyping import Float, Float16, Float32, Int64
from torch import Tensor

# Root mean square of the entries of a query in float16: far from what float16 cannot hold, as are the products.
_QUERY_SCALE = 2.0**-5


class CoarseQueries:
    """Queries in float16, and what their products with float16 codes may be off by.

    Args:
        vectors: What each query meets the candidates with.
    """

    def __init__(self, vectors: Float[Tensor, "queries dimensions"]) -> None:
        dimensions = vectors.shape[1]
        norms = torch.linalg.vector_norm(vectors.float(), dim=1)
        # A query of zero norm scores 0 everywhere, whatever its scale.
        self._scales = torch.where(norms > 0, norms, 1.0) / (_QUERY_SCALE * math.sqrt(dimensions))
        self._half = (vectors.float() / self._scales[:, None]).half()
        epsilon = 2 * 2.0**-11 + dimensions / 8 * 2.0**-24
        self._slack = epsilon * math.sqrt(2 * dimensions) * (1 + 2.0**-10) * norms

    def scores(
        self, codes: Float16[Tensor, "rows dimensions"], factors: Float32[Tensor, "rows"]
    ) -> tuple[Float32[Tensor, "queries rows"], Float32[Tensor, "queries rows"]]:
        """Coarse scores of stored rows and the most that each may be off by.

        Args:
            codes: As stored.
            factors: Each row's scale times its multiplier.
        """
        products = torch.nn.functional.linear(self._half, codes).float()
        return products * self._scales[:, None] * factors, self._slack[:, None] * factors.abs()


class Finalists:
    """Candidates that can still be among the k best of a query."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._rows = torch.empty(0, dtype=torch.int64)
        self._high = torch.empty(0)
        self._low = torch.empty(0)

    def add(self, first_row: int, coarse: Float32[Tensor, "rows"], slack: Float32[Tensor, "rows"]) -> None:
        """Take in consecutive candidates and drop those that are out of reach."""
        low, high = coarse - slack, coarse + slack
        joined = torch.cat([self._low, low])
        k = min(self._k, len(joined))
        threshold = joined.topk(k).values[-1] if k else -torch.inf
        near = (high >= threshold).nonzero()[:, 0]
        stay = self._high >= threshold
        self._rows = torch.cat([self._rows[stay], first_row + near])
        self._high = torch.cat([self._high[stay], high[near]])
        self._low = torch.cat([self._low[stay], low[near]])

    def bound(self, exact: Float32[Tensor, "finalists"]) -> bool:
        """Whether the finalists' exact scores lie within their bounds, as they must."""
        return bool(((self._low <= exact) & (exact <= self._high)).all())

    def rows(self) -> Int64[Tensor, "finalists"]:
        """Their rows, ascending."""
        return self._rows
