"""Whitening W with WᵀW = (R + cI)⁻¹, and the damping c (Eq. 2)."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.errors import CurvatureError, OptionError
from trackstar.store import StoredRows


def shrinkage_damping(autocorrelation: Float[Tensor, "blocks dim dim"], examples: int) -> float:
    """Damping that a block's mean of `examples` outer products needs, by oracle-approximating shrinkage.

    Chen, Wiesel, Eldar and Hero (2010), eq. 23: with S the sample's second moment of dimension p from n examples, the
    best convex combination (1-ρ)S + ρ(tr S/p)I has ρ = ((1-2/p)tr S² + tr²S) / ((n+1-2/p)(tr S² - tr²S/p)), at most 1.
    Up to scale this is S + ρ/(1-ρ) (tr S/p) I: damping by ρ/(1-ρ) of the mean eigenvalue. It vanishes as n grows.

    Returns:
        The median over the blocks of ρ/(1-ρ), between 0 and 1.
    """
    dampings = []
    dim = autocorrelation.shape[1]
    for block in autocorrelation:
        trace = float(block.diagonal().double().sum())
        trace_of_square = float(block.double().square().sum())
        excess = (examples + 1 - 2 / dim) * (trace_of_square - trace**2 / dim)
        rho = ((1 - 2 / dim) * trace_of_square + trace**2) / excess if excess > 0 else 1.0
        dampings.append(min(1.0, rho / (1 - rho) if rho < 0.5 else 1.0))
    return float(torch.tensor(dampings).median())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Whitening:
    """W with WᵀW = (R + cI)⁻¹, block by block: inverse Cholesky factors, or these with their rows turned.

    Attributes:
        factors: W of each block, in inverse units of φ.
        triangular: Whether they are lower-triangular.
    """

    factors: Float[Tensor, "blocks dim dim"]
    triangular: bool = True

    def rotated(self, seed: int) -> "Whitening":
        """QW with a random rotation Q: as good a whitening, whose coordinates are all alike.

        Coded with few bits, coordinates that differ in how heavy their tails are lose more than ones that do not; and W
        is a dense matrix in any case.
        """
        dim = self.factors.shape[1]
        generator = np.random.Generator(np.random.Philox(key=seed))
        normal = torch.from_numpy(generator.standard_normal((dim, dim), dtype=np.float32)).to(self.factors)
        rotation, triangle = torch.linalg.qr(normal)
        rotation *= triangle.diagonal().sign()  # uniform over all rotations (Mezzadri 2007), and the same everywhere
        return Whitening(factors=torch.matmul(rotation, self.factors), triangular=False)

    def apply(self, projected_gradients: Float[Tensor, "examples dimensions"]) -> Float[Tensor, "examples dimensions"]:
        """Wφ, whose inner products are φᵀR⁻¹φ'."""
        return self._each(projected_gradients, self.factors.mT)

    def apply_inverse(
        self, projected_gradients: Float[Tensor, "examples dimensions"]
    ) -> Float[Tensor, "examples dimensions"]:
        """R⁻¹φ = WᵀWφ: a query in this form meets candidates as stored."""
        return self._each(self.apply(projected_gradients), self.factors)

    def apply_transposed(self, whitened: Float[Tensor, "examples dimensions"]) -> Float[Tensor, "examples dimensions"]:
        """Wᵀu: what φ must meet for the inner product that u has with Wφ."""
        return self._each(whitened, self.factors)

    def autocorrelation(self, damping: float) -> Iterator[Float64[Tensor, "dim dim"]]:
        """The R that W was made from with this damping, block by block: R + cI = (WᵀW)⁻¹.

        Raises:
            CurvatureError: A W is no whitening: WᵀW is singular.
        """
        for number, factor in enumerate(self.factors):
            root, failed = torch.linalg.cholesky_ex(factor.double().mT @ factor.double())
            if failed:
                raise CurvatureError(
                    f"whitening: block {number} is singular, expected the inverse square root of R_train; make the "
                    "index again"
                )
            damped = torch.cholesky_inverse(root)
            damped.diagonal().sub_(damping / (1 + damping) * damped.diagonal().mean())
            yield damped

    def stored_norms(self, stored: StoredRows) -> Float[Tensor, "examples"]:
        """‖Wφ‖ of stored rows, of what their codes say."""
        return self.norms(stored.decode())

    def norms(self, projected_gradients: Float[Tensor, "examples dimensions"]) -> Float[Tensor, "examples"]:
        """‖Wφ‖ of each example; the zeros above W's diagonal are left out in tiles."""
        if not self.triangular:
            return torch.linalg.vector_norm(self.apply(projected_gradients), dim=1)
        count, (blocks, dim, _) = len(projected_gradients), self.factors.shape
        phi = projected_gradients.reshape(count, blocks, dim).transpose(0, 1)
        squares = torch.zeros(count, device=phi.device)
        tile = max(64, -(-dim // 8))
        for start in range(0, dim, tile):
            stop = min(start + tile, dim)
            whitened = torch.bmm(phi[:, :, :stop], self.factors[:, start:stop, :stop].mT)
            squares += whitened.square_().sum(dim=(0, 2))
        return squares.sqrt()

    def _each(self, projected_gradients: Tensor, right: Tensor) -> Tensor:
        count, blocks = len(projected_gradients), len(self.factors)
        phi = projected_gradients.reshape(count, blocks, -1).transpose(0, 1)
        return torch.bmm(phi, right).transpose(0, 1).reshape(count, -1)


def whitening(
    autocorrelation: Float[Tensor, "blocks dim dim"],
    *,
    damping: float = 0.0,
    names: Sequence[str] | None = None,
) -> Whitening:
    """A whitening of each layer block: W with W (R + cI) Wᵀ = I (Eq. 2).

    Args:
        autocorrelation: R, the mean of φφᵀ over examples, in squared units of the projected gradient.
        damping: Fraction of a block's mean eigenvalue added to every eigenvalue; 0 is the paper.
        names: The blocks' names, for errors.

    Returns:
        W of every block, computed in float64 and kept in float32.

    Raises:
        CurvatureError: A damped block is not positive definite in float64, as when there are fewer examples than
            dimensions and no damping; the message names the block.
        OptionError: The damping is negative or not finite, or so large that nothing is left of R.
    """
    if not 0 <= damping < math.inf:
        raise OptionError(f"--damping {damping}: expected 0 or more, as a fraction of the mean eigenvalue")
    factors = torch.empty_like(autocorrelation, dtype=torch.float32)
    identity = torch.eye(autocorrelation.shape[1], dtype=torch.float64, device=autocorrelation.device)
    for number, block in enumerate(autocorrelation):
        name = names[number] if names else f"block {number}"
        damped = block.double()
        mean_eigenvalue = float(damped.diagonal().mean())
        if not mean_eigenvalue > 0:
            raise CurvatureError(
                f"{name}: its mean eigenvalue is {mean_eigenvalue:g}, expected a positive one; "
                "no example has a gradient there"
            )
        damped.diagonal().add_(damping * mean_eigenvalue)
        factor, failed = torch.linalg.cholesky_ex(damped)
        # Rounding can let a singular matrix through; its factor then has a pivot of rounding's size.
        smallest = float(factor.diagonal().min()) ** 2 if not failed else 0.0
        if failed or smallest < 1e-10 * mean_eigenvalue:
            raise CurvatureError(
                f"{name}: R is singular with damping {damping:g}; expected more examples than its {len(block)} "
                "dimensions, or more damping (--damping 0.1)"
            )
        factors[number] = torch.linalg.solve_triangular(factor, identity, upper=False)
        if not factors[number].diagonal().all():
            raise OptionError(f"--damping {damping:g}: nothing is left of R in single precision; give less")
    return Whitening(factors=factors)
