"""Tail-patch without touching a weight: gradients of a group of proponents once, then their queries through adapters.

A group's proponents are run forward and backward together, each step is made from the gradients' factors
(`adafactor`), and all pairs of the group go through patched forward passes (`patched`). Groups are bounded by tokens
and by the memory of their factors; where memory runs out all the same, they are halved.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float64

from trackstar.corpus import TokenizedExample
from trackstar.errors import GradientError, OptionError
from trackstar.model.batching import make_batch, plan_batches, run_adaptively
from trackstar.model.language_model import LanguageModel
from trackstar.tail_patch.adafactor import ParameterStep, parameter_steps
from trackstar.tail_patch.effects import Pair, by_proponent
from trackstar.tail_patch.factors import gradient_factors
from trackstar.tail_patch.layout import Layout, find_layout
from trackstar.tail_patch.patched import make_adapters, patched_log_probabilities
from trackstar.tail_patch.step import TrainingStep

# The factors of a group of proponents take about this many bytes; a single proponent may take more.
FACTOR_BYTES = 1 << 30


def fast_log_probabilities(
    model: LanguageModel,
    step: TrainingStep,
    queries: Sequence[TokenizedExample],
    proponents: Sequence[TokenizedExample],
    pairs: Sequence[Pair],
    *,
    batch_tokens: int,
    note: Callable[[str], None] = lambda _line: None,
    advance: Callable[[int], None] = lambda _pairs: None,
) -> Float64[np.ndarray, "pairs"]:
    """log p(completion | prompt) of each pair's query after one step on its proponent, in nats.

    Raises:
        GradientError: The loss of a proponent is not finite.
        ModelError: The step moves a parameter that cannot be patched row by row; the message names it.
        OptionError: The step is not Adafactor's, or the weights are not float32 (or 64).
    """
    if model.dtype not in (torch.float32, torch.float64):
        raise OptionError(
            f"tail-patch: found weights of {str(model.dtype).removeprefix('torch.')}, to which a real step would be "
            "rounded; expected float32 (--dtype float32), or use the exact path"
        )
    layout = find_layout(model, step)
    steps = parameter_steps(step, layout.parameters)
    group = _Group(model, step, layout, steps, queries, proponents, pairs, batch_tokens)
    of_proponent = by_proponent(pairs)
    used = list(of_proponent)
    lengths = [len(proponents[place].token_ids) for place in used]
    bytes_per_token = layout.numbers_per_token * model.head.weight.element_size()
    budget = min(batch_tokens, max(1, FACTOR_BYTES // bytes_per_token))
    after = np.zeros(len(pairs))
    groups = [[used[place] for place in places] for places in plan_batches(lengths, budget)]
    for chosen, (places, found) in run_adaptively(
        groups, lambda chosen: group.measured(chosen, [of_proponent[proponent] for proponent in chosen]), note
    ):
        after[places] = found
        advance(sum(len(of_proponent[proponent]) for proponent in chosen))
    return after


class _Group:
    """Measures the pairs of some proponents at a time."""

    def __init__(
        self,
        model: LanguageModel,
        step: TrainingStep,
        layout: Layout,
        steps: dict[str, ParameterStep],
        queries: Sequence[TokenizedExample],
        proponents: Sequence[TokenizedExample],
        pairs: Sequence[Pair],
        batch_tokens: int,
    ) -> None:
        self._model, self._layout, self._steps = model, layout, steps
        self._mean = step.loss == "mean"
        self._queries, self._proponents, self._pairs = queries, proponents, pairs
        self._batch_tokens = batch_tokens

    def measured(self, chosen: list[int], of_chosen: list[list[int]]) -> tuple[list[int], np.ndarray]:
        """The places of these proponents' pairs, and their queries' log-probabilities after the step."""
        batch = make_batch(self._proponents, chosen, device=self._model.device)
        factors = gradient_factors(self._model, self._layout, batch, mean=self._mean)
        finite = torch.isfinite(factors.losses)
        if not finite.all():
            worst = self._proponents[chosen[int(finite.int().argmin())]]
            raise GradientError(f"{worst.example_id}: its loss is not finite; expected a number; check the weights")
        adapters = make_adapters(self._layout, self._steps, factors)
        del factors
        owners = {place: owner for owner, places in enumerate(of_chosen) for place in places}
        places = list(owners)
        found = np.zeros(len(places))
        lengths = [len(self._queries[self._pairs[place].query].token_ids) for place in places]
        for rows in plan_batches(lengths, self._batch_tokens):
            rows.sort()  # as `places`: by proponent
            queries = [self._pairs[places[row]].query for row in rows]
            patched = patched_log_probabilities(
                self._model,
                self._layout,
                adapters,
                make_batch(self._queries, queries, device=self._model.device),
                [owners[places[row]] for row in rows],
            )
            found[rows] = patched.cpu().numpy()
        return places, found
