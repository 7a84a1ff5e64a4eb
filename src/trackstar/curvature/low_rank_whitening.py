"""W of R = Σ_i λ_i v_i v_iᵀ + cI with few v_i: R of few examples with a ridge, never a square matrix (Eq. 2).

With fewer examples than dimensions, R_train has at most as many eigenvalues other than zero as there are
examples. The symmetric root of R⁻¹ changes φ along their eigenvectors v_i alone,

    R^(-1/2) φ = (φ - Σ_i s_i (v_i·φ) v_i) / √c,    s_i = 1 - √(c / (λ_i + c)),

and any rotation of it is a W with WᵀW = R⁻¹. λ_i and v_i come from the examples' Gram matrix: with Φ the
rows √w_j φ_j and ΦΦᵀ = UΛUᵀ, v_i = Φᵀu_i/√λ_i.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.curvature.rotation import Rotation
from trackstar.errors import CurvatureError, OptionError
from trackstar.store import StoredRows

# An eigenvalue below this fraction of the ridge changes φ by less than single precision shows.
_NEGLIGIBLE = 1e-9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRankWhitening:
    """W with WᵀW = R⁻¹, block by block, from few eigenvectors of R.

    Attributes:
        directions: v_i of each block, orthonormal rows; rows beyond a block's rank are zero.
        values: λ_i, descending; zero beyond a block's rank.
        ridges: c of each block, in squared units of φ.
        seed: Seed of the rotation of the coordinates; None is the symmetric root.
    """

    directions: Float[Tensor, "blocks rank dim"]
    values: Float[Tensor, "blocks rank"]
    ridges: Float[Tensor, "blocks"]
    seed: int | None = None

    @classmethod
    def of_rows(
        cls,
        rows: Float[Tensor, "examples dimensions"],
        ridges: Float64[Tensor, "blocks"],
        *,
        seed: int | None = None,
        advance: Callable[[int], None] = lambda _blocks: None,
    ) -> "LowRankWhitening":
        """W of R = ΦᵀΦ + cI.

        Args:
            rows: Φ, all blocks one after the other: φ of each example times the root of its weight in R.
            ridges: c of each block, above 0.
            seed: Seed of the rotation; None rotates nothing.
            advance: Callback that receives 1 after each block.
        """
        blocks = len(ridges)
        rank, dim = len(rows), rows.shape[1] // blocks
        directions, values = torch.zeros(blocks, rank, dim), torch.zeros(blocks, rank)
        for number, block in enumerate(rows.reshape(rank, blocks, dim).unbind(1)):
            phi = block.double()
            found, vectors = torch.linalg.eigh(phi @ phi.mT)
            kept = (found > _NEGLIGIBLE * ridges[number]).nonzero()[:, 0].flip(0)
            values[number, : len(kept)] = found[kept].float()
            directions[number, : len(kept)] = (vectors[:, kept].mT @ phi / found[kept].sqrt()[:, None]).float()
            advance(1)
        most = int((values > 0).sum(dim=1).max()) if rank else 0
        return cls(
            directions=directions[:, :most].contiguous(), values=values[:, :most].contiguous(),
            ridges=ridges.float(), seed=seed,
        )  # fmt: skip

    @property
    def rank(self) -> int:
        """Most directions of a block."""
        return self.directions.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that an index stores; the seed is that of its projections."""
        return {"directions": self.directions, "values": self.values, "ridges": self.ridges}

    def to(self, device: torch.device) -> "LowRankWhitening":
        """The same on another device."""
        return dataclasses.replace(
            self, directions=self.directions.to(device), values=self.values.to(device), ridges=self.ridges.to(device)
        )

    def apply(self, projected_gradients: Float[Tensor, "examples dimensions"]) -> Float[Tensor, "examples dimensions"]:
        """Wφ, whose inner products are φᵀR⁻¹φ'."""
        result = self._scaled(projected_gradients, power=0.5)
        return self._rotated(result) if self.seed is not None else result

    def apply_inverse(
        self, projected_gradients: Float[Tensor, "examples dimensions"]
    ) -> Float[Tensor, "examples dimensions"]:
        """R⁻¹φ: its inner product with a stored φ' is φᵀR⁻¹φ'."""
        return self._scaled(projected_gradients, power=1.0)

    def apply_transposed(self, whitened: Float[Tensor, "examples dimensions"]) -> Float[Tensor, "examples dimensions"]:
        """Wᵀu, whose inner product with φ is u·Wφ."""
        turned = self._rotated(whitened, transposed=True) if self.seed is not None else whitened
        return self._scaled(turned, power=0.5)

    def norms(self, projected_gradients: Float[Tensor, "examples dimensions"]) -> Float[Tensor, "examples"]:
        """‖Wφ‖ of each example: the root of (‖φ‖² - Σ_i (v_i·φ)²)/c + Σ_i (v_i·φ)²/(λ_i + c)."""
        squares = torch.zeros(len(projected_gradients), dtype=torch.float64, device=projected_gradients.device)
        for _, phi, directions, values, ridge in self._in_double(projected_gradients):
            along = (phi @ directions.mT).square()
            across = (phi.square().sum(dim=1) - along.sum(dim=1)).clamp_min(0)
            squares += across / ridge + along @ (1 / (values + ridge))
        return squares.sqrt().float()

    def stored_norms(self, stored: StoredRows) -> Float[Tensor, "examples"]:
        """‖Wφ‖ of stored rows, decoded."""
        return self.norms(stored.decode())

    def spectrum(self, damping: float) -> Float[Tensor, "eigenvalues"]:
        """R_train's eigenvalues other than zero, all blocks pooled, descending."""
        values = self.values.double().flatten()
        return values[values > 0].sort(descending=True).values

    def _scaled(self, rows: Tensor, *, power: float) -> Tensor:
        """R to a negative power times each row, computed in float64: little of a row may be left."""
        result = torch.empty_like(rows, dtype=torch.float32, memory_format=torch.contiguous_format)
        for place, phi, directions, values, ridge in self._in_double(rows):
            lost = 1 - (ridge / (values + ridge)) ** power
            result[:, place] = ((phi - (phi @ directions.mT * lost) @ directions) / ridge**power).float()
        return result

    def _in_double(self, rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """Columns, φ, v, λ and c of each block, in float64."""
        dim = rows.shape[1] // len(self.ridges)
        for number, (directions, values, ridge) in enumerate(
            zip(self.directions, self.values, self.ridges, strict=True)
        ):
            place = slice(number * dim, (number + 1) * dim)
            yield place, rows[:, place].double(), directions.double(), values.double(), ridge.double()

    def _rotated(self, rows: Tensor, *, transposed: bool = False) -> Tensor:
        assert self.seed is not None
        blocks = rows.reshape(len(rows) * len(self.ridges), -1)
        rotation = Rotation(dim=blocks.shape[1], seed=self.seed)
        turned = rotation.apply_transposed(blocks) if transposed else rotation.apply(blocks)
        return turned.reshape(len(rows), -1)


def checked_ridges(
    traces: Float64[Tensor, "blocks"], dim: int, *, mixing: float, damping: float, names: Sequence[str]
) -> Float64[Tensor, "blocks"]:
    """c of each block of a low-rank R: (1-λ) times the damping, a fraction of R_train's mean eigenvalue.

    Args:
        traces: Trace of each block of R_train.
        dim: Dimensions of a block.
        mixing: λ.
        damping: The damping.
        names: The blocks' names, for errors.

    Raises:
        CurvatureError: A block of R_train is zero, or R is singular.
        OptionError: The damping is so large that nothing is left of R_train.
    """
    ridges = (1 - mixing) * damping / dim * traces
    for name, trace, ridge in zip(names, traces.tolist(), ridges.tolist(), strict=True):
        if not trace > 0:
            raise no_gradient(name, trace / dim)
        if not ridge > 1e-10 * trace / dim:
            raise singular(name, dim, mixing=mixing, damping=damping)
    if not (ridges.float() ** -0.5).all():
        raise nothing_left(damping)
    return ridges


def no_gradient(name: str, mean_eigenvalue: float) -> CurvatureError:
    """The error for a block of R that is zero or not finite."""
    return CurvatureError(
        f"{name}: expected a positive mean eigenvalue of R, found {mean_eigenvalue:g}; no example has a gradient in "
        "this block"
    )


def singular(name: str, dim: int, *, mixing: float, damping: float) -> CurvatureError:
    """The error for a block of R that cannot be inverted."""
    if mixing == 1:
        return CurvatureError(
            f"{name}: R is singular with `mixing=1`, where it is R_eval alone and not damped; expected more task "
            f"queries than its {dim} dimensions; pass a smaller `mixing`"
        )
    return CurvatureError(
        f"{name}: R is singular with damping {damping:g}; expected more examples than its {dim} dimensions; pass more "
        "damping, such as `damping=0.1`"
    )


def nothing_left(damping: float) -> OptionError:
    """The error for a damping so large that W vanishes in single precision."""
    return OptionError(
        f"`damping`: nothing is left of R_train in single precision, found {damping:g}; pass a smaller value"
    )
