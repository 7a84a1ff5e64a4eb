"""Plans of indexes against what they foretell: time, memory at peak and disk, each index in a fresh process.

python benchmarks/plan.py --demo demo-out [--sides 16 32 64] [--threads 1]
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from measurement import save

if TYPE_CHECKING:
    from trackstar.model.language_model import LanguageModel

DOCUMENTS, TOKENS = 40, 140


@dataclasses.dataclass(frozen=True)
class Case:
    """An index: the demo's corpus at defaults, or random texts for a random Llama with some side."""

    name: str
    side: int | None


def random_model() -> "tuple[LanguageModel, list[str]]":
    """A Llama of 134M random parameters, and texts for it."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from trackstar.model.language_model import wrap_model

    torch.manual_seed(0)
    words = [f"w{number}" for number in range(32_000)]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]  # stubs: no setter
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32_000
    )
    model = wrap_model(LlamaForCausalLM(config).eval(), PreTrainedTokenizerFast(tokenizer_object=backend))
    generator = np.random.default_rng(0)
    return model, [" ".join(generator.choice(words, size=TOKENS)) for _ in range(DOCUMENTS)]


def bytes_of(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def index_once(case: Case, demo: Path | None, threads: int) -> None:
    """In the child: plan an index, build it, and print both."""
    import torch

    from trackstar.corpus import open_corpus
    from trackstar.indexing.build import index_corpus
    from trackstar.indexing.plan import plan_corpus
    from trackstar.indexing.settings import IndexSettings
    from trackstar.model.language_model import load_model

    torch.set_num_threads(threads)
    if case.side is None:
        assert demo is not None
        checkpoints = sorted((demo / "model").glob("checkpoint-*"))
        model, data, settings = load_model(checkpoints[-1]), str(demo / "corpus.jsonl"), IndexSettings()
    else:
        model, data = random_model()
        settings = IndexSettings(side=case.side, second_moment="estimate")
    corpus = open_corpus(data, tokenizer=model.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "index"
        before = time.perf_counter()
        plan = plan_corpus(model, corpus, out, settings)
        planning = time.perf_counter() - before
        most, ended = 0, threading.Event()

        def look() -> None:
            nonlocal most
            while not ended.wait(0.5):
                most = max(most, bytes_of(out))

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        begun, begun_cpu = time.perf_counter(), time.process_time()
        index_corpus(model, corpus, out, plan.settings, progress=False, planned=False)
        seconds, cpu = time.perf_counter() - begun, time.process_time() - begun_cpu
        ended.set()
        watcher.join()
        stored = bytes_of(out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    needs = plan.needs
    figures = {
        "case": case.name,
        "plan": {
            "seconds": needs.seconds,
            "memory_mib": round(needs.memory / 2**20),
            "stored_mib": round(plan.stored / 2**20, 1),
            "most_on_disk_mib": round((plan.stored + plan.temporary) / 2**20, 1),
            "stages": {
                s.name: {"seconds": s.seconds, "memory_mib": round(s.memory / 2**20)} for s in needs.stages
            },
            "took_seconds": round(planning, 2),
        },
        "found": {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "memory_mib": round(peak / 2**20),
            "stored_mib": round(stored / 2**20, 1),
            "most_on_disk_mib": round(max(most, stored) / 2**20, 1),
        },
        "plan_over_found": {
            "seconds": None if needs.seconds is None else round(needs.seconds / seconds, 2),
            "memory": round(needs.memory / peak, 2),
            "stored": round(plan.stored / stored, 2),
            "most_on_disk": round((plan.stored + plan.temporary) / max(most, stored), 2),
        },
    }  # fmt: skip
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="Folder of `trackstar demo`.")
    parser.add_argument("--sides", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    cases = [Case("demo at defaults", None)] if arguments.demo is not None else []
    cases += [Case(f"134M parameters, {DOCUMENTS} x {TOKENS} tokens, side {side}", side) for side in arguments.sides]
    if arguments.child is not None:
        index_once(next(case for case in cases if case.name == arguments.child), arguments.demo, arguments.threads)
        return
    runs = []
    for case in cases:
        result = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--child", case.name],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        runs.append(json.loads(result.stdout.splitlines()[-1]))
        print(json.dumps(runs[-1]), flush=True)
    save(f"plan-cpu-{arguments.threads}-threads", {"runs": runs})


if __name__ == "__main__":
    main()
