"""What the checks of an index cost: indexing and queries over a 1 GiB store, at an earlier revision and now, by turns.

    python benchmarks/checks.py --before REVISION --model demo-out/model/checkpoint-000450 --data demo-out/corpus.jsonl

Each revision indexes the same corpus into an index of its own, `--repeats` times as long as given: 14 times the
demo's are 1 GiB. Then, by turns, it indexes a quarter of that again, answers a query with `trackstar query`, and
passes over the store: the first pass of a process compares every block with its checksum, the next one does not. The
seconds of commands are those of the processors, start of the process included, as other work on the machine changes
them less; the seconds of passes are those of the clock.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measurement import save

ROOT = Path(__file__).resolve().parent.parent
_SCAN = """
import json, sys, time, torch
from trackstar.store import Index
from trackstar.retrieval.scoring import Scorer
from trackstar.retrieval.top_candidates import top_candidates
torch.set_num_threads(2)
index = Index.open(sys.argv[1])
scorer = Scorer(vectors=torch.randn(1, index.dimensions), multipliers=torch.ones(index.rows))
for part in index.iterate(1024):
    part.stored.codes.view(torch.uint8).sum()  # into the page cache, of both revisions
seconds = []
index = Index.open(sys.argv[1])
for _ in range(4):
    began = time.perf_counter()
    top_candidates(index, scorer, 10)
    seconds.append(time.perf_counter() - began)
print(json.dumps(seconds))
"""


def run(checkout: Path, *arguments: object) -> tuple[float, str]:
    """Processor seconds that Python takes in a checkout with these arguments, and what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    began = processor_seconds()
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return processor_seconds() - began, done.stdout.decode()


def processor_seconds() -> float:
    """Seconds that the processors have worked for the processes started here."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def longer(data: Path, out: Path, repeats: int) -> None:
    """The corpus, again and again with other names."""
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    with out.open("w", encoding="utf-8") as file:
        for turn in range(repeats):
            for number, record in enumerate(records):
                file.write(json.dumps({"id": f"{turn}-{number}", "text": record["text"]}) + "\n")


def measure(checkouts: dict[str, Path], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every step, by revision."""
    corpus, quarter = folder / "corpus.jsonl", folder / "quarter.jsonl"
    longer(options.data, corpus, options.repeats)
    longer(options.data, quarter, max(1, options.repeats // 4))
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"indexing": [], "query": [], "first scan": [], "next scan": []} for name in checkouts
    }
    settings = ("--codec", "float16", "--side", options.side, "--threads", options.threads)
    model = ("--model", options.model)
    for name, checkout in checkouts.items():
        run(checkout, "-m", "trackstar", "index", *model, "--data", corpus, "--out", folder / name, *settings)
    for turn in range(options.turns):
        for name, checkout in checkouts.items():
            out = folder / "again"
            took, _ = run(checkout, "-m", "trackstar", "index", *model, "--data", quarter, "--out", out, *settings)
            shutil.rmtree(out)
            seconds[name]["indexing"].append(took)
            print(turn, name, "indexed", round(took, 1), flush=True)
    question = ("--prompt", "The capital of France is", "--completion", "Paris", "--json", "--threads", options.threads)
    for turn in range(options.turns):
        for name, checkout in checkouts.items():
            took, _ = run(checkout, "-m", "trackstar", "query", folder / name, *question)
            seconds[name]["query"].append(took)
            _, printed = run(checkout, "-c", _SCAN, folder / name)
            first, *rest = json.loads(printed)
            seconds[name]["first scan"].append(first)
            seconds[name]["next scan"].append(min(rest))
            print(turn, name, round(took, 2), round(first, 3), round(min(rest), 3), flush=True)
    size = sum(file.stat().st_size for file in (folder / "now" / "shards").iterdir())
    return {"shard_bytes": size, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "earlier"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(earlier)], check=True)
        subprocess.run(["git", "checkout", "--quiet", options.before], cwd=earlier, check=True)
        figures = measure({"before": earlier, "now": ROOT}, Path(folder), options)
    # The least of several turns: whatever else the machine does only adds to it.
    least = {name: {step: min(values) for step, values in steps.items()} for name, steps in figures["seconds"].items()}
    ratios = {step: round(least["now"][step] / least["before"][step], 4) for step in least["now"]}
    save(
        f"checks-cpu-{options.threads}-threads",
        {"before_commit": options.before, **figures, "least": least, "now_over_before": ratios},
    )
    print(ratios)


if __name__ == "__main__":
    main()
