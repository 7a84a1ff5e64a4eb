"""From tokenized examples to φ = P(∇Loss/√V) and losses, batch by batch (Eq. 4)."""

from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.choices import Output, ProjectionKind
from trackstar.corpus import TokenizedExample
from trackstar.gradients.dense_projection import FlattenedGradients
from trackstar.gradients.per_example import BatchedPass
from trackstar.gradients.projection import ProjectedGradients
from trackstar.gradients.second_moment import SecondMoment
from trackstar.model.language_model import LanguageModel


@final
class GradientProjector:
    """From tokenized examples to φ = P(∇Loss/√V) and losses, in batches of similar length.

    Hooks stay on the model until the projector is closed; use it as a context manager.

    Args:
        model: The model.
        second_moment: V.
        seed: Seed of the projections.
        side: Rows and columns of a block of φ.
        batch_tokens: Most tokens per batch, padding included.
        note: Callback that receives a line when memory runs out and batches become smaller.
        output: The function that is differentiated.
        kind: Whether P is two-sided, or dense for flattened gradients.
    """

    def __init__(
        self,
        model: LanguageModel,
        second_moment: SecondMoment,
        *,
        seed: int,
        side: int,
        batch_tokens: int,
        note: Callable[[str], None],
        output: Output = "loss",
        kind: ProjectionKind = "two-sided",
    ) -> None:
        self._model = model
        gradients = ProjectedGradients if kind == "two-sided" else FlattenedGradients
        self._gradients = gradients(model, second_moment, seed=seed, side=side)
        self._pass = BatchedPass(model, self._gradients, batch_tokens=batch_tokens, note=note, output=output)

    def __enter__(self) -> "GradientProjector":
        self._pass.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._pass.__exit__(*error)

    @property
    def device(self) -> torch.device:
        """Device that φ is computed on."""
        return self._model.device

    @property
    def dimensions(self) -> int:
        """Dimensions of φ."""
        return self._gradients.dimensions

    def batches(self, examples: Sequence[TokenizedExample]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield each batch's example indices, φ in float32 and losses in nats, on the model's device.

        Raises:
            OptionError: A single example does not fit in memory.
            GradientError: A loss or gradient is not finite; the message names the example.
        """
        return self._pass.batches(examples, self._gradients.result)


def projected(
    projector: GradientProjector,
    examples: Sequence[TokenizedExample],
    advance: Callable[[int], None] = lambda _examples: None,
) -> tuple[Float[Tensor, "examples dimensions"], Float[Tensor, "examples"]]:
    """φ of the examples, in their order, and their losses in nats, on the CPU.

    Args:
        projector: Computes φ.
        examples: The examples.
        advance: Callback that receives the number of examples of each finished batch.
    """
    phi, losses = torch.empty(len(examples), projector.dimensions), torch.empty(len(examples))
    for indices, batch_phi, batch_losses in projector.batches(examples):
        phi[torch.tensor(indices)] = batch_phi.cpu()
        losses[torch.tensor(indices)] = batch_losses.cpu()
        advance(len(indices))
    return phi, losses
