"""The exact top k of a float16 store, from float16 products with an error bound.

The plain scan converts codes to float32 and multiplies them: memory is read once, written once and
read again. Products of float16 codes with float16 queries skip the conversion, but round. A row's
scale is the power of two nearest to its root mean square, so that ‖c‖ ≤ √(2D)·(1 + 2⁻¹⁰), and by
the Cauchy-Schwarz inequality

    |coarse - exact| ≤ ε ‖v‖ ‖c‖,    ε = 2⁻¹¹ (query) + 2⁻¹¹ (result) + D/8 · 2⁻²⁴

where the last term is of sums in float32 over eight lanes or more.

A candidate can only be among the first k if its coarse score plus its bound reaches the k-th best
coarse score minus its bound. These few candidates are scored again in float32, and the ranking is
that of the plain scan.
"""

import math

import torch
from jaxtyping import Float, Float16, Float32, Int64
from torch import Tensor

# Root mean square of a query's entries in float16: they and the products stay far from the limits
# of float16.
_QUERY_SCALE = 2.0**-5


class CoarseQueries:
    """Queries in float16, and the error bound of their products with float16 codes.

    Args:
        vectors: One vector per query, in the index's coordinates.
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
        """Coarse scores of stored rows, and the error bound of each.

        Args:
            codes: The rows' codes, as stored.
            factors: Each row's scale times its multiplier.
        """
        products = torch.nn.functional.linear(self._half, codes).float()
        return products * self._scales[:, None] * factors, self._slack[:, None] * factors.abs()


class Finalists:
    """Candidates that may be among the k best of a query."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._rows = torch.empty(0, dtype=torch.int64)
        self._high = torch.empty(0)
        self._low = torch.empty(0)

    def add(self, first_row: int, coarse: Float32[Tensor, "rows"], slack: Float32[Tensor, "rows"]) -> None:
        """Add consecutive candidates, and drop those that can no longer be among the k best."""
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
        """Whether the finalists' exact scores lie within their bounds."""
        return bool(((self._low <= exact) & (exact <= self._high)).all())

    def rows(self) -> Int64[Tensor, "finalists"]:
        """Their rows, ascending."""
        return self._rows
