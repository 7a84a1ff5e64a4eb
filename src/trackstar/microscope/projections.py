"""The two random projections P of a network's gradient, as linear maps of all of its parameters.

Both draw their numbers with `random_projection`, as an index does.
"""

import abc
from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.gradients.projection import random_projection
from trackstar.microscope.network import Gradients, flattened


class Projection(abc.ABC):
    """P, from the parameters of a network to a few dimensions."""

    dimensions: int

    @abc.abstractmethod
    def apply(self, gradients: Gradients) -> Float[Tensor, "examples dimensions"]:
        """φ = P G of each example."""

    @abc.abstractmethod
    def rows(self) -> Float[Tensor, "dimensions parameters"]:
        """P as one matrix."""


@final
class TwoSided(Projection):
    """P₀ G P₁ᵀ of each weight matrix, and P₀ g of each bias (Eq. 4); side² and side dimensions.

    Args:
        shapes: Shape of each parameter.
        side: Rows and columns of a projected matrix.
        seed: Seed of the random numbers.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, side: int, seed: int) -> None:
        self._halves = {
            name: [
                random_projection(seed, f"{name} {half}", length, side)
                for half, length in zip(("left", "right"), shape, strict=False)
            ]
            for name, shape in shapes.items()
        }
        self.dimensions = sum(side ** len(shape) for shape in shapes.values())

    def apply(self, gradients: Gradients) -> Float[Tensor, "examples dimensions"]:
        """The parameters' projected gradients, one after the other."""
        parts = []
        for name, gradient in gradients.items():
            left, *right = self._halves[name]
            # P₀ G P₁ᵀ with P₀ᵀ = left and P₁ᵀ = right
            part = left.T @ gradient @ right[0] if right else gradient @ left
            parts.append(part.flatten(1))
        return torch.cat(parts, dim=1)

    def rows(self) -> Float[Tensor, "dimensions parameters"]:
        """Block by block, P₀ ⊗ P₁."""
        blocks = [
            torch.kron(halves[0].T.contiguous(), halves[1].T.contiguous()) if len(halves) == 2 else halves[0].T
            for halves in self._halves.values()
        ]
        return torch.block_diag(*blocks)


@final
class OneSided(Projection):
    """P vec(G) of all parameters together, with one dense P.

    Args:
        shapes: Shape of each parameter.
        dimensions: Dimensions of φ.
        seed: Seed of the random numbers.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], *, dimensions: int, seed: int) -> None:
        parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
        self._projection = random_projection(seed, "flattened", parameters, dimensions)
        self.dimensions = dimensions

    def apply(self, gradients: Gradients) -> Float[Tensor, "examples dimensions"]:
        """The flattened gradient's projection."""
        return flattened(gradients) @ self._projection

    def rows(self) -> Float[Tensor, "dimensions parameters"]:
        """P."""
        return self._projection.T
