"""Speed and agreement of the two tail-patch paths on the same pairs, interleaved in one run.

Queries of 16 tokens with completions of 2, proponents of 40 tokens, some of them shared between queries. A step is
Adafactor's at step 10,000 with every parameter moving. Without a checkpoint of `trackstar pretrain` its V is gathered
from a few batches of random tokens, the weights unmoved. Exact steps the optimizer in place and undoes it; fast runs
all pairs through adapters. Bars: fast at least 4 times as many pairs a second (8 aimed at), mean effects within 2%, a
rank correlation over pairs of at least 0.99.

    python benchmarks/tail_patch.py [--shape llama-135m] [--model FOLDER] [--queries 8] [--top 5] [--rounds 3]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.optimization import Adafactor

from indexing import NO_TOKENIZER, make_model
from measurement import save
from trackstar.corpus import TokenizedExample
from trackstar.model.language_model import LanguageModel, load_model, wrap_model
from trackstar.tail_patch import Pair, TailPatch, TrainingStep, tail_patch

QUERY_TOKENS, COMPLETION_TOKENS, PROPONENT_TOKENS = 16, 2, 40
SHARED = 0.25  # share of pairs whose proponent another query has too
SPEED_BAR, MEAN_BAR, RANK_BAR = 4.0, 0.02, 0.99
SHAPES = ("llama-135m", "tiny")


def random_model(shape: str, device: str) -> LanguageModel:
    return wrap_model(make_model(shape, "float32", device), NO_TOKENIZER)


def gathered_step(model: LanguageModel, *, batches: int = 3, examples: int = 8) -> TrainingStep:
    """Adafactor at step 10,000, V gathered from random tokens at a learning rate of 0."""
    parameters = list(model.module.parameters())
    optimizer = Adafactor(parameters, lr=0.0, relative_step=False, scale_parameter=True)
    draw = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.requires_grad_(True)
    for _ in range(batches):
        token_ids = torch.randint(len(model.head.weight), (examples, PROPONENT_TOKENS), generator=draw)
        token_ids = token_ids.to(model.device)
        model.module(input_ids=token_ids, labels=token_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for parameter in parameters:
        parameter.requires_grad_(False)
        optimizer.state[parameter]["step"] = 9_999
    optimizer.param_groups[0]["lr"] = 0.01
    return TrainingStep.from_optimizer(optimizer, model)


def example(name: str, token_ids: np.ndarray, targets: int) -> TokenizedExample:
    return TokenizedExample(
        example_id=name,
        parent_id=name,
        record=0,
        window=0,
        text="",
        token_ids=token_ids.astype(np.int32),
        target_mask=np.arange(len(token_ids)) >= len(token_ids) - targets,
    )


def workload(
    vocabulary: int, queries: int, top: int
) -> tuple[list[TokenizedExample], list[TokenizedExample], list[Pair]]:
    """Queries, proponents and pairs; the first half of a query's proponents hold its last 8 tokens somewhere."""
    draw = np.random.default_rng(0)
    asked = [
        example(f"q{number}", draw.integers(vocabulary, size=QUERY_TOKENS), COMPLETION_TOKENS)
        for number in range(queries)
    ]
    proponents: list[TokenizedExample] = []
    pairs: list[Pair] = []
    for query in range(queries):
        for rank in range(top):
            if proponents and draw.random() < SHARED:
                pairs.append(Pair(query=query, proponent=int(draw.integers(len(proponents)))))
                continue
            token_ids = draw.integers(vocabulary, size=PROPONENT_TOKENS)
            if rank < (top + 1) // 2:
                start = draw.integers(PROPONENT_TOKENS - 8)
                token_ids[start : start + 8] = asked[query].token_ids[-8:]
            pairs.append(Pair(query=query, proponent=len(proponents)))
            proponents.append(example(f"p{len(proponents)}", token_ids, PROPONENT_TOKENS - 1))
    return asked, proponents, pairs


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, for values that are all different."""
    ranks = [values.argsort().argsort() for values in (first, second)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def timed(run: Callable[[], TailPatch], device: str) -> tuple[TailPatch, float]:
    start = time.perf_counter()
    result = run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def measure(model: LanguageModel, step: TrainingStep, arguments: argparse.Namespace) -> dict[str, Any]:
    queries, proponents, pairs = workload(len(model.head.weight), arguments.queries, arguments.top)

    def run(path: Literal["fast", "exact"], chosen: list[Pair]) -> TailPatch:
        return tail_patch(model, step, queries, proponents, chosen, path=path, batch_tokens=arguments.batch_tokens)

    run("fast", pairs[:2])
    run("exact", pairs[:2])
    seconds: dict[str, list[float]] = {"fast": [], "exact": []}
    results: dict[str, TailPatch] = {}
    for _ in range(arguments.rounds):
        for path in ("fast", "exact"):
            results[path], elapsed = timed(lambda path=path: run(path, pairs), arguments.device)
            seconds[path].append(elapsed)
            print(f"{path}: {elapsed:.2f} s for {len(pairs)} pairs", flush=True)
    fast, exact = results["fast"].effect, results["exact"].effect
    ratios = [e / f for f, e in zip(seconds["fast"], seconds["exact"], strict=True)]
    means = float(fast.mean()), float(exact.mean())
    return {
        "step": step.description,
        "pairs": len(pairs),
        "queries": len(queries),
        "distinct_proponents": len({pair.proponent for pair in pairs}),
        "fast_pairs_per_s": round(len(pairs) / statistics.median(seconds["fast"]), 3),
        "exact_pairs_per_s": round(len(pairs) / statistics.median(seconds["exact"]), 3),
        "speed_ratio_median": round(statistics.median(ratios), 3),
        "speed_ratios": [round(ratio, 3) for ratio in ratios],
        "speed_bar": SPEED_BAR,
        "mean_probability_before": float(results["exact"].before.mean()),
        "mean_effect_fast": means[0],
        "mean_effect_exact": means[1],
        "mean_effect_relative_difference": abs(means[0] - means[1]) / abs(means[1]),
        "mean_effect_bar": MEAN_BAR,
        "rank_correlation": round(rank_correlation(fast, exact), 6),
        "rank_correlation_bar": RANK_BAR,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-135m")
    parser.add_argument("--model", help="a model folder, instead of random weights; a checkpoint's own step is made")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--top", type=int, default=5, help="proponents of each query")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = arguments.model
    model = load_model(folder, device=arguments.device) if folder else random_model(arguments.shape, arguments.device)
    if folder and (Path(folder) / "training_state.json").is_file():
        step = TrainingStep.from_checkpoint(folder, model)
    else:
        step = gathered_step(model)
    figures = measure(model, step, arguments)
    shape = Path(folder).name if folder else arguments.shape
    default = f"tail-patch-{arguments.device}" if shape == "llama-135m" else f"tail-patch-{arguments.device}-{shape}"
    save(
        arguments.name or default,
        {
            "model": shape,
            "threads": arguments.threads,
            "device": arguments.device,
            "query_tokens": QUERY_TOKENS,
            "completion_tokens": COMPLETION_TOKENS,
            "proponent_tokens": PROPONENT_TOKENS,
        }
        | figures,
    )


if __name__ == "__main__":
    main()
