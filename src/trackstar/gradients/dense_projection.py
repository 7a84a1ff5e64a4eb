"""Project flattened gradients by one dense matrix a weight matrix, φ = P vec(G/√V): what two-sided projection replaces.

P is side²×(rows·columns), its entries normal with mean 0 and variance 1/side²: the plain Johnson-Lindenstrauss map of
TRAK and others, a reference for the two-sided one of Eq. 4. It needs every example's G, and memory of dimensions times
parameters, and is there for small models only.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.errors import OptionError
from trackstar.gradients.projection import inverse_roots, random_projection
from trackstar.gradients.second_moment import SecondMoment
from trackstar.model.language_model import LanguageModel
from trackstar.model.layer_blocks import WeightMatrix

LARGEST_BYTES = 6 * 2**30
"""Most memory for the dense projections."""

_ENTRIES_AT_ONCE = 2**25


def check_flattened_size(matrices: Iterable[WeightMatrix], side: int) -> None:
    """See that dense projections of all matrices are small enough.

    Raises:
        OptionError: They are not.
    """
    parameters = sum(matrix.rows * matrix.columns for matrix in matrices)
    wanted = parameters * side**2 * 4
    if wanted > LARGEST_BYTES:
        raise OptionError(
            f"--projection one-sided: {parameters:,} parameters by {side**2:,} dimensions need {wanted / 2**30:,.1f} "
            f"GiB, expected at most {LARGEST_BYTES / 2**30:.0f}; take a smaller --side or model, or the two-sided one"
        )


class FlattenedGradients:
    """Sums φ = P vec(G/√V) of a batch, block by block; a block is the sum of its matrices'.

    Args:
        model: The model, whose layer blocks φ follows.
        second_moment: V, checked against the model.
        seed: Of the projections.
        side: A block of φ has side² entries, as the two-sided projection's.

    Raises:
        OptionError: The projections would be larger than `LARGEST_BYTES`.
    """

    def __init__(self, model: LanguageModel, second_moment: SecondMoment, *, seed: int = 0, side: int = 64) -> None:
        check_flattened_size(model.matrices, side)
        self.side = side
        self.dimensions = len(model.blocks) * side * side
        self._blocks = len(model.blocks)
        model.check_on_one_device("--projection one-sided")
        self._device = model.device
        self._projections: dict[str, Tensor] = {}
        self._inverse_roots: dict[str, Tensor] = {}
        for matrix in model.matrices:
            drawn = random_projection(seed, f"{matrix.name} flattened", matrix.rows * matrix.columns, side * side)
            self._projections[matrix.name] = drawn.to(self._device)
            root = inverse_roots(matrix, second_moment)
            if isinstance(root, tuple):
                root = torch.outer(*root)
            if root is not None:
                self._inverse_roots[matrix.name] = root.to(self._device)
        self._sums = torch.zeros(0)

    def start(self, examples: int) -> None:
        """Begin a batch: all sums are zero."""
        self._sums = torch.zeros(self._blocks, examples, self.side * self.side, device=self._device)

    def keep(self, matrix: WeightMatrix, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        """The inputs themselves."""
        return inputs

    def add(
        self,
        matrix: WeightMatrix,
        kept: Float[Tensor, "batch tokens columns"],
        gradients: Float[Tensor, "batch tokens rows"],
    ) -> None:
        """Add P vec(G/√V) to the matrix's block, a few examples at once."""
        projection, root = self._projections[matrix.name], self._inverse_roots.get(matrix.name)
        at_once = max(1, _ENTRIES_AT_ONCE // (matrix.rows * matrix.columns))
        for first in range(0, kept.shape[0], at_once):
            part = slice(first, first + at_once)
            gradient = gradients[part].float().mT @ kept[part].float()
            if root is not None:
                gradient *= root
            self._sums[matrix.block][part] += gradient.flatten(1) @ projection

    def result(self) -> Float[Tensor, "batch dimensions"]:
        """φ of each example of the batch that has just run, its blocks one after the other, in float32."""
        return self._sums.transpose(0, 1).reshape(self._sums.shape[1], self.dimensions)
