"""R, the Gauss-Newton autocorrelation of projected gradients, its mixing with a task's, and whitening (Eq. 2-3).

R is block-diagonal, a block a layer block: the *mean* over examples of φφᵀ. (Sum or mean is the same as long as only
one R is used, but not once R_eval and R_train are mixed; the paper does not say, we take the mean.)

Scores only need some W with WᵀW = R⁻¹: for any such W the inner products Wφ·Wφ' = φᵀR⁻¹φ' and the norms are the
same as with the symmetric R^(-1/2) of Eq. 2. W is taken as the inverse Cholesky factor, which costs a small part of
an eigendecomposition.
"""

import os

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.errors import CurvatureError, OptionError


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
