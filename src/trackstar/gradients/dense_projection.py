"""Project flattened gradients by one dense matrix per weight matrix, φ = P vec(G/√V), to compare with Eq. 4.

P is [side², rows · columns], with normal entries of mean 0 and variance 1/side²: the plain
Johnson-Lindenstrauss map that TRAK and others use, and that the two-sided projection of Eq. 4
replaces. It needs each example's G, and memory for dimensions × parameters, so it is for small
models only.
"""

from collections.abc import Iterable, Iterator
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.errors import OptionError
from trackstar.gradients.consumer import gradient_matrices
from trackstar.gradients.projection import BlockSums, inverse_roots, random_projection
from trackstar.gradients.second_moment import SecondMoment
from trackstar.model.language_model import LanguageModel
from trackstar.model.layer_blocks import WeightMatrix

LARGEST_BYTES = 6 * 2**30
"""Most memory for the dense projections."""

# Entries of gradient matrices that are materialized at the same time.
_MATERIALIZED_ENTRIES = 2**25


def check_flattened_size(matrices: Iterable[WeightMatrix], side: int) -> None:
    """Raise if the dense projections of all matrices take more memory than `LARGEST_BYTES`.

    Raises:
        OptionError: The projections are too large.
    """
    parameters = sum(matrix.rows * matrix.columns for matrix in matrices)
    needed = parameters * side**2 * 4
    if needed > LARGEST_BYTES:
        raise OptionError(
            f'`projection="one-sided"`: {parameters:,} parameters by {side**2:,} dimensions need '
            f"{needed / 2**30:,.1f} GiB, expected at most {LARGEST_BYTES / 2**30:.0f}; choose a smaller `side`, a "
            'smaller model, or `projection="two-sided"`'
        )


def example_slices(examples: int, matrix: WeightMatrix) -> Iterator[slice]:
    """Slices of a batch's examples whose gradients of a matrix fit in memory together."""
    size = max(1, _MATERIALIZED_ENTRIES // (matrix.rows * matrix.columns))
    for first in range(0, examples, size):
        yield slice(first, first + size)


@final
class FlattenedGradients(BlockSums):
    """φ by dense projection: P vec(G/√V), summed over the matrices of each block.

    Args:
        model: The model, whose layer blocks φ has.
        second_moment: V, checked against the model.
        seed: Seed of the projections.
        side: A block of φ has side² entries, as with the two-sided projection.

    Raises:
        OptionError: The side is not positive, or the projections would be larger than `LARGEST_BYTES`.
    """

    def __init__(self, model: LanguageModel, second_moment: SecondMoment, *, seed: int = 0, side: int = 64) -> None:
        super().__init__(model, side)
        check_flattened_size(model.matrices, side)
        self._projections: dict[str, Tensor] = {}
        self._inverse_roots: dict[str, Tensor] = {}
        for matrix in model.matrices:
            drawn = random_projection(seed, f"{matrix.name} flattened", matrix.rows * matrix.columns, side * side)
            device = model.device_of(matrix)
            self._projections[matrix.name] = drawn.to(device)  # [rows · columns, side²]
            root = inverse_roots(matrix, second_moment)
            if isinstance(root, tuple):
                root = torch.outer(*root)
            if root is not None:
                self._inverse_roots[matrix.name] = root.to(device)

    def save_for_backward(self, matrix: WeightMatrix, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        """Return the inputs themselves."""
        return inputs

    def add(self, matrix: WeightMatrix, saved: Tensor, gradients: Float[Tensor, "batch tokens rows"]) -> None:
        """Add P vec(G/√V) to the matrix's block, a few examples at a time."""
        projection, root = self._projections[matrix.name], self._inverse_roots.get(matrix.name)
        for part in example_slices(len(saved), matrix):
            gradient = gradient_matrices(saved[part], gradients[part])
            if root is not None:
                gradient *= root
            projected = gradient.flatten(1) @ projection  # [examples, side²]
            self._sums[matrix.block][part] += projected.unflatten(1, (self.side, self.side)).to(self._device)
