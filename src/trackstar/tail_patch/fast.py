"""Tail-patch without changing weights: gradients of some proponents, then their queries through adapters.

The proponents of a group run forward and backward together (`factors`), their steps are computed
from the gradients' factors (`adafactor`), and all pairs of the group run through patched forward
passes (`patched`). Groups are bounded by tokens and by the memory of their factors. If memory runs
out nevertheless, they are halved.
"""

import dataclasses
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

# Bytes of the factors of a group of proponents; a single proponent may need more.
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
            f"tail-patch: found weights of {model.dtype_name}, to which a real step would be "
            'rounded, expected float32; load the model with `dtype="float32"`, or use the exact path, `path="exact"`'
        )
    layout = find_layout(model, step)
    measurement = _Measurement(
        model=model,
        layout=layout,
        steps=parameter_steps(step, layout.parameters),
        mean=step.loss == "mean",
        queries=queries,
        proponents=proponents,
        pairs=pairs,
        batch_tokens=batch_tokens,
    )
    pairs_of = by_proponent(pairs)
    used = list(pairs_of)
    lengths = [len(proponents[proponent].token_ids) for proponent in used]
    bytes_per_token = layout.numbers_per_token * model.head.weight.element_size()
    budget = min(batch_tokens, max(1, FACTOR_BYTES // bytes_per_token))
    after = np.zeros(len(pairs))
    groups = [[used[index] for index in indices] for indices in plan_batches(lengths, budget)]
    for group, (numbers, log_probabilities) in run_adaptively(
        groups, lambda group: measurement.of_group(group, [pairs_of[proponent] for proponent in group]), note
    ):
        after[numbers] = log_probabilities
        advance(sum(len(pairs_of[proponent]) for proponent in group))
    return after


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Measurement:
    """Measures the pairs of a group of proponents at a time."""

    model: LanguageModel
    layout: Layout
    steps: dict[str, ParameterStep]
    mean: bool
    queries: Sequence[TokenizedExample]
    proponents: Sequence[TokenizedExample]
    pairs: Sequence[Pair]
    batch_tokens: int

    def of_group(self, group: list[int], pairs_of_group: list[list[int]]) -> tuple[list[int], np.ndarray]:
        """Measure the pairs of a group.

        Args:
            group: Indices of the proponents.
            pairs_of_group: Indices of each proponent's pairs.

        Returns:
            The indices of all these pairs, and the log-probabilities of their queries after the step.
        """
        batch = make_batch(self.proponents, group, device=self.model.device)
        factors = gradient_factors(self.model, self.layout, batch, mean=self.mean)
        finite = torch.isfinite(factors.losses)
        if not finite.all():
            wrong = self.proponents[group[int(finite.int().argmin())]]
            raise GradientError(f"{wrong.example_id}: its loss is not finite; expected a number; check the weights")
        adapters = make_adapters(self.layout, self.steps, factors)
        del factors
        owners = {number: owner for owner, numbers in enumerate(pairs_of_group) for number in numbers}
        numbers = list(owners)
        log_probabilities = np.zeros(len(numbers))
        lengths = [len(self.queries[self.pairs[number].query].token_ids) for number in numbers]
        for rows in plan_batches(lengths, self.batch_tokens):
            rows.sort()  # in the order of `numbers`: by proponent
            queries = [self.pairs[numbers[row]].query for row in rows]
            patched = patched_log_probabilities(
                self.model,
                self.layout,
                adapters,
                make_batch(self.queries, queries, device=self.model.device),
                [owners[numbers[row]] for row in rows],
            )
            log_probabilities[rows] = patched.cpu().numpy()
        return numbers, log_probabilities
