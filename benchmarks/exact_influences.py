"""Exact influences of candidates without whitening them, against whitening them first, interleaved in one run.

Both recompute the gradients of the same candidates of an index in whitened coordinates. Without whitening, an influence
is an inner product of φ with one vector a query, and its norm follows from the stored norm under R_train and the task's
directions, which are taken to φ's space once; with it, every φ is multiplied by W_train first. The gradients alone are
timed beside. All three are processor seconds.

    python benchmarks/exact_influences.py --demo demo-out [--side 64] [--candidates 500] [--rounds 3] [--threads 1]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from measurement import save
from trackstar.attribution.answering import gradient_setup, gradients_of_queries
from trackstar.corpus import read_queries
from trackstar.curvature.task import task_correction
from trackstar.gradients.projector import projected
from trackstar.indexing.build import build_index
from trackstar.model.language_model import load_model
from trackstar.retrieval.reranking import _Influences, _Products, _work
from trackstar.retrieval.scoring import unit_queries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, required=True, help="Folder of `trackstar demo`.")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(sorted((options.demo / "model").glob("checkpoint-*"))[-1])
    queries = read_queries(str(options.demo / "queries.jsonl"))
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(
            model, str(options.demo / "corpus.jsonl"), Path(folder) / "index", side=options.side, codec="1-bit",
            progress=False,
        )  # fmt: skip
        setup = gradient_setup(index, 2048)
        phi, _ = gradients_of_queries(model, setup, queries, progress=False)
        correction = task_correction(index, phi)
        vectors = unit_queries(correction.coordinates(phi[:1]), correction.whitening)
        rows = list(range(0, index.rows, max(1, index.rows // options.candidates)))[: options.candidates]
        examples = [stored.example for stored in index.some_examples(rows)]
        norms = index.some_norms(rows)
        begun = time.process_time()
        without = _work(correction, vectors)
        assert isinstance(without, _Products), "the task has few directions, and norms are stored"
        prepared = time.process_time() - begun
        whitened = _Influences(correction=correction, vectors=vectors)
        times: dict[str, list[float]] = {"gradients alone": [], "without whitening": [], "with whitening": []}
        results = {}
        with setup.opened(model, print) as projector:
            runs: dict[str, Callable[[], torch.Tensor]] = {
                "gradients alone": lambda: projected(projector, examples)[0],
                "without whitening": lambda: without.influences(
                    without(projector, examples, lambda _n: None)[0], norms
                ),
                "with whitening": lambda: whitened(projector, examples, lambda _n: None)[0],
            }
            for number in range(options.rounds + 1):  # the first round warms up
                for name, run in runs.items():
                    begun = time.process_time()
                    results[name] = run()
                    if number:
                        times[name].append(time.process_time() - begun)
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    save(
        f"exact-influences-cpu-{options.threads}-threads",
        {
            "threads": options.threads,
            "dimensions": phi.shape[1],
            "candidates": len(rows),
            "mixing": correction.mixing.value,
            "cpu_seconds": {name: round(value, 3) for name, value in middle.items()},
            "cpu_seconds_once_for_the_task": round(prepared, 3),
            "beside_the_gradients": {
                name: round(middle[name] - middle["gradients alone"], 3)
                for name in ("without whitening", "with whitening")
            },
            "largest_difference": float((results["without whitening"] - results["with whitening"]).abs().max()),
        },
    )


if __name__ == "__main__":
    main()
