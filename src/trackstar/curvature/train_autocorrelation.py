"""R_train in one of two forms: a square matrix per layer block, or the φ of its few examples (Eq. 2-3).

With fewer examples than about a third of a block's dimensions, the rows are the smaller form, and
everything that R_train is needed for is computed from them: its spectrum, its damping, and the whitening
by R = λR_eval + (1-λ)(R_train + cI), which then has a low rank but for the ridge.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.curvature.autocorrelation import autocorrelation
from trackstar.curvature.low_rank_whitening import LowRankWhitening, checked_ridges
from trackstar.curvature.mixing import spectrum_of_autocorrelation, spectrum_of_examples
from trackstar.curvature.whitening import AnyWhitening, Whitening, shrinkage_damping, shrinkage_of_traces, whitening
from trackstar.errors import CurvatureError, check_damping, check_mixing


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SquareAutocorrelation:
    """R_train as square matrices.

    Attributes:
        matrices: The mean of φφᵀ in each layer block.
        examples: Number of examples.
    """

    matrices: Float[Tensor, "blocks dim dim"]
    examples: int

    def tensors(self) -> dict[str, Tensor]:
        """What identifies R_train."""
        return {"autocorrelation": self.matrices}

    def square(self) -> Float[Tensor, "blocks dim dim"]:
        """The mean of φφᵀ in each layer block."""
        return self.matrices

    def shrinkage(self) -> float:
        """See `shrinkage_damping`."""
        return shrinkage_damping(self.matrices, self.examples)

    def spectrum(self) -> Float[Tensor, "eigenvalues"]:
        """R_train's eigenvalues, all blocks pooled, descending."""
        return spectrum_of_autocorrelation(self.matrices)

    def whitening(
        self,
        task: Float[Tensor, "queries dimensions"] | None = None,
        *,
        mixing: float = 0.0,
        damping: float,
        names: Sequence[str],
        rotation: int | None = None,
        advance: Callable[[int], None] = lambda _blocks: None,
    ) -> Whitening:
        """W with WᵀW = R⁻¹, where R = λR_eval + (1-λ)(R_train + cI).

        Args:
            task: φ of the queries that R_eval is the mean over; None only if λ is 0.
            mixing: λ.
            damping: c, as a fraction of R_train's mean eigenvalue per block.
            names: The blocks' names, for errors.
            rotation: Seed of a random rotation of the coordinates; None rotates nothing.
            advance: Callback that receives 1 after each block.

        Raises:
            CurvatureError: R cannot be inverted.
            OptionError: λ or the damping is out of range, or nothing is left of R_train.
        """
        r_eval = autocorrelation(task, len(self.matrices)) if task is not None and mixing > 0 else None
        return whitening(
            self.matrices, r_eval, mixing=mixing, damping=damping, names=names, rotation=rotation, advance=advance
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FewExamples:
    """R_train as the φ of the few examples that it is the mean of.

    Attributes:
        phi: φ of each example.
        blocks: Number of layer blocks.
    """

    phi: Float[Tensor, "examples dimensions"]
    blocks: int

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(self.phi)

    def tensors(self) -> dict[str, Tensor]:
        """What identifies R_train."""
        return {"projected_gradients": self.phi}

    def square(self) -> Float[Tensor, "blocks dim dim"]:
        """The mean of φφᵀ in each layer block, as square matrices."""
        return autocorrelation(self.phi, self.blocks)

    def shrinkage(self) -> float:
        """`shrinkage_damping`, from tr S and tr S² of the Gram matrices, which are those of S."""
        traces = []
        for block in self._by_block():
            gram = (block @ block.mT) / self.examples
            traces.append((float(gram.diagonal().sum()), float(gram.square().sum())))
        return shrinkage_of_traces(traces, dim=self.phi.shape[1] // self.blocks, examples=self.examples)

    def spectrum(self) -> Float[Tensor, "eigenvalues"]:
        """R_train's eigenvalues but for zeros, all blocks pooled, descending."""
        return spectrum_of_examples(self.phi, self.blocks)

    def whitening(
        self,
        task: Float[Tensor, "queries dimensions"] | None = None,
        *,
        mixing: float = 0.0,
        damping: float,
        names: Sequence[str],
        rotation: int | None = None,
        advance: Callable[[int], None] = lambda _blocks: None,
    ) -> AnyWhitening:
        """See `SquareAutocorrelation.whitening`. Square matrices are made if examples and queries together
        have more than two thirds of a block's dimensions.
        """
        check_mixing(mixing)
        check_damping(damping)
        dim = self.phi.shape[1] // self.blocks
        parts = [self.phi * ((1 - mixing) / self.examples) ** 0.5]
        if task is not None and mixing > 0:
            parts.append(task.to(self.phi) * (mixing / len(task)) ** 0.5)
        if 3 * sum(map(len, parts)) > 2 * dim:
            square = SquareAutocorrelation(matrices=self.square(), examples=self.examples)
            return square.whitening(
                task, mixing=mixing, damping=damping, names=names, rotation=rotation, advance=advance
            )
        rows = torch.cat(parts)
        if not torch.isfinite(rows).all():
            raise CurvatureError(
                "R: expected finite gradients, found NaN or infinite ones; check the index with `verify`"
            )
        ridges = checked_ridges(self._traces(), dim, mixing=mixing, damping=damping, names=names)
        return LowRankWhitening.of_rows(rows, ridges, seed=rotation, advance=advance)

    def _traces(self) -> Float64[Tensor, "blocks"]:
        return torch.stack([block.square().sum() for block in self._by_block()]) / self.examples

    def _by_block(self) -> list[Float64[Tensor, "examples dim"]]:
        return [block.double() for block in self.phi.reshape(self.examples, self.blocks, -1).unbind(1)]


TrainAutocorrelation = SquareAutocorrelation | FewExamples
"""R_train in one of its two forms, which have the same methods."""
