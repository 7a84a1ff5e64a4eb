"""What one GPU does: its numbers against the CPU's, indexing, scans, re-ranking, tail-patch, and peak memory.

    python benchmarks/gpu.py [--sections agreement indexing ...] [--scale 0.25] [--device cuda] [--tiny]

Made for one GPU with 80 GiB or more and less than 8 minutes. `--scale 0.25` takes a quarter of the tokens, pairs and
bytes, for a smaller GPU; `--tiny` takes a model of 0.2M parameters everywhere, for a trial without a GPU. Models have
random weights and nothing is downloaded. Figures are written after each case, so that a run that is cut keeps what it
has. The exit status is 1 if the numbers differ from the CPU's by more than the tolerances, or a section failed.

agreement   A small index made on the device and on the CPU: V, φ, R, losses, influences and the first ten candidates.
indexing    The whole indexing pass of `indexing.py`, a training pass (forward, backward with weights' gradients) and a
            bare pass for activations' gradients (forward, backward to the embeddings), in turns, in bfloat16.
scan        One pass over a store for one query and for 16: quantized codes on the CPU, float16 rows on the device.
reranking   Exact influences of candidates from recomputed gradients, with 1-bit codes.
tail_patch  The fast path and the exact one, on the same pairs, in float32.
"""

import argparse
import contextlib
import dataclasses
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tail_patch as tail_patch_benchmark
from indexing import (
    NO_TOKENIZER,
    activations_pass,
    indexing_passes,
    make_model,
    plain_pass,
    random_examples,
    token_batches,
)
from measurement import RESULTS, save
from scan import make_store
from trackstar.attribution.answering import answer_queries, gradient_setup, query_gradients
from trackstar.choices import CodecName
from trackstar.corpus import Query
from trackstar.curvature.task import task_correction, train_autocorrelation
from trackstar.indexing.build import build_index
from trackstar.model.language_model import LanguageModel, wrap_model
from trackstar.retrieval.reranking import ExactScores
from trackstar.retrieval.scoring import Scorer, unit_queries
from trackstar.retrieval.top_candidates import top_candidates
from trackstar.store import Index, row_bytes

TOLERANCES = {"V": 1e-3, "φ": 1e-3, "R": 1e-3, "losses": 1e-4, "influences": 2e-3, "first ten shared": 0.9}
WORDS = 1000
# Name: shape, examples a batch, tokens an example, batches a round.
INDEXING = {"135m": ("llama-135m", 64, 128, 8), "1b": ("llama-3.2-1b", 16, 512, 8)}
TINY_INDEXING = {"tiny": ("tiny", 4, 16, 2)}
CODECS: tuple[CodecName, ...] = ("1-bit", "4-bit", "int8", "float16")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Device and sizes of a run; `scale` multiplies tokens, pairs and bytes."""

    device: str
    tiny: bool
    scale: float
    rounds: int

    def scaled(self, count: int) -> int:
        return max(1, round(count * self.scale))

    @property
    def side(self) -> int:
        return 8 if self.tiny else 64

    @property
    def shape(self) -> str:
        return "tiny" if self.tiny else "llama-135m"


Add = Callable[[str, dict[str, Any]], None]
"""Receives the name of a case and its figures, and writes them."""


def synchronized(setting: Setting) -> None:
    if setting.device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(run: Callable[[], object], setting: Setting) -> float:
    synchronized(setting)
    start = time.perf_counter()
    run()
    synchronized(setting)
    return time.perf_counter() - start


@contextlib.contextmanager
def peak_memory(setting: Setting) -> Iterator[dict[str, float | None]]:
    """Gives the most GiB that were allocated on the GPU meanwhile, and of the process so far."""
    on_gpu = setting.device.startswith("cuda")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, float | None] = {}
    yield found
    found["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else None
    found["peak_process_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


# ---- A corpus of words ---------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]  # no setter
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def texts(count: int, words: int) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(f"w{word}" for word in draw.integers(WORDS, size=words)) for _ in range(count)]


def questions(corpus: list[str], count: int) -> list[Query]:
    """The first words of some texts, and the next two as completion."""
    parts = [text.split() for text in corpus[:count]]
    return [
        Query(query_id=f"q{n}", prompt=" ".join(words[:8]), completion=" " + " ".join(words[8:10]))
        for n, words in enumerate(parts)
    ]


# ---- Sections ------------------------------------------------------------------------------------


def agreement(setting: Setting, add: Add) -> None:
    corpus = texts(24 if setting.tiny else 256, 24)
    asked = questions(corpus, 4 if setting.tiny else 16)
    sizes = {"hidden_size": 128, "intermediate_size": 320} if not setting.tiny else {}
    for dtype in ("float32", "bfloat16"):
        on_cpu = make_model("tiny", dtype, "cpu", vocab_size=WORDS, **sizes)
        values = [small_index(moved_copy(on_cpu, device, sizes), corpus, asked) for device in ("cpu", setting.device)]
        figures = differences(*values)
        # In bfloat16 the two differ by rounding alone, which has no bound worth a tolerance.
        exceeded = [name for name, found in figures.items() if not within(name, found)] if dtype == "float32" else []
        bounds = TOLERANCES if dtype == "float32" else None
        add(dtype, {"differences": figures, "tolerances": bounds, "exceeded": exceeded})


def moved_copy(module: PreTrainedModel, device: str, sizes: dict[str, int]) -> LanguageModel:
    copy = make_model("tiny", str(module.dtype).removeprefix("torch."), "cpu", vocab_size=WORDS, **sizes)
    copy.load_state_dict(module.state_dict())
    torch.nn.Module.to(copy, device)
    return wrap_model(copy, tokenizer())


def small_index(model: LanguageModel, corpus: list[str], asked: list[Query]) -> dict[str, Tensor]:
    """V, φ, R and losses of an index, and all influences on the queries, by row."""
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(
            model, corpus, Path(folder) / "index", side=8, codec="float32", second_moment_examples=64, damping=None,
            progress=False,
        )  # fmt: skip
        report = answer_queries(
            index, asked, model=model, k=index.rows, task=asked, mixing=0.5, damping=0.1, progress=False
        )
        row_of = {stored.example.example_id: stored.row for stored in index.examples()}
        influences = torch.zeros(len(asked), index.rows)
        for number, result in enumerate(report.results):
            for candidate in result.proponents:
                influences[number, row_of[candidate.example_id]] = candidate.influence
        return {
            "V": torch.cat([tensor.flatten() for _, tensor in sorted(index.tensors("second_moment").items())]),
            "φ": torch.cat([chunk.stored.decode() for chunk in index.iterate(1024)]),
            "R": train_autocorrelation(index).square(),
            "losses": torch.cat([shard.losses for shard in index.shards]),
            "influences": influences,
        }


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each, relative to its largest value; and the share of the first ten that both have."""
    found = {
        name: float((first[name] - second[name]).abs().max() / first[name].abs().max().clamp_min(1e-30))
        for name in first
    }
    tens = [one["influences"].topk(10, dim=1).indices.tolist() for one in (first, second)]
    shared = [len({*a} & {*b}) / 10 for a, b in zip(*tens, strict=True)]
    return found | {"first ten shared": statistics.mean(shared)}


def within(name: str, found: float) -> bool:
    return found >= TOLERANCES[name] if name == "first ten shared" else found <= TOLERANCES[name]


def indexing(setting: Setting, add: Add) -> None:
    for name, (shape, size, tokens, batches) in (TINY_INDEXING if setting.tiny else INDEXING).items():
        size = setting.scaled(size)
        total = size * batches * tokens
        with peak_memory(setting) as peaks:
            trained = make_model(shape, "bfloat16", setting.device).train()
            bare = make_model(shape, "bfloat16", setting.device).requires_grad_(False)
            model = wrap_model(make_model(shape, "bfloat16", setting.device), NO_TOKENIZER)
            examples = random_examples(model.head.weight.shape[0], size * batches, tokens)
            token_ids = token_batches(examples, size, setting.device)
            with indexing_passes(model, examples, batch_tokens=size * tokens, side=setting.side) as indexing_pass:
                runs: dict[str, Callable[[], None]] = {
                    "indexing": indexing_pass,
                    "training": lambda trained=trained, token_ids=token_ids: plain_pass(trained, token_ids),
                    "activations": lambda bare=bare, token_ids=token_ids: activations_pass(bare, token_ids),
                }
                rounds = [{name: timed(run, setting) for name, run in runs.items()} for _ in range(setting.rounds + 1)]
            rounds = rounds[1:]  # the first warms up
        ratios = {other: [one["indexing"] / one[other] for one in rounds] for other in ("training", "activations")}
        add(
            name,
            {"shape": shape, "parameters": sum(p.numel() for p in trained.parameters()), "dtype": "bfloat16"}
            | {
                "batch": f"{size}x{tokens}",
                "tokens_per_round": total,
                "dimensions": len(model.blocks) * setting.side**2,
            }
            | {f"{run}_tokens_per_s": round(total / statistics.median(one[run] for one in rounds)) for run in runs}
            | {f"indexing_over_{other}": round(statistics.median(of), 4) for other, of in ratios.items()}
            | {f"indexing_over_{other}_rounds": [round(ratio, 4) for ratio in of] for other, of in ratios.items()}
            | peaks,
        )
        del trained, bare, model, token_ids, runs, indexing_pass


def scan(setting: Setting, add: Add) -> None:
    size = setting.scaled(1 << 20 if setting.tiny else 1 << 28)
    for codec in CODECS:
        dimensions = 8 * setting.side**2 if setting.tiny else 16 * setting.side**2
        rows = max(64, size // row_bytes(codec, dimensions, 8 if setting.tiny else 16))
        with tempfile.TemporaryDirectory() as folder, peak_memory(setting) as peaks:
            index = make_store(Path(folder) / "index", rows, codec, shape=setting.shape, side=setting.side)
            for queries in (1, 16):
                add(f"{codec}, {queries} queries", scanned(index, queries, setting))
        add(codec, dict(peaks))


def scanned(index: Index, queries: int, setting: Setting) -> dict[str, Any]:
    vectors = torch.randn(queries, index.dimensions, generator=torch.Generator().manual_seed(0)).to(setting.device)
    scorer = Scorer(vectors=vectors, multipliers=torch.ones(index.rows))
    top_candidates(index, scorer, 10)  # into the page cache
    seconds = statistics.median(
        timed(lambda: top_candidates(index, scorer, 10), setting) for _ in range(setting.rounds)
    )
    size = index.rows * row_bytes(index.manifest.codec, index.dimensions, len(index.manifest.layer_blocks))
    return {
        "rows": index.rows,
        "seconds": round(seconds, 4),
        "candidates_per_s_per_query": round(index.rows * queries / seconds),
        "gb_per_s": round(size / seconds / 1e9, 2),
    }


def reranking(setting: Setting, add: Add) -> None:
    corpus = texts(32 if setting.tiny else setting.scaled(1024), 16 if setting.tiny else 128)
    asked = questions(corpus, 4)
    batch_tokens = 256 if setting.tiny else setting.scaled(16_384)
    with tempfile.TemporaryDirectory() as folder, peak_memory(setting) as peaks:
        model = wrap_model(make_model(setting.shape, "float32", setting.device, vocab_size=WORDS), tokenizer())
        start = time.perf_counter()
        index = build_index(
            model, corpus, Path(folder) / "index", side=setting.side, codec="1-bit", second_moment_examples=64,
            batch_tokens=batch_tokens, progress=False,
        )  # fmt: skip
        built = time.perf_counter() - start
        phi, _ = query_gradients(index, model, asked, batch_tokens=batch_tokens, progress=False)
        correction = task_correction(index, phi, mixing=0.5)
        vectors = unit_queries(correction.coordinates(phi), correction.whitening)
        exact = ExactScores(index, model, gradient_setup(index, batch_tokens), correction, vectors)
        rows = torch.arange(index.rows).repeat(len(asked), 1)
        exact.of_each(rows[:, :8].contiguous())
        seconds = [timed(lambda: exact.of_each(rows), setting) for _ in range(setting.rounds)]
    add(
        "1-bit",
        {
            "shape": setting.shape,
            "candidates": index.rows,
            "queries": len(asked),
            "candidates_per_s": round(index.rows / statistics.median(seconds), 1),
            "whole_index_seconds": round(built, 2),
        }
        | peaks,
    )


def tail_patch(setting: Setting, add: Add) -> None:
    arguments = argparse.Namespace(
        queries=4 if setting.tiny else setting.scaled(8), top=2 if setting.tiny else 10, rounds=min(2, setting.rounds),
        device=setting.device, batch_tokens=256 if setting.tiny else setting.scaled(8192),
    )  # fmt: skip
    with peak_memory(setting) as peaks:
        model = tail_patch_benchmark.random_model(setting.shape, setting.device)
        step = tail_patch_benchmark.gathered_step(model)
        figures = tail_patch_benchmark.measure(model, step, arguments)
    add("float32", {"shape": setting.shape, **figures} | peaks)


RUN: dict[str, Callable[[Setting, Add], None]] = {
    "agreement": agreement,
    "indexing": indexing,
    "scan": scan,
    "reranking": reranking,
    "tail_patch": tail_patch,
}


# ---- The run -------------------------------------------------------------------------------------


def hardware(device: str) -> dict[str, object]:
    found: dict[str, object] = {"device": device, "cuda": torch.version.cuda}
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="*", choices=RUN, default=list(RUN))
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--name", default=None)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    setting = Setting(device=arguments.device, tiny=arguments.tiny, scale=arguments.scale, rounds=arguments.rounds)
    if ":" in setting.device:
        torch.cuda.set_device(setting.device)  # memory is counted on the current one
    name = arguments.name or f"gpu{'-tiny' if arguments.tiny else ''}-{arguments.device.replace(':', '-')}"
    sections: dict[str, Any] = {}
    figures = {**hardware(setting.device), "scale": setting.scale, "tiny": setting.tiny, "sections": sections}

    def write() -> None:
        save(name, figures, folder=arguments.folder, shown=False)

    failed = False
    for section in arguments.sections:
        cases: dict[str, Any] = sections.setdefault(section, {})

        def add(case: str, found: dict[str, Any], cases: dict[str, Any] = cases, section: str = section) -> None:
            cases[case] = found
            print(section, case, found, flush=True)
            write()

        start = time.perf_counter()
        try:
            RUN[section](setting, add)
        except Exception as error:  # the other sections are measured all the same
            add("error", {"type": type(error).__name__, "message": str(error)[:1000]})
            failed = True
        cases["seconds"] = round(time.perf_counter() - start, 1)
        write()
    exceeded = [
        case for case in sections.get("agreement", {}).values() if isinstance(case, dict) and case.get("exceeded")
    ]
    return 1 if failed or exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
