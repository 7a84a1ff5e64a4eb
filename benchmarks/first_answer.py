"""What a first-time user waits for: the first index and the first answer at the defaults, beside bare passes.

Each command runs in a process of its own on one core; its processor time and peak memory are those that the system
counts. A bare pass is forward and backward for activations alone over the same texts in the same batches, in a
process of its own, without its start; a training pass has the gradients of all weights besides. The start is that of
a process that imports what `trackstar index` does and loads the model.

    python benchmarks/first_answer.py [--demo demo-out] [--cases demo 0.5b] [--rounds 3]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from measurement import save

DOCUMENTS, WORDS = 40, 140
QUERY = ("--prompt", "The capital of France is", "--completion", " Paris")


def child(*arguments: str) -> dict[str, float]:
    """Run a process on one core and return its processor seconds, wall seconds and peak memory."""
    begun = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout as output, process.stderr as errors:
        text, problem = output.read(), errors.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit status {process.returncode}\n{problem}")
    found = {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "wall_seconds": round(time.perf_counter() - begun, 2),
        "peak_mib": usage.ru_maxrss // 1024,
    }
    lines = text.splitlines()
    return found | (json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {})


def trackstar(*arguments: str) -> dict[str, float]:
    """Run a command of trackstar on one core."""
    return child(sys.executable, "-m", "trackstar", *arguments, "--threads", "1")


def passes(model_folder: str, corpus: str, kind: str) -> None:
    """In the child: load the model and pass the corpus through it once, or not at all for the start."""
    import torch

    from trackstar.corpus import open_corpus, tokenize_examples
    from trackstar.indexing.build import build_index
    from trackstar.model.batching import plan_batches
    from trackstar.model.language_model import load_model

    assert build_index is not None  # imported for the time that it takes
    torch.set_num_threads(1)
    model = load_model(model_folder, device="cpu")
    windows = [
        window
        for windows in tokenize_examples(
            open_corpus(corpus, tokenizer=model.tokenizer).examples(),
            model.tokenizer,
            window_tokens=model.context_tokens,
            overlap=1,
            truncate=False,
        )
        for window in windows
    ]
    batches = plan_batches([len(window.token_ids) for window in windows], 2048) if kind != "start" else []
    module = model.module
    embeddings = module.get_input_embeddings()
    for parameter in module.parameters():
        parameter.requires_grad_(kind == "training")
    begun = time.process_time()
    for batch in batches:
        longest = max(len(windows[place].token_ids) for place in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        attended = torch.zeros_like(ids)
        for row, place in enumerate(batch):
            tokens = torch.from_numpy(windows[place].token_ids).long()
            ids[row, : len(tokens)], attended[row, : len(tokens)] = tokens, 1
        labels = ids.masked_fill(attended == 0, -100)
        module.zero_grad(set_to_none=True)
        embedded = embeddings(ids)
        if kind == "bare":
            embedded = embedded.detach().requires_grad_()
        module(inputs_embeds=embedded, attention_mask=attended, labels=labels, use_cache=False).loss.backward()
    print(json.dumps({"pass_cpu_seconds": round(time.process_time() - begun, 2)}))


def make_half_billion(folder: Path) -> tuple[str, str]:
    """A random Llama of half a billion parameters in a folder, and a corpus of a few documents."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = ["<unk>", *(f"w{number}" for number in range(31_999))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]  # stubs: no setter
    config = LlamaConfig(
        hidden_size=1280, intermediate_size=3456, num_hidden_layers=22, num_attention_heads=20, vocab_size=32_000,
        max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    corpus = folder / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"text": " ".join(generator.choice(words, size=WORDS))}) + "\n" for _ in range(DOCUMENTS)),
        encoding="utf-8",
    )
    return str(folder / "model"), str(corpus)


def rounds_of(
    model: str, corpus: str, rounds: int, kinds: Sequence[str], *, query: bool
) -> Iterator[dict[str, dict[str, float]]]:
    """Each round: the start, the passes and the index, one after the other, and the first queries."""
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as work:
            out = str(Path(work) / "index")
            own = (sys.executable, __file__, "--child", model, corpus)
            run: dict[str, dict[str, float]] = {kind: child(*own, kind) for kind in ("start", *kinds)}
            run["index"] = trackstar("index", "--model", model, "--data", corpus, "--out", out)
            if query:
                run["first query"] = trackstar("query", out, *QUERY)
                run["second query"] = trackstar("query", out, *QUERY)
        print(json.dumps(run), flush=True)
        yield run


def summary(runs: Sequence[dict[str, dict[str, float]]], passes_per_index: int) -> dict[str, object]:
    """Medians over the rounds, and the ratios of the index to the passes."""

    def middle(part: str, name: str) -> float:
        return statistics.median(run[part][name] for run in runs)

    own = middle("index", "cpu_seconds") - middle("start", "cpu_seconds")
    figures: dict[str, object] = {part: {name: middle(part, name) for name in runs[0][part]} for part in runs[0]}
    for kind in ("bare", "training"):
        if kind in runs[0]:
            figures[f"index over {kind} passes, without starts"] = round(
                own / (passes_per_index * middle(kind, "pass_cpu_seconds")), 3
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"), help="Folder of `trackstar demo`.")
    parser.add_argument("--cases", nargs="*", choices=("demo", "0.5b"), default=("demo", "0.5b"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        passes(*arguments.child)
        return
    if "demo" in arguments.cases:
        model = str(sorted((arguments.demo / "model").glob("checkpoint-*"))[-1])
        corpus = str(arguments.demo / "corpus.jsonl")
        runs = list(rounds_of(model, corpus, arguments.rounds, ("bare", "training"), query=True))
        save("first-answer-demo-cpu", {"threads": 1, "rounds": arguments.rounds, **summary(runs, 1)})
    if "0.5b" in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            model, corpus = make_half_billion(Path(folder))
            size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
            runs = list(rounds_of(model, corpus, arguments.rounds, ("bare", "training"), query=False))
        save(
            "first-answer-half-billion-cpu",
            {
                "threads": 1,
                "rounds": arguments.rounds,
                "documents": DOCUMENTS,
                "tokens_of_a_document": WORDS,
                "model_mib": size // 2**20,
                "passes_of_index": "two: V is estimated from the same documents",
                "memory_bar_mib": round(1.5 * size / 2**20 + 1024),
                **summary(runs, 2),
            },
        )


if __name__ == "__main__":
    main()
