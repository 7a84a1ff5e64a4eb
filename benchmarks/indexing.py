"""Speed of the whole indexing pass against two bare ones over the same batches, interleaved in one run.

The indexing pass: forward and backward for per-example gradients, 65,536 dimensions, a factored V folded in, float16
codes written to disk durably with a checksum, R_train summed. The plain pass: the Transformers model's own forward
with labels and backward, every weight trainable, gradients set to None between batches, no optimizer step. The
activations' pass: the same without gradients of weights, backward to the embeddings.

    python benchmarks/indexing.py [--rounds 5] [--threads 2] [--cases 135m-8x128 ...]
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from measurement import save
from trackstar.corpus import TokenizedExample, open_corpus
from trackstar.errors import TrackstarError
from trackstar.gradients.projector import GradientProjector
from trackstar.gradients.second_moment import FactoredMoment, SecondMoment
from trackstar.indexing.groups import CorpusPosition, Group
from trackstar.indexing.provenance import make_manifest
from trackstar.indexing.settings import ChosenSettings
from trackstar.indexing.shard_writing import RowWork, RunningAutocorrelation, shard_content
from trackstar.model.language_model import LanguageModel, wrap_model
from trackstar.store import IndexWriter

# Name: shape of the model, examples a batch, tokens an example, dtype, batches a round.
CASES = {
    "135m-8x128": ("llama-135m", 8, 128, "float32", 8),
    "135m-4x256": ("llama-135m", 4, 256, "float32", 8),
    "135m-25x40": ("llama-135m", 25, 40, "float32", 8),
    "135m-8x128-bfloat16": ("llama-135m", 8, 128, "bfloat16", 4),
    "14m-8x128": ("neox-14m", 8, 128, "float32", 32),
    "14m-25x40": ("neox-14m", 25, 40, "float32", 32),
    "1b-8x512-bfloat16": ("llama-1b", 8, 512, "bfloat16", 16),
}
CPU_CASES = [name for name in CASES if not name.startswith("1b")]
BARS = {"llama-135m": 0.62, "neox-14m": 0.75, "llama-1b": 0.75}


# Name: class of the configuration and of the model, and the sizes.
SHAPES: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama-135m": (  # SmolLM2-135M
        LlamaConfig,
        LlamaForCausalLM,
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49_152,
            "tie_word_embeddings": True,
        },
    ),
    "neox-14m": (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "vocab_size": 50_304,
        },
    ),
    "llama-1b": (  # TinyLlama-1.1B
        LlamaConfig,
        LlamaForCausalLM,
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32_000,
        },
    ),
    "llama-3.2-1b": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
            "tie_word_embeddings": True,
        },
    ),
    "tiny": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 2048,
            "tie_word_embeddings": True,
        },
    ),
}


def make_model(shape: str, dtype: str, device: str, **sizes: Any) -> PreTrainedModel:
    """A model of a shape of `SHAPES`, with random weights; `sizes` replace some of the shape's."""
    torch.manual_seed(0)
    config, model_class, of_shape = SHAPES[shape]
    with torch.device(device):  # a GPU draws a billion numbers faster
        model = model_class(config(**of_shape | sizes))
    torch.nn.Module.to(model, device, getattr(torch, dtype))
    return model


def given_second_moment(model: LanguageModel) -> SecondMoment:
    generator = torch.Generator().manual_seed(0)

    def factor(size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator) + 0.1

    moments = {m.name: FactoredMoment(row=factor(m.rows), column=factor(m.columns)) for m in model.matrices}
    return SecondMoment(kind="factored", moments=moments, source="random, for the benchmark")


def plain_pass(model: PreTrainedModel, batches: Sequence[torch.Tensor]) -> None:
    for token_ids in batches:
        model.zero_grad(set_to_none=True)
        model(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()


def activations_pass(model: PreTrainedModel, batches: Sequence[torch.Tensor]) -> None:
    """Forward, and backward to the embeddings: gradients of activations and of no weight."""
    embed = model.get_input_embeddings()
    for token_ids in batches:
        states = embed(token_ids).detach().requires_grad_()
        model(inputs_embeds=states, labels=token_ids, use_cache=False).loss.backward()


# The benchmark's examples are tokens from the start.
NO_TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, unk_token="")))


def random_examples(vocabulary: int, count: int, tokens: int) -> list[TokenizedExample]:
    """Examples of random tokens, all but the first of them targets."""
    token_ids = np.random.default_rng(0).integers(vocabulary, size=(count, tokens), dtype=np.int32)
    target_mask = np.arange(tokens) > 0
    return [
        TokenizedExample(
            example_id=f"e{number}",
            parent_id=f"e{number}",
            record=number,
            window=0,
            text="",
            token_ids=row,
            target_mask=target_mask,
        )
        for number, row in enumerate(token_ids)
    ]


@contextlib.contextmanager
def indexing_passes(
    model: LanguageModel, examples: Sequence[TokenizedExample], *, batch_tokens: int, side: int = 64
) -> Iterator[Callable[[], None]]:
    """A function that indexes the examples once more, as further records of one index; see the module's text."""
    moment = given_second_moment(model)
    corpus = open_corpus(["tokens made for the benchmark"])
    count, tokens = len(examples), len(examples[0].token_ids)
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_manifest(
            model, corpus, moment,
            ChosenSettings(window_tokens=tokens, side=side, codec="float16", shard_examples=count),
        )  # fmt: skip
        with (
            IndexWriter.open(Path(folder) / "index", manifest) as writer,
            GradientProjector(model, moment, seed=0, side=side, batch_tokens=batch_tokens, note=print) as projector,
        ):
            r_train = RunningAutocorrelation(writer, device=model.device)
            work = RowWork.of(writer.manifest)
            record = 0

            def indexing_pass() -> None:
                nonlocal record
                record += count
                after = CorpusPosition(record=record, window=0, skipped=0)
                moved = [_at(example, record - count + place) for place, example in enumerate(examples)]
                group = Group(shard=len(writer.shards_done), examples=tuple(moved), after=after, sampled=None)
                r_train.add(writer.write_shard(shard_content([(group, work(projector, group))])))

            yield indexing_pass


def measure(name: str, *, rounds: int, device: str) -> dict[str, object]:
    shape, examples_per_batch, tokens, dtype, batches_per_round = CASES[name]
    trained = make_model(shape, dtype, device).train()
    bare = make_model(shape, dtype, device).requires_grad_(False)
    model = wrap_model(make_model(shape, dtype, device), NO_TOKENIZER)
    count = examples_per_batch * batches_per_round
    examples = random_examples(model.head.weight.shape[0], count, tokens)
    batches = token_batches(examples, examples_per_batch, device)
    with indexing_passes(model, examples, batch_tokens=examples_per_batch * tokens) as indexing_pass:
        passes = (indexing_pass, lambda: plain_pass(trained, batches), lambda: activations_pass(bare, batches))
        times = interleaved(passes, rounds, device)
    ratios = [ours / plain for ours, plain, _ in times]
    beside_bare = [ours / activations for ours, _, activations in times]
    total = count * tokens
    return {
        "model": shape,
        "batch": f"{examples_per_batch}x{tokens}",
        "dtype": dtype,
        "dimensions": len(model.blocks) * 64 * 64,
        "tokens_per_round": total,
        "indexing_tokens_per_s": round(total / statistics.median(ours for ours, _, _ in times), 1),
        "plain_tokens_per_s": round(total / statistics.median(plain for _, plain, _ in times), 1),
        "time_ratio_median": round(statistics.median(ratios), 4),
        "time_ratios": [round(ratio, 4) for ratio in ratios],
        "activations_ratio_median": round(statistics.median(beside_bare), 4),
        "activations_ratios": [round(ratio, 4) for ratio in beside_bare],
        "bar": BARS[shape],
    }


def token_batches(examples: Sequence[TokenizedExample], size: int, device: str) -> list[torch.Tensor]:
    """The examples' tokens, as a model's own training pass reads them."""
    token_ids = np.stack([example.token_ids for example in examples]).astype(np.int64)
    return list(torch.from_numpy(token_ids).to(device).split(size))


def _at(example: TokenizedExample, record: int) -> TokenizedExample:
    return TokenizedExample(
        example_id=example.example_id,
        parent_id=example.parent_id,
        record=record,
        window=0,
        text=example.text,
        token_ids=example.token_ids,
        target_mask=example.target_mask,
    )


def interleaved(passes: Sequence[Callable[[], None]], rounds: int, device: str) -> list[tuple[float, ...]]:
    """Seconds of each pass, one after the other each round; a first round warms up and does not count."""
    times = []
    for number in range(rounds + 1):
        taken = []
        for run in passes:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        if number:
            times.append(tuple(taken))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="*", choices=CASES)
    parser.add_argument("--name", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = arguments.cases or (list(CASES) if arguments.device == "cuda" else CPU_CASES)
    figures = {}
    for case in cases:
        try:
            figures[case] = measure(case, rounds=arguments.rounds, device=arguments.device)
        except TrackstarError as error:
            figures[case] = {"error": str(error)}
        print(case, figures[case], flush=True)
    name = arguments.name or f"indexing-{arguments.device}-{arguments.threads}-threads"
    save(name, {"threads": arguments.threads, "device": arguments.device, "cases": figures})


if __name__ == "__main__":
    main()
