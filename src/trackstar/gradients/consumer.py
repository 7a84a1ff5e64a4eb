"""What receives the factors of each matrix's gradients, batch by batch (`per_example`)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from trackstar.model.batching import Batch
from trackstar.model.experts import Routing
from trackstar.model.layer_blocks import WeightMatrix


class GradientConsumer(ABC):
    """Sums over the factors g and a of each matrix's gradients.

    For each batch, `gradient_pass` calls `start` once, then `save_for_backward` for each matrix in
    the forward pass, then `add` for each matrix in the backward pass. If memory runs out in the
    middle of a batch, the next call is `start`.
    """

    @abstractmethod
    def start(self, batch: Batch) -> None:
        """Begin a batch, and discard what a batch that did not finish has added."""

    @abstractmethod
    def save_for_backward(self, matrix: WeightMatrix, inputs: Float[Tensor, "batch tokens columns"]) -> Tensor:
        """Return what `add` needs of the matrix's inputs a: themselves, or a projection of them."""

    @abstractmethod
    def add(self, matrix: WeightMatrix, saved: Tensor, gradients: Float[Tensor, "batch tokens rows"]) -> None:
        """Add one matrix's part.

        Args:
            matrix: The matrix.
            saved: The tensor that `save_for_backward` returned for the matrix.
            gradients: g, the gradients of the loss with respect to the matrix's outputs; zero on padding.
        """

    def save_routed(
        self, matrices: Mapping[int, WeightMatrix], inputs: Float[Tensor, "pairs columns"], routing: Routing
    ) -> Any:
        """Return what `add_routed` needs of the inputs of fused experts.

        An expert's tokens are given to `save_for_backward` as a batch of its own, padded with zeros.

        Args:
            matrices: The experts' matrices by number.
            inputs: The inputs of each pair of a token and an expert.
            routing: The pairs.
        """
        return [
            self.save_for_backward(matrices[number], routing.slots(part).padded(inputs[part]))
            for number, part in routing.hit()
            if number in matrices
        ]

    def add_routed(
        self,
        matrices: Mapping[int, WeightMatrix],
        saved: Any,
        gradients: Float[Tensor, "pairs rows"],
        routing: Routing,
    ) -> None:
        """Add the parts of fused experts, by `add` on one expert after the other.

        Args:
            matrices: The experts' matrices by number.
            saved: What `save_routed` returned.
            gradients: g of each pair of a token and an expert.
            routing: The pairs.
        """
        hit = [(number, part) for number, part in routing.hit() if number in matrices]
        for (number, part), of_expert in zip(hit, saved, strict=True):
            self.add(matrices[number], of_expert, routing.slots(part).padded(gradients[part]))


def gradient_matrices(
    inputs: Float[Tensor, "*batch tokens columns"], gradients: Float[Tensor, "*batch tokens rows"]
) -> Float[Tensor, "*batch rows columns"]:
    """G = Σ_t g_t a_tᵀ, materialized in float32, for the consumers that cannot do without it."""
    return gradients.float().mT @ inputs.float()
