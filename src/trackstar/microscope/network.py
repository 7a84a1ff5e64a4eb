"""A network of two layers, h = relu(W₁x + b₁), logits = W₂h + b₂, with the gradients of each example's loss.

Weights *and* biases are covered, all of them: nothing is left out of this picture.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from trackstar.microscope.images import Images

Weights = Mapping[str, Tensor]
Gradients = Mapping[str, Tensor]
"""∇Loss of each example by parameter: [examples, rows, columns], or [examples, rows] of a bias."""

_BATCH = 50
_LEARNING_RATE = 3e-3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Network:
    """A trained network.

    Attributes:
        weights: `first.weight`, `first.bias`, `second.weight` and `second.bias`.
    """

    weights: Weights

    @classmethod
    def train(cls, images: Images, *, hidden: int, epochs: int, seed: int) -> "Network":
        """A network with that many hidden units, trained by Adam; a function of images and seed."""
        generator = torch.Generator().manual_seed(seed)
        features, classes = images.features.shape[1], images.classes
        weights = {
            "first.weight": torch.randn(hidden, features, generator=generator) * (1 / features) ** 0.5,
            "first.bias": torch.zeros(hidden),
            "second.weight": torch.randn(classes, hidden, generator=generator) * (1 / hidden) ** 0.5,
            "second.bias": torch.zeros(classes),
        }
        for weight in weights.values():
            weight.requires_grad_()
        optimizer = torch.optim.Adam(list(weights.values()), lr=_LEARNING_RATE)
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=generator).split(_BATCH):
                optimizer.zero_grad()
                batch = images.part(rows)
                functional.cross_entropy(logits(weights, batch.features), batch.labels).backward()
                optimizer.step()
        return cls(weights={name: weight.detach() for name, weight in weights.items()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter."""
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(weight.numel() for weight in self.weights.values())

    def accuracy(self, images: Images) -> float:
        """Share of the images whose class gets the largest logit."""
        return float((logits(self.weights, images.features).argmax(1) == images.labels).float().mean())

    def gradients(self, images: Images) -> dict[str, Tensor]:
        """∇Loss of each image: the outer products of the layers' output gradients and inputs.

        With p the predicted probabilities and y the label, the gradient at the logits is g₂ = p - y, and
        that at the first layer's output is g₁ = (W₂ᵀg₂) ⊙ [h > 0].
        """
        weights = self.weights
        before = images.features @ weights["first.weight"].T + weights["first.bias"]
        hidden = before.relu()
        at_logits = (hidden @ weights["second.weight"].T + weights["second.bias"]).softmax(dim=1)
        at_logits[torch.arange(len(images)), images.labels] -= 1
        at_hidden = (at_logits @ weights["second.weight"]) * (before > 0)
        return {
            "first.weight": at_hidden[:, :, None] * images.features[:, None, :],
            "first.bias": at_hidden,
            "second.weight": at_logits[:, :, None] * hidden[:, None, :],
            "second.bias": at_logits,
        }

    def hessian_products(
        self, images: Images, directions: Float[Tensor, "directions parameters"]
    ) -> Float[Tensor, "directions parameters"]:
        """Hv for each direction v, with H the Hessian of the mean loss, exactly: the gradient of ∇Loss·v."""

        def gradient(flat: Tensor) -> Tensor:
            return torch.func.grad(lambda f: _mean_loss(self._unflattened(f), images))(flat)

        point = torch.cat([self.weights[name].flatten() for name in self.weights])

        product: Any = torch.func.vjp(gradient, point)[1]
        return torch.func.vmap(lambda direction: product(direction)[0], chunk_size=16)(directions)

    def _unflattened(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([weight.numel() for weight in self.weights.values()])
        return {name: part.view(self.weights[name].shape) for name, part in zip(self.weights, parts, strict=True)}


def logits(weights: Weights, features: Float[Tensor, "images features"]) -> Float[Tensor, "images classes"]:
    """W₂ relu(W₁x + b₁) + b₂."""
    hidden = (features @ weights["first.weight"].T + weights["first.bias"]).relu()
    return hidden @ weights["second.weight"].T + weights["second.bias"]


def flattened(gradients: Gradients) -> Float[Tensor, "examples parameters"]:
    """Each example's gradients as one vector, parameter by parameter."""
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)


def _mean_loss(weights: Weights, images: Images) -> Tensor:
    return functional.cross_entropy(logits(weights, images.features), images.labels)
