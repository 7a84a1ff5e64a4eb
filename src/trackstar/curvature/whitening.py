"""Whitening: W with WᵀW = R⁻¹, block by block, and the damping that too few examples need (Eq.
2-3).

Scores need any W with WᵀW = R⁻¹: the inner products Wφ·Wφ' = φᵀR⁻¹φ' and the norms are those of the
symmetric R^(-1/2) in Eq. 2. W is the inverse Cholesky factor, which costs a fraction of an
eigendecomposition. If R is the mean of few examples' φφᵀ, with a ridge, W is kept in low-rank form
instead (`low_rank_whitening`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.curvature.low_rank_whitening import LowRankWhitening, no_gradient, nothing_left, singular
from trackstar.curvature.mixing import mixed, spectrum_of_autocorrelation
from trackstar.curvature.rotation import Rotation
from trackstar.errors import CurvatureError, check_damping
from trackstar.store import StoredRows


def shrinkage_damping(autocorrelation: Float[Tensor, "blocks dim dim"], examples: int) -> float:
    """Damping for a mean of `examples` outer products, by oracle-approximating shrinkage.

    Chen, Wiesel, Eldar and Hero (2010), eq. 23: with S the sample's second moment of dimension p
    from n examples, the best convex combination (1-ρ)S + ρ(tr S/p)I has ρ = ((1-2/p)tr S² + tr²S) /
    ((n+1-2/p)(tr S² - tr²S/p)), at most 1. Up to scale this is S + ρ/(1-ρ) (tr S/p) I, a damping of
    ρ/(1-ρ). It vanishes as n grows.

    Returns:
        The median over blocks of ρ/(1-ρ), between 0 and 1.
    """
    traces = [
        (float(block.diagonal().double().sum()), float(block.double().square().sum())) for block in autocorrelation
    ]
    return shrinkage_of_traces(traces, dim=autocorrelation.shape[1], examples=examples)


def shrinkage_of_traces(traces: Sequence[tuple[float, float]], *, dim: int, examples: int) -> float:
    """`shrinkage_damping` from tr S and tr S² of each block of `dim` dimensions."""
    dampings = []
    for trace, trace_of_square in traces:
        excess = (examples + 1 - 2 / dim) * (trace_of_square - trace**2 / dim)
        rho = ((1 - 2 / dim) * trace_of_square + trace**2) / excess if excess > 0 else 1.0
        dampings.append(min(1.0, rho / (1 - rho) if rho < 0.5 else 1.0))
    return float(torch.tensor(dampings).median())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Whitening:
    """W with WᵀW = R⁻¹, block by block: inverse Cholesky factors, or these times a rotation.

    Attributes:
        factors: W of each block, in inverse units of φ.
        triangular: Whether the factors are lower-triangular.
    """

    factors: Float[Tensor, "blocks dim dim"]
    triangular: bool = True

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that an index stores."""
        return {"whitening": self.factors}

    def to(self, device: torch.device) -> "Whitening":
        """The same on another device."""
        return dataclasses.replace(self, factors=self.factors.to(device))

    def apply(self, projected_gradients: Float[Tensor, "examples dimensions"]) -> Float[Tensor, "examples dimensions"]:
        """Wφ, whose inner products are φᵀR⁻¹φ'."""
        return self._each(projected_gradients, self.factors.mT)

    def apply_inverse(
        self, projected_gradients: Float[Tensor, "examples dimensions"]
    ) -> Float[Tensor, "examples dimensions"]:
        """R⁻¹φ = WᵀWφ: its inner product with a stored φ' is φᵀR⁻¹φ'."""
        return self._each(self.apply(projected_gradients), self.factors)

    def apply_transposed(self, whitened: Float[Tensor, "examples dimensions"]) -> Float[Tensor, "examples dimensions"]:
        """Wᵀu, whose inner product with φ is u·Wφ."""
        return self._each(whitened, self.factors)

    def spectrum(self, damping: float) -> Float[Tensor, "eigenvalues"]:
        """Eigenvalues of the R_train that W was computed from with this damping, all blocks pooled,
        descending.

        Raises:
            CurvatureError: WᵀW of a block is singular.
        """
        return spectrum_of_autocorrelation(self.autocorrelation(damping))

    def autocorrelation(self, damping: float) -> Iterator[Float64[Tensor, "dim dim"]]:
        """The R_train that W was computed from with this damping, block by block: R_train + cI =
        (WᵀW)⁻¹.

        Raises:
            CurvatureError: WᵀW of a block is singular.
        """
        for number, factor in enumerate(self.factors):
            root, failed = torch.linalg.cholesky_ex(factor.double().mT @ factor.double())
            if failed:
                raise CurvatureError(
                    f"whitening: block {number} is singular, expected the inverse square root of R_train; build the "
                    "index again"
                )
            damped = torch.cholesky_inverse(root)
            damped.diagonal().sub_(damping / (1 + damping) * damped.diagonal().mean())
            yield damped

    def stored_norms(self, stored: StoredRows) -> Float[Tensor, "examples"]:
        """‖Wφ‖ of stored rows, decoded."""
        return self.norms(stored.decode())

    def norms(self, projected_gradients: Float[Tensor, "examples dimensions"]) -> Float[Tensor, "examples"]:
        """‖Wφ‖ of each example. Tiles skip most of the zeros above W's diagonal."""
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


AnyWhitening = Whitening | LowRankWhitening
"""W in one of its two forms, which have the same methods."""


def whitening(
    train: Float[Tensor, "blocks dim dim"],
    evaluation: Float[Tensor, "blocks dim dim"] | None = None,
    *,
    mixing: float = 0.0,
    damping: float = 0.0,
    names: Sequence[str] | None = None,
    rotation: int | None = None,
    advance: Callable[[int], None] = lambda _blocks: None,
) -> Whitening:
    """W of each layer block with W R Wᵀ = I, where R = λ R_eval + (1-λ)(R_train + cI) (Eq. 2-3).

    Args:
        train: R_train, the mean of φφᵀ over training examples, in squared units of φ.
        evaluation: R_eval, the same over a task's queries; None only if λ is 0.
        mixing: λ.
        damping: c, as a fraction of the mean eigenvalue of each block of R_train; 0 is the paper.
        names: The blocks' names, for errors.
        rotation: Seed of a random rotation Q of the coordinates; QW whitens as well as W, and low-bit codes
            lose less where all coordinates have similar distributions. None rotates nothing.
        advance: Callback that receives 1 after each block.

    Returns:
        W of every block, computed in float64 and kept in float32.

    Raises:
        CurvatureError: A block of R is not positive definite in float64, as with fewer examples
            than dimensions and no damping; the message names the block.
        OptionError: λ or the damping is out of range, or the damping is so large that nothing is
            left of R_train.
    """
    check_damping(damping)
    factors = torch.empty_like(train, dtype=torch.float32)
    turned = None if rotation is None else Rotation(dim=train.shape[1], seed=rotation)
    for number, block in enumerate(train):
        name = names[number] if names else f"block {number}"
        r = mixed(None if evaluation is None else evaluation[number], block, mixing, damping=damping)
        factor = _inverse_factor(r, name, mixing=mixing, damping=damping).float()
        if not factor.diagonal().all():
            raise nothing_left(damping)
        factors[number] = factor if turned is None else turned.apply(factor.T).T
        advance(1)
    return Whitening(factors=factors, triangular=turned is None)


def _inverse_factor(r: Float64[Tensor, "dim dim"], name: str, *, mixing: float, damping: float) -> Tensor:
    """L⁻¹ of R = LLᵀ."""
    mean_eigenvalue = float(r.diagonal().mean())
    if not mean_eigenvalue > 0:
        raise no_gradient(name, mean_eigenvalue)
    factor, failed = torch.linalg.cholesky_ex(r)
    # Rounding can let a singular matrix through; its factor then has a pivot of rounding's size.
    smallest = float(factor.diagonal().min()) ** 2 if not failed else 0.0
    if failed or smallest < 1e-10 * mean_eigenvalue:
        raise singular(name, len(r), mixing=mixing, damping=damping)
    identity = torch.eye(len(r), dtype=torch.float64, device=r.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False)
