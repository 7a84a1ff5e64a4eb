"""Tail-patch of pairs of queries and proponents: checks, the two paths, probabilities (paper, §5.2)."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float64

from trackstar.corpus import TokenizedExample
from trackstar.errors import GradientError, OptionError, check_choice
from trackstar.model.completion_probabilities import measured_log_probabilities
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.tail_patch.effects import Pair, TailPatch
from trackstar.tail_patch.exact import exact_log_probabilities
from trackstar.tail_patch.fast import fast_log_probabilities
from trackstar.tail_patch.step import TrainingStep


def tail_patch(
    model: LanguageModel,
    step: TrainingStep,
    queries: Sequence[TokenizedExample],
    proponents: Sequence[TokenizedExample],
    pairs: Sequence[Pair],
    *,
    path: Literal["fast", "exact"] = "fast",
    batch_tokens: int = 2048,
    progress: bool = False,
) -> TailPatch:
    """Measure how one step on a proponent changes the probability of a query's completion (paper, §5.2).

    Each step starts from the model as it is. Each proponent is stepped on once for all of its queries.

    Args:
        model: The model; its weights are unchanged afterwards, bit for bit.
        step: The training step.
        queries: Prompts with completions, whose tokens are the targets (`tokenize_query`).
        proponents: Training examples.
        pairs: The pairs to measure; a query's pairs in descending order of influence, for `mean_top_effect`.
        path: `exact` makes the optimizer's own step, for any optimizer. `fast` computes the same
            for Adafactor from low-rank factors, many pairs at a time, and needs float32 weights.
        batch_tokens: Most tokens per batch, padding included.
        progress: Whether to show a progress bar.

    Returns:
        Probabilities before and after, pair by pair.

    Raises:
        OptionError: A pair has an index out of range; an example is too long, has no target or has
            tokens that the model lacks; the step is another model's; or the fast path does not
            support the optimizer or the dtype.
        ModelError: The fast path cannot move one of the step's parameters; the message names it.
        GradientError: A probability is not finite; the message names the examples.
    """
    check_choice("path", path, ("fast", "exact"))
    step.check_model(model)
    _check(model, queries, proponents, pairs)
    used = sorted({pair.query for pair in pairs})
    before = np.zeros(len(queries))
    with model.frozen(), Progress("Tail-patch", unit="pairs", total=len(pairs), shown=progress) as bar:
        before[used] = measured_log_probabilities(model, [queries[q] for q in used], batch_tokens=batch_tokens)
        for query in used:
            if not np.isfinite(before[query]):
                raise GradientError(
                    f"{queries[query].example_id}: the probability of its completion is not finite; expected a "
                    "number; check the weights"
                )
        if path == "exact":
            after = exact_log_probabilities(
                model, step, queries, proponents, pairs, batch_tokens=batch_tokens, advance=bar.advance
            )
        else:
            after = fast_log_probabilities(
                model, step, queries, proponents, pairs, batch_tokens=batch_tokens, note=bar.note, advance=bar.advance
            )
    _check_finite(after, queries, proponents, pairs)
    return TailPatch(
        pairs=tuple(pairs),
        before=np.exp(before[[pair.query for pair in pairs]]),
        after=np.exp(after),
        step=step.description,
    )


def _check(
    model: LanguageModel,
    queries: Sequence[TokenizedExample],
    proponents: Sequence[TokenizedExample],
    pairs: Sequence[Pair],
) -> None:
    """Raise unless each pair is of two examples that the model can read, each with a target.

    Raises:
        OptionError: A pair or an example cannot be used; the message names it.
    """
    used: dict[tuple[str, int], TokenizedExample] = {}
    for number, pair in enumerate(pairs):
        for role, index, examples in (("query", pair.query, queries), ("proponent", pair.proponent, proponents)):
            if not 0 <= index < len(examples):
                raise OptionError(f"`pairs`: pair {number} has {role} {index}, expected 0 to {len(examples) - 1}")
            used[role, index] = examples[index]
    vocabulary = len(model.module.get_input_embeddings().get_parameter("weight"))
    for (role, _), example in used.items():
        name, tokens = f"{role} {example.example_id}", len(example.token_ids)
        if not example.target_mask[1:].any():
            raise OptionError(f"{name}: found no target token after its first, expected at least one")
        if tokens > model.context_tokens:
            raise OptionError(f"{name}: found {tokens} tokens, expected at most the model's {model.context_tokens}")
        if example.token_ids.min() < 0 or example.token_ids.max() >= vocabulary:
            raise OptionError(f"{name}: found a token that the model's vocabulary of {vocabulary} lacks")


def _check_finite(
    after: Float64[np.ndarray, "pairs"],
    queries: Sequence[TokenizedExample],
    proponents: Sequence[TokenizedExample],
    pairs: Sequence[Pair],
) -> None:
    wrong = np.flatnonzero(~np.isfinite(after))
    if len(wrong):
        pair = pairs[wrong[0]]
        raise GradientError(
            f"{proponents[pair.proponent].example_id}: after a step on it, the probability of "
            f"{queries[pair.query].example_id}'s completion is not finite; expected a number; check the weights, the "
            "optimizer's state and the learning rate"
        )
