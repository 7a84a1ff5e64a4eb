"""Speed of the exact top-k scan over a float16 store of 65,536 dimensions, against the machine's read bandwidth.

The bandwidth is measured in the same run, interleaved with the scans: the sum of all 8-byte words of the very same
memory-mapped files. `ratio` is the store's bytes per second through the whole top-k search over that.

    python benchmarks/scan.py [--rows 16384] [--threads 2] [--rounds 5]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from indexing import _NoTokenizer, given_second_moment, make_model
from measurement import save
from trackstar.examples import TokenizedExample, open_corpus
from trackstar.model import wrap_model
from trackstar.provenance import make_manifest
from trackstar.retrieval import Scorer, top_candidates
from trackstar.store import Index, IndexWriter, ShardContent, WindowsEntry, encode

BATCHES = (1, 4, 16, 64)
SHARD_ROWS = 1024


def make_store(folder: Path, rows: int) -> Index:
    """A store of random rows: a scan's speed does not depend on what they are."""
    model = wrap_model(make_model("llama-135m", "float32", "cpu"), _NoTokenizer())  # type: ignore[arg-type]
    moment = given_second_moment(model)
    manifest = make_manifest(
        model, open_corpus(["rows made for the benchmark"]), WindowsEntry(tokens=2, overlap=1), moment,
        seed=0, side=64, codec="float16", shard_examples=SHARD_ROWS,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    stored = encode(torch.randn(SHARD_ROWS, manifest.dimensions, generator=generator), "float16")
    with IndexWriter.open(folder, manifest) as writer:
        writer.write_tensors("second_moment", moment.tensors())
        for first in range(0, rows, SHARD_ROWS):
            examples = [_example(first + row) for row in range(min(SHARD_ROWS, rows - first))]
            writer.write_shard(
                ShardContent(
                    stored=stored[: len(examples)],
                    losses=torch.zeros(len(examples)),
                    examples=examples,
                    next_record=first + len(examples),
                    next_window=0,
                    skipped=0,
                )
            )
        writer.write_tensors("autocorrelation", {"autocorrelation": torch.zeros(1)})
        writer.finish(records=rows, skipped=0)
    return Index.open(folder)


def _example(record: int) -> TokenizedExample:
    return TokenizedExample(
        example_id=f"e{record}",
        parent_id=f"e{record}",
        record=record,
        window=0,
        text="",
        token_ids=np.zeros(2, dtype=np.int32),
        target_mask=np.array([False, True]),
    )


def read_everything(index: Index) -> None:
    for shard in index.shards:
        shard.stored.codes.view(torch.int64).sum()


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        index = make_store(Path(folder) / "index", arguments.rows)
        store_bytes = index.rows * index.dimensions * 2
        read_everything(index)  # into the page cache
        figures = {}
        for queries in BATCHES:
            scorer = Scorer(vectors=torch.randn(queries, index.dimensions), multipliers=torch.ones(index.rows))
            top_candidates(index, scorer, 10)
            pairs = [
                (timed(lambda scorer=scorer: top_candidates(index, scorer, 10)), timed(lambda: read_everything(index)))
                for _ in range(arguments.rounds)
            ]
            scan = statistics.median(pair[0] for pair in pairs)
            read = statistics.median(pair[1] for pair in pairs)
            figures[str(queries)] = {
                "queries": queries,
                "scan_gb_per_s": round(store_bytes / scan / 1e9, 2),
                "read_gb_per_s": round(store_bytes / read / 1e9, 2),
                "ratio": round(statistics.median(r / s for s, r in pairs), 3),
                "candidates_per_s_per_query": round(index.rows * queries / scan),
            }
            print(figures[str(queries)], flush=True)
    save(
        f"scan-cpu-{arguments.threads}-threads",
        {"rows": arguments.rows, "bytes": store_bytes, "threads": arguments.threads, "batches": figures, "bar": 0.5},
    )  # fmt: skip


if __name__ == "__main__":
    main()
