"""Speed of the whole top-10 search by codec, against a plain float32 matrix product and the machine's memory.

For stores of 65,536 dimensions, memory-mapped and in the page cache, and batches of 1, 16 and 256 queries. In the same
run, in turn with every search: `values @ queries` of the same shapes in float32, from memory, without any search; the
sum of all 8-byte words of that matrix; and the same sum over the very files that are searched (`read`). It reports
candidates a second and query, how many times as fast as the product, and the roofline:

* `memory_gb_per_s`: the most that any reader of this run takes from memory: one of the two sums, or the product with
  one query, which reads its whole matrix too. `of_memory` is what the search reads, over it. It cannot be above 1, but
  for the prefetching that a reader of one stream lacks.
* `times_the_product_at_most`: what the product's own speed over memory leaves for this codec: bytes of a candidate in
  float32 over those of its codes, times memory over the product.
* `in_cache_gb_per_s`: for up to 16 queries of low-bit codes, the same kernel over 4 MiB of codes that stay in the
  cache. Where it is far above `memory_gb_per_s`, memory is the limit; where it is below, arithmetic is.

    GOMP_SPINCOUNT=10000 python benchmarks/scan.py [--rows 16384] [--threads 2] [--rounds 5] [--codecs int8 1-bit]
        [--batches 1 16 256] [--store-mib 1024] [--shared-machine]

A store has ROWS rows, or as many as fill `--store-mib`: one that fits into the processor's cache would tell too much.
The product's matrix of ROWS × 256 KiB must fit into memory; rates are compared, by candidates. Ratios are medians over
the rounds; `_by_best_times` compares each one's fastest round instead, which other work on the machine disturbs least.
With one thread, seconds are the processor's.
`GOMP_SPINCOUNT` is what the commands set for themselves: without it torch's idle threads take time from the scan's.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from indexing import NO_TOKENIZER, given_second_moment, make_model
from measurement import save
from trackstar.choices import CODECS, CodecName
from trackstar.corpus import TokenizedExample, open_corpus
from trackstar.indexing.provenance import make_manifest
from trackstar.indexing.settings import ChosenSettings
from trackstar.model.language_model import wrap_model
from trackstar.retrieval.packed_scan import QuantizedQueries
from trackstar.retrieval.scoring import Scorer
from trackstar.retrieval.top_candidates import top_candidates
from trackstar.store import (
    Index,
    IndexWriter,
    ShardContent,
    WhiteningEntry,
    encode,
    quantized_bits,
    row_bytes,
    tensors_digest,
)

BATCHES = (1, 16, 256)
IN_CACHE_BYTES = 4 << 20
WHITENING = {"whitening": torch.zeros(1)}  # rows are scanned as they are


def make_store(folder: str | Path, rows: int, codec: CodecName, *, shape: str = "llama-135m", side: int = 64) -> Index:
    """A store of random rows: a scan's speed does not depend on what they are."""
    model = wrap_model(make_model(shape, "float32", "cpu"), NO_TOKENIZER)
    moment = given_second_moment(model)
    whitened = quantized_bits(codec) is not None
    entry = WhiteningEntry(source="none", damping=0.0, digest=tensors_digest(WHITENING)) if whitened else None
    manifest = make_manifest(
        model, open_corpus(["rows made for the benchmark"]), moment,
        ChosenSettings(window_tokens=2, side=side, codec=codec), whitening=entry,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shard_rows = manifest.shard_examples
    values = torch.randn(shard_rows, manifest.dimensions, generator=generator)
    stored = encode(values, codec, len(manifest.layer_blocks))
    del values
    with IndexWriter.open(folder, manifest) as writer:
        writer.write_tensors("second_moment", moment.tensors())
        for first in range(0, rows, shard_rows):
            examples = [_example(first + row) for row in range(min(shard_rows, rows - first))]
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
        if whitened:
            writer.write_tensors("whitening", WHITENING)
        else:
            writer.write_tensors("autocorrelation", {"autocorrelation": torch.zeros(1)})
        writer.finish(records=rows, skipped=0)
    return Index.open(folder)


def store_rows(codec: CodecName, rows: int, size: int) -> int:
    """Rows of a codec's store of at least `rows` rows and `size` bytes."""
    return max(rows, -(-size // row_bytes(codec, 65_536, 16)))


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


def summed(parts: list[Tensor]) -> None:
    for codes in parts:
        codes.view(torch.int64).sum()


def timed(run: Callable[[], object]) -> float:
    """Seconds of a run: the processor's with one thread, which other work disturbs less, else those elapsed."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--codecs", nargs="*", default=list(CODECS))
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--store-mib", type=int, default=1024)
    parser.add_argument("--shared-machine", action="store_true", help="say in the figures that other work ran beside")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    part = torch.randn(1024, 65_536, generator=torch.Generator().manual_seed(0))
    values = part.repeat(-(-arguments.rows // 1024), 1)[: arguments.rows]
    figures = []
    for codec in arguments.codecs:
        with tempfile.TemporaryDirectory() as folder:
            rows = store_rows(codec, arguments.rows, arguments.store_mib << 20)
            index = make_store(Path(folder) / "index", rows, codec)
            for queries in arguments.batches:
                line = measured(index, values, queries, arguments.rounds)
                print(line, flush=True)
                figures.append(line)
    save(
        f"scan-cpu-{arguments.threads}-threads",
        {
            "product_rows": arguments.rows,
            "store_mib": arguments.store_mib,
            "machine_was_shared": arguments.shared_machine,
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
            "threads": arguments.threads,
            "clock": "processor" if arguments.threads == 1 else "elapsed",
            "lines": figures,
            "bars": {
                "float16 of reading": 0.5, "1-bit times the product": 8, "int8 times the product": 3.5,
                "4-bit times the product": 2,
            },
        },
    )  # fmt: skip


def measured(index: Index, values: Tensor, queries: int, rounds: int) -> dict[str, object]:
    codec = index.manifest.codec
    vectors = torch.randn(queries, index.dimensions)
    columns = vectors.T.contiguous() if queries > 1 else vectors[0]
    scorer = Scorer(vectors=vectors, multipliers=torch.ones(index.rows))
    mapped = [shard.stored.codes for shard in index.shards]  # mapped once, as a search does
    cached = in_cache(index, vectors)
    readers: dict[str, tuple[int, Callable[[], object]]] = {
        "scan": (stored_bytes(index), lambda: top_candidates(index, scorer, 10)),
        "product": (values.nbytes, lambda: values @ columns),
        "read": (stored_bytes(index), lambda: summed(mapped)),
        "sum": (values.nbytes, lambda: summed([values])),
        "one": (values.nbytes, lambda: values @ vectors[0]),
    }
    if cached is not None:
        readers["in_cache"] = cached
    for _, run in readers.values():
        run()
    if queries > 1:
        rounds = max(1, rounds // 2)
    times = [{name: timed(run) for name, (_, run) in readers.items()} for _ in range(rounds)]
    rates = {name: size / statistics.median(one[name] for one in times) / 1e9 for name, (size, _) in readers.items()}
    best = {name: size / min(one[name] for one in times) / 1e9 for name, (size, _) in readers.items()}
    reading = ("read", "sum", "one")
    memory, best_memory = (max(found[name] for name in reading) for found in (rates, best))
    bytes_each = stored_bytes(index) // index.rows
    # A candidate's seconds in the product over those in the scan.
    faster = [one["product"] / len(values) / (one["scan"] / index.rows) for one in times]
    smallest = values.nbytes / len(values) / bytes_each
    line: dict[str, object] = {
        "codec": codec,
        "rows": index.rows,
        "bytes_an_example": bytes_each,
        "queries": queries,
        "candidates_per_s_per_query": round(rates["scan"] * 1e9 / bytes_each * queries),
        "times_the_float32_product": round(statistics.median(faster), 2),
        "times_the_float32_product_by_best_times": round(smallest * best["scan"] / best["product"], 2),
        "times_the_product_at_most": round(smallest * best_memory / best["product"], 2),
        "scan_gb_per_s": round(rates["scan"], 2),
        "read_gb_per_s": round(rates["read"], 2),
        "product_gb_per_s": round(rates["product"], 2),
        "memory_gb_per_s": round(memory, 2),
        "of_reading": round(statistics.median(one["read"] / one["scan"] for one in times), 3),
        "of_memory": round(rates["scan"] / memory, 3),
        "of_memory_by_best_times": round(best["scan"] / best_memory, 3),
    }
    if cached is not None:
        line["in_cache_gb_per_s"] = round(rates["in_cache"], 2)
        line["in_cache_of_memory_by_best_times"] = round(best["in_cache"] / best_memory, 2)
    return line


def stored_bytes(index: Index) -> int:
    return index.rows * row_bytes(index.manifest.codec, index.dimensions, len(index.manifest.layer_blocks))


def in_cache(index: Index, vectors: Tensor) -> tuple[int, Callable[[], object]] | None:
    """Bytes and a run of the few queries' kernel over codes that stay in the cache, as often as fills 64 MiB."""
    bits = quantized_bits(index.manifest.codec)
    if bits is None or len(vectors) > 16:
        return None
    stored = index.shards[0].stored[: IN_CACHE_BYTES * index.rows // stored_bytes(index)]
    kernel = QuantizedQueries(vectors, len(index.manifest.layer_blocks), bits)

    def run() -> None:
        for _ in range(16):
            kernel.scores(stored)

    return 16 * stored.codes.nbytes, run


if __name__ == "__main__":
    main()
