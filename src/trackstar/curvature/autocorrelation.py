"""R, the Gauss-Newton autocorrelation of projected gradients: per layer block the mean of φφᵀ over
examples (Eq. 2).

The paper does not say whether R is a sum or a mean. Scores are the same with either as long as one
R is used, but not once R_eval and R_train are mixed. This package uses the mean.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trackstar.errors import CurvatureError

# Rows of a block's sums that one matrix product computes, and that are stored without what lies left
# of them: 17/32 of a block of 4,096 dimensions.
_PANEL = 256


class Autocorrelation:
    """Sum φφᵀ over batches of examples, in float64, for each layer block.

    The sum over one batch is a float32 product. A block's sums depend on the batches and their
    order alone. The sums are symmetric: of each panel of rows, what lies left of its own columns is
    neither computed nor stored. They take 1.1 GiB in the paper's setting.

    Args:
        blocks: Number of layer blocks.
        dimensions: Dimensions of one block, side².
        device: Device of the sums.
    """

    def __init__(self, blocks: int, dimensions: int, *, device: torch.device | str = "cpu") -> None:
        self.dimensions = dimensions
        self.examples = 0
        size = sum(len(rows) * (dimensions - rows.start) for rows in _panels(dimensions))
        self.sums: list[Tensor] = [torch.zeros(size, dtype=torch.float64, device=device) for _ in range(blocks)]
        """Of each block, in float64: the panels one after the other, row by row."""

    def add(self, projected_gradients: Float[Tensor, "examples dimensions"]) -> None:
        """Add examples' φφᵀ."""
        phi = projected_gradients.to(self.sums[0].device, torch.float32)
        for sums, rows in zip(self.sums, phi.reshape(len(phi), len(self.sums), self.dimensions).unbind(1), strict=True):
            block = rows.contiguous()
            for panel, total in self._of_panels(sums):
                total += block[:, panel.start : panel.stop].T @ block[:, panel.start :]
        self.examples += len(phi)

    def mean(self) -> Float[Tensor, "blocks dim dim"]:
        """R, in float32: the mean over all examples added.

        Raises:
            CurvatureError: No example was added.
        """
        return self._mean(keep=True)

    def final_mean(self) -> Float[Tensor, "blocks dim dim"]:
        """`mean`, which frees each block's sums when it has its mean; nothing can be added afterwards."""
        return self._mean(keep=False)

    def _mean(self, *, keep: bool) -> Float[Tensor, "blocks dim dim"]:
        if self.examples == 0:
            raise CurvatureError("autocorrelation: found no example, expected one or more")
        mean = torch.empty(len(self.sums), self.dimensions, self.dimensions, device=self.sums[0].device)
        for number, whole in enumerate(mean):
            for panel, sums in self._of_panels(self.sums[number]):
                rows = (sums / self.examples).float()
                count = len(panel)
                # A product need not be symmetric to the last bit: what lies above the diagonal
                # counts.
                rows[:, :count] = rows[:, :count].triu() + rows[:, :count].triu(1).T
                whole[panel.start : panel.stop, panel.start :] = rows
                whole[panel.start :, panel.start : panel.stop] = rows.T
            if not keep:
                self.sums[number] = torch.empty(0)
        return mean

    def _of_panels(self, sums: Float64[Tensor, "packed"]) -> Iterator[tuple[range, Float64[Tensor, "_rows _columns"]]]:
        """The rows of each panel of a block, and their sums from the panel's first column on."""
        first = 0
        for rows in _panels(self.dimensions):
            width = self.dimensions - rows.start
            yield rows, sums[first : first + len(rows) * width].view(len(rows), width)
            first += len(rows) * width


def _panels(dimensions: int) -> list[range]:
    return [range(first, min(first + _PANEL, dimensions)) for first in range(0, dimensions, _PANEL)]


def autocorrelation(
    projected_gradients: Float[Tensor, "examples dimensions"], blocks: int
) -> Float[Tensor, "blocks dim dim"]:
    """R of a few examples' φ (Eq. 2): the mean of φφᵀ in each layer block, in squared units of φ."""
    total = projected_gradients.shape[1]
    accumulator = Autocorrelation(blocks, total // blocks, device=projected_gradients.device)
    accumulator.add(projected_gradients)
    return accumulator.final_mean()
