"""Speed of the whole top-10 search by codec, against a plain float32 matrix product and the machine's read bandwidth.

For stores of 65,536 dimensions, memory-mapped and in the page cache, and batches of 1, 16 and 256 queries. In the same
run, in turn with every search: `values @ queries` of the same shapes in float32, from memory, without any search; and
the sum of all 8-byte words of the very files that are searched (`read`). Told are candidates a second and query, how
many times as fast as the product, and bytes a second over those of reading.

    GOMP_SPINCOUNT=10000 python benchmarks/scan.py [--rows 16384] [--threads 2] [--rounds 5] [--codecs int8 1-bit]

A store has ROWS rows, or as many as fill 1 GiB: one that fits into the processor's cache would tell too much. The
product's matrix of ROWS × 256 KiB must fit into memory; rates are compared, by candidates. `GOMP_SPINCOUNT` is what
the commands set for themselves: without it torch's idle threads take time from the scan's.
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
from trackstar.indexing.settings import IndexSettings
from trackstar.model.language_model import wrap_model
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
STORE_BYTES = 1 << 30
WHITENING = {"whitening": torch.zeros(1)}  # rows are scanned as they are


def make_store(folder: str | Path, rows: int, codec: CodecName, *, shape: str = "llama-135m", side: int = 64) -> Index:
    """A store of random rows: a scan's speed does not depend on what they are."""
    model = wrap_model(make_model(shape, "float32", "cpu"), NO_TOKENIZER)
    moment = given_second_moment(model)
    whitened = quantized_bits(codec) is not None
    entry = WhiteningEntry(source="none", damping=0.0, digest=tensors_digest(WHITENING)) if whitened else None
    manifest = make_manifest(
        model, open_corpus(["rows made for the benchmark"]), moment,
        IndexSettings(window_tokens=2, side=side, codec=codec), whitening=entry,
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


def store_rows(codec: CodecName, rows: int) -> int:
    """Rows of a codec's store."""
    return max(rows, -(-STORE_BYTES // row_bytes(codec, 65_536, 16)))


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
    parser.add_argument("--codecs", nargs="*", default=list(CODECS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    part = torch.randn(1024, 65_536, generator=torch.Generator().manual_seed(0))
    values = part.repeat(-(-arguments.rows // 1024), 1)[: arguments.rows]
    figures = []
    for codec in arguments.codecs:
        with tempfile.TemporaryDirectory() as folder:
            index = make_store(Path(folder) / "index", store_rows(codec, arguments.rows), codec)
            read_everything(index)  # into the page cache
            for queries in BATCHES:
                line = measured(index, values, queries, arguments.rounds)
                print(line, flush=True)
                figures.append(line)
    save(
        f"scan-cpu-{arguments.threads}-threads",
        {
            "product_rows": arguments.rows,
            "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
            "threads": arguments.threads,
            "lines": figures,
            "bars": {"float16 of reading": 0.5, "1-bit times the product": 8, "int8 times the product": 3.5},
        },
    )


def measured(index: Index, values: Tensor, queries: int, rounds: int) -> dict[str, object]:
    codec = index.manifest.codec
    vectors = torch.randn(queries, index.dimensions)
    columns = vectors.T.contiguous() if queries > 1 else vectors[0]
    scorer = Scorer(vectors=vectors, multipliers=torch.ones(index.rows))
    top_candidates(index, scorer, 10)
    if queries > 16:
        rounds = max(1, rounds // 2)
    times = [
        (
            timed(lambda: top_candidates(index, scorer, 10)),
            timed(lambda: values @ columns),
            timed(lambda: read_everything(index)),
        )
        for _ in range(rounds)
    ]
    scan, product, read = (statistics.median(one[place] for one in times) for place in range(3))
    size = index.rows * row_bytes(codec, index.dimensions, len(index.manifest.layer_blocks))
    return {
        "codec": codec,
        "rows": index.rows,
        "bytes_an_example": size // index.rows,
        "queries": queries,
        "candidates_per_s_per_query": round(index.rows * queries / scan),
        "times_the_float32_product": round(
            statistics.median(p / len(values) / (s / index.rows) for s, p, _ in times), 2
        ),
        "scan_gb_per_s": round(size / scan / 1e9, 2),
        "read_gb_per_s": round(size / read / 1e9, 2),
        "of_reading": round(statistics.median(r / s for s, _, r in times), 3),
        "product_gb_per_s": round(values.nbytes / product / 1e9, 2),
    }


if __name__ == "__main__":
    main()
