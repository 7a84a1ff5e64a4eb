"""Tail-patch by the optimizer itself: step on the proponent in place, measure its queries, undo bit for bit.

    θ' = optimizer step of θ on Loss(proponent)
    log p(completion | prompt; θ')     for all of its queries
    θ ← θ

No part of the step is reimplemented: autograd computes gradients, and torch clips them and steps.
One copy of the weights and of the optimizer's state serves all proponents.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.optim import Optimizer

from trackstar.corpus import TokenizedExample
from trackstar.errors import GradientError
from trackstar.model.batching import make_batch
from trackstar.model.completion_probabilities import bounded_logits, measured_log_probabilities, shifted
from trackstar.model.language_model import LanguageModel
from trackstar.tail_patch.effects import Pair, by_proponent
from trackstar.tail_patch.step import TrainingStep


def exact_log_probabilities(
    model: LanguageModel,
    step: TrainingStep,
    queries: Sequence[TokenizedExample],
    proponents: Sequence[TokenizedExample],
    pairs: Sequence[Pair],
    *,
    batch_tokens: int,
    advance: Callable[[int], None] = lambda _pairs: None,
) -> Float64[np.ndarray, "pairs"]:
    """log p(completion | prompt) of each pair's query after one step on its proponent, in nats.

    Dropout is off, as in the model's evaluation mode. Weights, their `requires_grad` and `grad`,
    and the optimizer's state are restored afterwards, also after an exception.

    Raises:
        GradientError: The loss of a proponent is not finite.
    """
    after = np.zeros(len(pairs))
    with model.frozen(), _undoable(step.optimizer) as undo:
        for proponent, numbers in by_proponent(pairs).items():
            try:
                _make_step(model, step, proponents[proponent])
                of_proponent = [queries[pairs[number].query] for number in numbers]
                after[numbers] = measured_log_probabilities(model, of_proponent, batch_tokens=batch_tokens)
            finally:
                undo()
            advance(len(numbers))
    return after


def _make_step(model: LanguageModel, step: TrainingStep, proponent: TokenizedExample) -> None:
    """Make one optimizer step on one example, in place; `undo` removes the gradients."""
    batch = make_batch([proponent], [0], device=model.device)
    _, targets, counts = shifted(batch)
    with torch.enable_grad():
        states = model.hidden_states(batch.token_ids[:, :-1])[counts]
        logits = bounded_logits(model.head, nn.functional.linear(states, model.head.weight, model.head.bias))
        loss = nn.functional.cross_entropy(logits, targets[counts], reduction="sum")
        if step.loss == "mean":
            loss = loss / int(counts.sum())
        loss.backward()
    if not torch.isfinite(loss):
        raise GradientError(f"{proponent.example_id}: its loss is not finite; expected a number; check the weights")
    if step.max_gradient_norm is not None:
        nn.utils.clip_grad_norm_(model.module.parameters(), step.max_gradient_norm)
    step.optimizer.step()


@contextmanager
def _undoable(optimizer: Optimizer) -> Iterator[Callable[[], None]]:
    """Make the parameters trainable; yield a function that restores them and the optimizer's state."""
    parameters: list[nn.Parameter] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trainable = [parameter.requires_grad for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    weights = [parameter.detach().clone() for parameter in parameters]
    # The optimizer's tensors, which it may change in place or replace, and copies of their values.
    states: list[dict[str, Any]] = [dict(optimizer.state.get(parameter, {})) for parameter in parameters]
    copies = [{k: v.clone() for k, v in state.items() if isinstance(v, Tensor)} for state in states]

    @torch.no_grad()
    def undo() -> None:
        for parameter, weight, state, copied in zip(parameters, weights, states, copies, strict=True):
            parameter.copy_(weight)
            parameter.grad = None
            for key, value in copied.items():
                state[key].copy_(value)
            if state:
                optimizer.state[parameter] = dict(state)
            else:
                optimizer.state.pop(parameter, None)

    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        yield undo
    finally:
        for parameter, was_trainable, gradient in zip(parameters, trainable, gradients, strict=True):
            parameter.requires_grad_(was_trainable)
            parameter.grad = gradient
