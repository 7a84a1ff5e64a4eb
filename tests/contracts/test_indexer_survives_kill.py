"""The indexer is killed at random moments, over and over; the finished index is that of an undisturbed run."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from trackstar.store import Index

EXAMPLES, SHARD_EXAMPLES, KILLS = 120, 8, 12
START = multiprocessing.get_context("forkserver")
# The server process has everything imported but has run nothing, so that each run starts at once and clean.
START.set_forkserver_preload(["trackstar.attribution.answering", "transformers.models.llama.modeling_llama"])


def index_corpus(model: str, corpus: str, out: str) -> None:
    """What runs, and is killed, in a process of its own."""
    import torch

    from trackstar.indexing.build import build_index

    torch.set_num_threads(1)
    build_index(
        model, corpus, out, side=4, codec="float16", second_moment_examples=16, shard_examples=SHARD_EXAMPLES,
        batch_tokens=64,
        progress=False,
    )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run(model: Path, corpus: Path, out: Path, *, kill_after: float | None) -> float:
    """Run the indexer, or kill it after that many seconds; returns how long it ran."""
    process = START.Process(target=index_corpus, args=(str(model), str(corpus), str(out)))
    begun = time.monotonic()
    process.start()
    process.join(kill_after)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return time.monotonic() - begun


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    generator = random.Random(0)
    words = ["Paris", "is", "the", "capital", "of", "France", "Berlin", "Germany", "people", "speak"]
    path = tmp_path / "corpus.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(EXAMPLES):
            length = generator.randint(1, 14)
            file.write(json.dumps({"id": f"e{number}", "text": " ".join(generator.choices(words, k=length))}) + "\n")
    return path


def test_index_killed_at_random_moments_equals_the_undisturbed_one_byte_for_byte(
    tiny_model_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    run(tiny_model_folder, corpus, tmp_path / "first", kill_after=None)
    whole = run(tiny_model_folder, corpus, undisturbed, kill_after=None)
    assert Index.open(undisturbed).rows == EXAMPLES
    generator = random.Random(time.time_ns())
    moments = [generator.uniform(0, 0.5 * whole) for _ in range(KILLS)]
    for moment in moments:
        run(tiny_model_folder, corpus, disturbed, kill_after=moment)
    run(tiny_model_folder, corpus, disturbed, kill_after=None)
    assert content(disturbed) == content(undisturbed), f"killed after {moments} of {whole} seconds"
