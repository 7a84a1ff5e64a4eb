"""R, the Gauss-Newton autocorrelation of projected gradients: per layer block the mean of φφᵀ over
examples (Eq. 2).

The paper does not say whether R is a sum or a mean. Scores are the same with either as long as one
R is used, but not once R_eval and R_train are mixed. This package uses the mean.
"""

import os

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.errors import CurvatureError, OptionError


def check_autocorrelation_size(blocks: int, side: int, device: torch.device | str = "cpu") -> None:
    """Raise if R does not fit into the device's memory, before anything is written.

    Raises:
        OptionError: R does not fit; the message names `side`.
    """
    wanted = blocks * side**4 * 8  # sums in float64
    device = torch.device(device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > memory:
        raise OptionError(
            f"`side`: expected R of {blocks} layer blocks to fit into {memory / 2**30:,.1f} GiB of memory, found "
            f"{wanted / 2**30:,.1f} GiB for side {side}; pass a smaller `side`"
        )


# Rows of a block's sums that one matrix product computes.
_PANEL = 1024


class Autocorrelation:
    """Sum φφᵀ over batches of examples, in float64, for each layer block.

    The sum over one batch is a float32 product. A block's sums depend on the batches and their
    order alone.

    Args:
        blocks: Number of layer blocks.
        dimensions: Dimensions of one block, side².
        device: Device of the sums.
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
                # A product need not be symmetric to the last bit: what lies above the diagonal
                # counts.
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
