"""Speed of a search of a store on an S3 server against the same store in a folder, and how much of it is waiting.

The server is moto's, in a process of its own on this machine, with the same cores: it answers at the speed of Python
and goes over a whole object for each range of it. So the figures say whether reading ahead loses anything against
fetching, not what a cloud's storage gives. In the same run, in turn: the top-10 search of the folder, of the server,
and as a bar, the server's codes fetched by the client alone, in the same ranges, without a search (`fetching`). Waiting
is the share of the search that passes until rows are there.

    python benchmarks/remote_store.py [--megabytes 256] [--threads 2] [--rounds 3]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from measurement import save
from scan import make_store
from trackstar.choices import CodecName
from trackstar.retrieval.scoring import Scorer
from trackstar.retrieval.top_candidates import top_candidates
from trackstar.store import CodeChunk, Index, row_bytes
from trackstar.store.files import remote as remote_files
from trackstar.store.files.read_ahead import AHEAD

CODECS: tuple[CodecName, ...] = ("1-bit", "int8", "float16")
SERVER = """
from moto.server import ThreadedMotoServer
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class Waiting:
    """Times how long a search waits for an index's chunks, and for the few rows that it scores again."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._originals: dict[str, Any] = {name: getattr(Index, name) for name in ("iterate", "some_rows")}

    def __enter__(self) -> "Waiting":
        iterate, some_rows = self._originals["iterate"], self._originals["some_rows"]

        def timed_chunks(index: Index, rows_per_chunk: int) -> Iterator[CodeChunk]:
            chunks = iterate(index, rows_per_chunk)
            while (chunk := self._timed(lambda: next(chunks, None))) is not None:
                yield chunk

        setattr(Index, "iterate", timed_chunks)  # noqa: B010 - a method is replaced on purpose
        setattr(Index, "some_rows", lambda index, rows: self._timed(lambda: some_rows(index, rows)))  # noqa: B010 - likewise
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(Index, name, original)

    def _timed(self, wait: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return wait()
        finally:
            self.seconds += time.perf_counter() - began


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def fetch(index: Index) -> None:
    """Every code, one part after the other, by the client alone."""
    for shard in index.shards:
        place = shard.file.tensors["codes"]
        path: Any = shard.path
        for begin in range(place.start, place.stop, remote_files.PART_BYTES):
            end = min(begin + remote_files.PART_BYTES, place.stop)
            starts = list(range(begin, end, remote_files.RANGE_BYTES))
            ends = [min(start + remote_files.RANGE_BYTES, end) for start in starts]
            path.fs.cat_ranges([path.path] * len(starts), starts, ends, on_error="raise")


def measured(codec: CodecName, megabytes: int, rounds: int, folder: Path) -> dict[str, object]:
    rows = (megabytes << 20) // row_bytes(codec, 65_536, 16)
    here = make_store(folder / codec, rows, codec)
    began = time.perf_counter()
    there = make_store(f"s3://bench/{codec}", rows, codec)
    writing = time.perf_counter() - began
    scorer = Scorer(vectors=torch.randn(1, here.dimensions), multipliers=torch.ones(rows))
    found = [top_candidates(index, scorer, 10) for index in (here, there)]
    assert torch.equal(found[0].proponents, found[1].proponents)
    lines = []
    for _ in range(rounds):
        local = timed(lambda: top_candidates(here, scorer, 10))
        with Waiting() as waiting:
            remote = timed(lambda: top_candidates(there, scorer, 10))
        lines.append((local, remote, waiting.seconds / remote, timed(lambda: fetch(there))))
    local, remote, share, fetching = (statistics.median(line[place] for line in lines) for place in range(4))
    size = rows * row_bytes(codec, 65_536, 16)
    return {
        "codec": codec,
        "rows": rows,
        "megabytes": round(size / 1e6),
        "local_gb_per_s": round(size / local / 1e9, 2),
        "remote_gb_per_s": round(size / remote / 1e9, 3),
        "fetching_gb_per_s": round(size / fetching / 1e9, 3),
        "remote_of_fetching": round(statistics.median(f / r for _, r, _, f in lines), 2),
        "waiting_share": round(share, 3),
        "writing_s": round(writing, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        os.environ |= {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anything"}
        import fsspec

        fsspec.filesystem("s3").mkdir("bench")
        with tempfile.TemporaryDirectory() as folder:
            figures = [measured(codec, arguments.megabytes, arguments.rounds, Path(folder)) for codec in CODECS]
    finally:
        server.kill()
        server.wait()
    save(
        f"remote-store-cpu-{arguments.threads}-threads",
        {
            "server": "moto, on the same two cores",
            "ahead": AHEAD,
            "part_bytes": remote_files.PART_BYTES,
            "range_bytes": remote_files.RANGE_BYTES,
            "lines": figures,
        },
    )


if __name__ == "__main__":
    main()
