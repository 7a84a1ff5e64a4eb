"""A random rotation that costs little: three rounds of random signs and a fast orthogonal transform.

Q = T D₃ T D₂ T D₁, with D_i diagonal matrices of random signs and T the Walsh-Hadamard transform (Ailon
and Chazelle 2009; Yu et al. 2016 use three rounds). Codes of whitened gradients need coordinates whose
distributions are alike; a dense rotation, uniform over all, takes a QR decomposition and a product with a
square matrix for that. Where the number of dimensions is no power of two, T is the Kronecker product of the
transform of its power of two and the cosine transforms (DCT-II) of its odd prime factors.
"""

import dataclasses
import functools
import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

ROUNDS = 3
# T is applied as a Kronecker product of matrices of at most this size, which are products that a
# processor computes at its full rate.
_LARGEST = 64
# Numbers that are transformed at once, through all rounds.
_CACHED = 1 << 17


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Q, an orthogonal matrix that is a function of its seed.

    Attributes:
        dim: Number of dimensions.
        seed: Seed of the signs.
    """

    dim: int
    seed: int

    def apply(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """Q times each row."""
        signs = _signs(self.dim, self.seed).to(rows)
        turned = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for part, out in zip(rows.split(self._at_once), turned.split(self._at_once), strict=True):
            for sign in signs:
                part = _transformed(part * sign, transposed=False)
            out.copy_(part)
        return turned

    def apply_transposed(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        """Qᵀ times each row, which is Q⁻¹."""
        signs = _signs(self.dim, self.seed).to(rows)
        turned = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for part, out in zip(rows.split(self._at_once), turned.split(self._at_once), strict=True):
            for sign in signs.flip(0):
                part = _transformed(part, transposed=True) * sign
            out.copy_(part)
        return turned

    @property
    def _at_once(self) -> int:
        """Rows that stay in the processor's cache through all rounds."""
        return max(1, _CACHED // self.dim)


@functools.lru_cache(maxsize=4)
def _signs(dim: int, seed: int) -> Float[Tensor, "rounds dim"]:
    """Signs of all rounds: bits of a Philox generator, 0 for -1 and 1 for 1."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    bits = generator.integers(0, 2, size=(ROUNDS, dim), dtype=np.uint8)
    return torch.from_numpy(2.0 * bits - 1.0)


def _transformed(rows: Tensor, *, transposed: bool) -> Tensor:
    """T or Tᵀ times each row: one factor of the Kronecker product after the other.

    Each factor is applied along the last axis, in one matrix product, and this axis then becomes the
    first; after the last factor the axes are in their order again.
    """
    count, dim = rows.shape
    for factor in reversed(_factors(dim)):
        matrix = (factor if transposed else factor.T).to(rows)
        size = len(matrix)
        product = rows.reshape(-1, size) @ matrix  # [rows × other axes, size]
        rows = product.reshape(count, dim // size, size).transpose(1, 2).reshape(count, dim)
    return rows


@functools.lru_cache(maxsize=8)
def _factors(dim: int) -> tuple[Float[Tensor, "_size _size"], ...]:
    """The matrices whose Kronecker product is T, in float64."""
    factors, odd = [], dim
    while odd % 2 == 0:
        size = math.gcd(odd, _LARGEST)
        factors.append(_hadamard(size))
        odd //= size
    prime = 3
    while odd > 1:
        if prime * prime > odd:
            prime = odd
        while odd % prime == 0:
            factors.append(_cosines(prime))
            odd //= prime
        prime += 2
    return tuple(factors)


def _hadamard(size: int) -> Tensor:
    """The Walsh-Hadamard matrix of a power of two, of orthonormal rows."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / size**0.5


def _cosines(size: int) -> Tensor:
    """The matrix of the DCT-II, of orthonormal rows: √(2/n) cos(π k (i + ½)/n), its first row 1/√n."""
    places = torch.arange(size, dtype=torch.float64)
    matrix = (2 / size) ** 0.5 * torch.cos(math.pi / size * places[:, None] * (places + 0.5))
    matrix[0] = size**-0.5
    return matrix
