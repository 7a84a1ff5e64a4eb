"""The cost of projected gradients of fused experts, against a dense model with as many active weights.

    OMP_NUM_THREADS=1 python benchmarks/experts.py

Both run in turns in one process. Beside the ratio of the gradients' costs stands that of the forward passes alone: a
mixture's own cost, whatever is attributed. A third ratio is the padded default against the routed products.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from measurement import save
from trackstar.corpus import TokenizedExample
from trackstar.gradients.consumer import GradientConsumer
from trackstar.gradients.per_example import BatchedPass
from trackstar.gradients.projection import ProjectedGradients
from trackstar.gradients.second_moment import NO_SECOND_MOMENT
from trackstar.model.batching import make_batch
from trackstar.model.language_model import LanguageModel, wrap_model

ROUNDS = 5
EXAMPLES, TOKENS = 16, 128
SIDE = 32
WIDTH: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": TOKENS,
}
EXPERT_WIDTH = 256
MIXTURES = {"8 experts, 2 per token": (8, 2), "64 experts, 4 per token": (64, 4)}


class Padded(ProjectedGradients):  # pyright: ignore[reportGeneralTypeIssues] - final in the package
    """Each expert's tokens as a padded batch of its own: the default of `GradientConsumer`."""

    save_routed = GradientConsumer.save_routed
    add_routed = GradientConsumer.add_routed


def main() -> None:
    figures: dict[str, object] = {
        "examples": EXAMPLES,
        "tokens": TOKENS,
        "side": SIDE,
        "threads": torch.get_num_threads(),
    }
    for name, (experts, choices) in MIXTURES.items():
        mixture = wrapped(
            MixtralForCausalLM(
                MixtralConfig(
                    **WIDTH,
                    intermediate_size=EXPERT_WIDTH,
                    num_local_experts=experts,
                    num_experts_per_tok=choices,
                    sliding_window=None,
                )
            )
        )
        dense = wrapped(LlamaForCausalLM(LlamaConfig(**WIDTH, intermediate_size=EXPERT_WIDTH * choices)))
        figures[name] = compared(dense, mixture)
    save("experts-cpu", figures)


def wrapped(module: Any) -> LanguageModel:
    return wrap_model(module, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())))


def compared(dense: LanguageModel, mixture: LanguageModel) -> dict[str, float]:
    """Seconds of each way by the median of its rounds, and their ratios."""
    draw = np.random.default_rng(0)
    examples = [
        TokenizedExample(
            example_id=str(number),
            parent_id=str(number),
            record=number,
            window=0,
            text="",
            token_ids=draw.integers(0, WIDTH["vocab_size"], TOKENS).astype(np.int32),
            target_mask=np.arange(TOKENS) >= 1,
        )
        for number in range(EXAMPLES)
    ]
    # Drawing the projections is no part of a batch.
    of_dense, of_mixture, padded = (
        kind(model, NO_SECOND_MOMENT, side=SIDE)
        for kind, model in ((ProjectedGradients, dense), (ProjectedGradients, mixture), (Padded, mixture))
    )
    ways: dict[str, Callable[[], None]] = {
        "dense_forward": lambda: forward(dense, examples),
        "mixture_forward": lambda: forward(mixture, examples),
        "dense_gradients": lambda: gradients(dense, of_dense, examples),
        "mixture_gradients": lambda: gradients(mixture, of_mixture, examples),
        "mixture_gradients_padded": lambda: gradients(mixture, padded, examples),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way, run in ways.items():
            start = time.process_time()
            run()
            if turn:  # the first warms up
                seconds[way].append(time.process_time() - start)
    medians = {way: statistics.median(of) for way, of in seconds.items()}
    return {f"{way}_seconds": round(value, 4) for way, value in medians.items()} | {
        "gradients_ratio": round(medians["mixture_gradients"] / medians["dense_gradients"], 3),
        "forward_ratio": round(medians["mixture_forward"] / medians["dense_forward"], 3),
        "padded_ratio": round(medians["mixture_gradients_padded"] / medians["mixture_gradients"], 3),
    }


@torch.no_grad()
def forward(model: LanguageModel, examples: list[TokenizedExample]) -> None:
    model.hidden_states(make_batch(examples, range(len(examples))).token_ids)


def gradients(model: LanguageModel, consumer: ProjectedGradients, examples: list[TokenizedExample]) -> None:
    with BatchedPass(model, consumer, batch_tokens=EXAMPLES * TOKENS, note=print) as run:
        for _ in run.batches(examples, consumer.result):
            pass


if __name__ == "__main__":
    main()
