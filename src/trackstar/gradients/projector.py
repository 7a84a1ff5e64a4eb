"""From tokenized examples to φ = P(∇Loss/√V) and losses, batch by batch (Eq. 4)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.choices import Output, ProjectionKind
from trackstar.corpus import TokenizedExample
from trackstar.errors import GradientError
from trackstar.gradients.dense_projection import FlattenedGradients
from trackstar.gradients.per_example import gradient_pass
from trackstar.gradients.projection import ProjectedGradients
from trackstar.gradients.second_moment import SecondMoment
from trackstar.model.batching import Batch, make_batch, plan_batches, run_adaptively
from trackstar.model.language_model import LanguageModel


class GradientProjector:
    """From tokenized examples to φ = P(∇Loss/√V) and losses, in batches of similar length.

    Hooks stay on the model until it is closed; use it as a context manager.

    Args:
        model: The model.
        second_moment: V.
        seed: Of the projections.
        side: Rows and columns of a block of φ.
        batch_tokens: Most tokens of a batch, padding included.
        note: Told when memory runs out and batches are made smaller.
        output: What is differentiated.
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
        self._output: Output = output
        projected = ProjectedGradients if kind == "two-sided" else FlattenedGradients
        self._projected = projected(model, second_moment, seed=seed, side=side)
        self._batch_tokens = batch_tokens
        self._note = note
        self._stack = ExitStack()
        self._pass: Callable[[Batch], Tensor] | None = None

    def __enter__(self) -> "GradientProjector":
        self._pass = self._stack.enter_context(gradient_pass(self._model, self._projected, output=self._output))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def device(self) -> torch.device:
        """Where φ is computed."""
        return self._model.device

    @property
    def dimensions(self) -> int:
        """Dimensions of φ."""
        return self._projected.dimensions

    def batches(self, examples: Sequence[TokenizedExample]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Places of a batch's examples, their φ in float32 and their losses in nats, on the model's device.

        Raises:
            GradientError: A loss or gradient is not finite; the message names the example.
        """
        assert self._pass is not None, "used outside its context"
        run = self._pass

        def run_batch(places: list[int]) -> tuple[Tensor, Tensor]:
            losses = run(make_batch(examples, places, device=self._model.device))
            return self._projected.result(), losses

        plan = plan_batches([len(example.token_ids) for example in examples], self._batch_tokens)
        for places, (phi, losses) in run_adaptively(plan, run_batch, self._note):
            finite = torch.isfinite(phi).all(dim=1) & torch.isfinite(losses)
            if not finite.all():
                worst = examples[places[int(finite.int().argmin())]]
                raise GradientError(
                    f"{worst.example_id}: its loss or gradient is not finite, expected numbers; check the model's "
                    "weights and V, or leave the example out"
                )
            yield places, phi, losses


def projected(
    projector: GradientProjector,
    examples: Sequence[TokenizedExample],
    advance: Callable[[int], None] = lambda _examples: None,
) -> tuple[Float[Tensor, "examples dimensions"], Float[Tensor, "examples"]]:
    """φ of the examples, in their order, and their losses in nats, on the CPU.

    Args:
        projector: Gives φ.
        examples: The examples.
        advance: Told how many have been done.
    """
    phi, losses = torch.empty(len(examples), projector.dimensions), torch.empty(len(examples))
    for places, batch_phi, batch_losses in projector.batches(examples):
        phi[torch.tensor(places)] = batch_phi.cpu()
        losses[torch.tensor(places)] = batch_losses.cpu()
        advance(len(places))
    return phi, losses
