"""R, the Gauss-Newton autocorrelation of projected gradients, its mixing with a task's, and whitening (Eq. 2-3).

R is block-diagonal, a block a layer block: the *mean* over examples of φφᵀ. (Sum or mean is the same as long as only
one R is used, but not once R_eval and R_train are mixed; the paper does not say, we take the mean.)

Scores only need some W with WᵀW = R⁻¹: for any such W the inner products Wφ·Wφ' = φᵀR⁻¹φ' and the norms are the
same as with the symmetric R^(-1/2) of Eq. 2. W is taken as the inverse Cholesky factor, which costs a small part of
an eigendecomposition.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.errors import CurvatureError, OptionError
from trackstar.store import StoredRows

# The paper equates the 1000th singular values of 65,536 (§4.3); for fewer dimensions the rank is scaled.
PAPER_RANK, PAPER_DIMENSIONS = 1000, 65_536
# Eigenvalues below this fraction of the largest are rounding noise of single precision, not spectrum.
RANK_TOLERANCE = 1e-6
# Fewer queries than this cannot say what a task has in common: R is then R_train alone (λ = 0).
MIN_TASK_QUERIES = 8


def check_autocorrelation_size(blocks: int, side: int, device: torch.device | str = "cpu") -> None:
    """See that R fits into the machine's memory, before anything is written.

    Raises:
        OptionError: It does not.
    """
    wanted = blocks * side**4 * 8  # sums in float64
    device = torch.device(device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > memory:
        raise OptionError(
            f"--side {side}: R of {blocks} layer blocks needs {wanted / 2**30:,.1f} GiB, this machine has "
            f"{memory / 2**30:,.1f}; take a smaller side"
        )


# Rows of a block's sums that are made by one product.
_PANEL = 1024


class Autocorrelation:
    """Sums φφᵀ over batches of examples, in float64, each layer block for itself.

    A batch's own sum is a float32 product. A block's numbers depend on the batches and their order alone, not on which
    other blocks are summed beside it: they may be summed elsewhere.

    Args:
        blocks: Number of layer blocks.
        dimensions: Dimensions of one block, side².
        device: Where the sums are kept.
    """

    def __init__(self, blocks: int, dimensions: int, *, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(blocks, dimensions, dimensions, dtype=torch.float64, device=device)
        self.examples = 0

    def add(self, projected_gradients: Float[Tensor, "examples dimensions"]) -> None:
        """Add examples' φφᵀ."""
        blocks, dimensions, _ = self.sums.shape
        phi = projected_gradients.to(self.sums.device, torch.float32)
        for total, rows in zip(self.sums, phi.reshape(len(phi), blocks, dimensions).unbind(1), strict=True):
            block = rows.contiguous()
            # The sums are symmetric: what lies left of a panel's own columns is not computed.
            for first in range(0, dimensions, _PANEL):
                panel = block[:, first : first + _PANEL]
                total[first : first + _PANEL, first:] += panel.T @ block[:, first:]
        self.examples += len(phi)

    def mean(self) -> Float[Tensor, "blocks dim dim"]:
        """R, in float32: the mean over all examples added.

        Raises:
            CurvatureError: No example was added.
        """
        if self.examples == 0:
            raise CurvatureError("autocorrelation: found no example, expected one or more")
        mean = torch.empty(self.sums.shape, device=self.sums.device)
        dimensions = mean.shape[1]
        for whole, sums in zip(mean, self.sums, strict=True):
            for first in range(0, dimensions, _PANEL):
                last = min(first + _PANEL, dimensions)
                rows = (sums[first:last, first:] / self.examples).float()
                # A product need not be symmetric to the last bit: what lies above the diagonal counts.
                rows[:, : last - first] = rows[:, : last - first].triu() + rows[:, : last - first].triu(1).T
                whole[first:last, first:] = rows
                whole[first:, first:last] = rows.T
        return mean


def autocorrelation(
    projected_gradients: Float[Tensor, "examples dimensions"], blocks: int
) -> Float[Tensor, "blocks dim dim"]:
    """R of a few examples' φ (Eq. 2): the mean of φφᵀ in each layer block, in squared units of φ."""
    total = projected_gradients.shape[1]
    accumulator = Autocorrelation(blocks, total // blocks, device=projected_gradients.device)
    accumulator.add(projected_gradients)
    return accumulator.mean()


def mixed(
    evaluation: Float[Tensor, "blocks dim dim"], train: Float[Tensor, "blocks dim dim"], mixing: float
) -> Float[Tensor, "blocks dim dim"]:
    """R = λ R_eval + (1-λ) R_train (Eq. 3).

    Raises:
        OptionError: λ is not in [0, 1].
    """
    if not 0 <= mixing <= 1:
        raise OptionError(f"--mixing {mixing}: expected a number from 0 (only R_train) to 1 (only R_eval)")
    return torch.lerp(train, evaluation, mixing)


def spectrum_of_autocorrelation(
    autocorrelation: Iterable[Float[Tensor, "dim dim"]],
) -> Float[Tensor, "eigenvalues"]:
    """All blocks' eigenvalues pooled, largest first, in float64.

    Raises:
        CurvatureError: A number is not finite.
    """
    values = torch.cat([_eigenvalues(block.double()) for block in autocorrelation])
    return values.clamp_min(0).sort(descending=True).values


def spectrum_of_examples(
    projected_gradients: Float[Tensor, "examples dimensions"], blocks: int
) -> Float[Tensor, "eigenvalues"]:
    """The same from φ itself, by the examples' Gram matrices: cheaper where they are fewer than a block's dimensions.

    The eigenvalues of ΦᵀΦ/n that are not zero are those of ΦΦᵀ/n.

    Raises:
        CurvatureError: A number is not finite.
    """
    count = len(projected_gradients)
    phi = projected_gradients.double().reshape(count, blocks, -1).transpose(0, 1)
    values = torch.cat([_eigenvalues(block @ block.mT / count) for block in phi])
    return values.clamp_min(0).sort(descending=True).values


def _eigenvalues(block: Float64[Tensor, "dim dim"]) -> Float64[Tensor, "dim"]:
    if not torch.isfinite(block).all():
        raise CurvatureError(
            "spectrum: found numbers that are not finite, expected gradients that are; is the index damaged "
            "(trackstar verify)?"
        )
    return torch.linalg.eigvalsh(block)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """λ and how it was found.

    Attributes:
        value: λ.
        rule: In words, which rule gave it.
        rank: The rank at which the two spectra cross, from 1; 0 where the rule was not applied.
        evaluation_value: That singular value of R_eval, before weighing.
        train_value: That singular value of R_train, before weighing.
        evaluation_rank: Pooled numerical rank of R_eval.
        train_rank: Pooled numerical rank of R_train.
        queries: How many queries R_eval is the mean of.
        evaluation_spectrum: R_eval's largest singular values, descending.
        train_spectrum: R_train's largest singular values, descending.
    """

    value: float
    rule: str
    rank: int = 0
    evaluation_value: float | None = None
    train_value: float | None = None
    evaluation_rank: int | None = None
    train_rank: int | None = None
    queries: int = 0
    evaluation_spectrum: tuple[float, ...] = ()
    train_spectrum: tuple[float, ...] = ()


def mixing_by_spectra(
    evaluation: Float[Tensor, "values"],
    train: Float[Tensor, "train_values"],
    *,
    dimensions: int,
    queries: int,
) -> Mixing:
    """λ by the paper's rule (§4.3): at rank k, the singular values of λR_eval and (1-λ)R_train are equal.

    k = 1000 at 65,536 dimensions and in proportion at fewer. R_eval has no more singular values above rounding than
    blocks × queries, and so may R_train; where one of them has fewer than 2k, k is lowered to half of the smaller
    number: a singular value near the end of a rank-deficient spectrum says how many queries there were, not what
    the task needs.

    Args:
        evaluation: R_eval's singular values, all blocks pooled, descending.
        train: R_train's.
        dimensions: Dimensions of φ.
        queries: Number of queries in R_eval.
    """
    ranks = [int((values > RANK_TOLERANCE * values[0]).sum()) if len(values) else 0 for values in (evaluation, train)]
    wanted = max(1, round(PAPER_RANK * dimensions / PAPER_DIMENSIONS))
    rank = min(wanted, max(1, min(ranks) // 2))
    shown = {
        "evaluation_rank": ranks[0],
        "train_rank": ranks[1],
        "queries": queries,
        "evaluation_spectrum": _thinned(evaluation),
        "train_spectrum": _thinned(train),
    }
    if min(ranks) == 0:
        raise CurvatureError(
            "λ: found a spectrum that is zero throughout, expected gradients that are not; give --mixing"
        )
    rule = f"singular values equal at rank {rank} of {dimensions} dimensions"
    if rank < wanted:
        rule += f" (the paper's rank {wanted} lowered to half of the smaller spectrum's {min(ranks)})"
    evaluation_value, train_value = float(evaluation[rank - 1]), float(train[rank - 1])
    return Mixing(
        value=train_value / (evaluation_value + train_value),
        rule=rule,
        rank=rank,
        evaluation_value=evaluation_value,
        train_value=train_value,
        **shown,
    )


def _thinned(values: Tensor, most: int = 4096) -> tuple[float, ...]:
    return tuple(float(value) for value in values[:most])


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
