"""Lets random faults strike everything that makes or asks an index, and a load the explorer's API; keeps the figures.

    python tests/faults/run.py [--indexing 200] [--others 100] [--soak-seconds 60] [--seed N] [--name faults-cpu]

After each fault the same call is made again until it is done. What comes of it must be what an undisturbed run gives:
every file of an index byte for byte, every answer. A seed gives the same faults; moments depend on the machine's pace.
"""

import argparse
import importlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Before anything that computes is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_TESTS = Path(__file__).resolve().parents[1]
for _place in (_TESTS.parent / "benchmarks", _TESTS):
    if str(_place) not in sys.path:
        sys.path.insert(0, str(_place))

from faults.indexing import Indexing, undisturbed_indexes  # noqa: E402
from faults.others import Others  # noqa: E402
from faults.ray_faults import RayFaults  # noqa: E402
from faults.setting import Setting  # noqa: E402
from faults.soak import soak  # noqa: E402
from faults.tally import Tally  # noqa: E402

RAY_SHARE = 0.2
"""Of the faults while indexing: on Ray clusters. They are slow to start, so that few of them lose driver or node."""


def harness(
    folder: Path, *, indexing: int, others: int, soak_seconds: float, seed: int, ray_share: float = RAY_SHARE
) -> dict[str, Any]:
    """Everything; gives the figures.

    Args:
        folder: An empty place for all that is made.
        indexing: How many faults while indexing.
        others: How many during everything else.
        soak_seconds: How long the explorer is under load; 0 leaves it out.
        seed: Of the faults.
        ray_share: See `RAY_SHARE`; 0 starts no cluster at all.
    """
    began = time.monotonic()
    seconds: dict[str, float] = {}

    def told(part: str) -> None:
        nonlocal began
        seconds[part] = round(time.monotonic() - began, 1)
        print(f"{part}: {seconds[part]} s", file=sys.stderr, flush=True)
        began = time.monotonic()

    setting = Setting.made(folder)
    expected = undisturbed_indexes(setting)
    told("undisturbed indexes")
    first, second = Tally(), Tally()
    on_ray = round(indexing * ray_share)
    seldom = on_ray // 8
    array, remote = round(0.3 * indexing), round(0.15 * indexing)
    ways = {"array of tasks": array, "failing remote store": remote}
    ways["one process"] = indexing - on_ray - array - remote
    for way, faults in ways.items():
        Indexing(setting, expected, first).run(way, faults, seed)
        told(way)
    cluster = RayFaults(setting, expected, first)
    for part, faults in (
        (cluster.driver_deaths, seldom),
        (cluster.node_deaths, seldom),
        (cluster.worker_deaths, on_ray - 2 * seldom),
    ):
        if faults:
            part(faults, seed)
            told(part.__name__.replace("_", " ") + " on Ray")
    asked = round(0.05 * others) if ray_share else 0
    if asked:
        cluster.queries(asked, seed, second)
        told("queries on Ray")
    rest = Others(setting, second)
    rest.prepare()
    rest.run(others, seed)
    told("queries, conversion and the like")
    figures: dict[str, Any] = {"seed": seed, "indexing": first.figures(), "others": second.figures()}
    if soak_seconds:
        figures["explorer"] = soak(setting, soak_seconds, seed)
        told("explorer")
    return figures | {"duration_seconds": seconds}


def wrong(figures: dict[str, Any]) -> list[str]:
    """Whatever should not have been."""
    return [line for part in ("indexing", "others", "explorer") for line in figures.get(part, {}).get("wrong", ())]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--indexing", type=int, default=200)
    parser.add_argument("--others", type=int, default=100)
    parser.add_argument("--soak-seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--name", default="faults-cpu", help="of the file in benchmarks/results; empty keeps none")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**9) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="trackstar-faults-") as folder:
        figures = harness(
            Path(folder) / "faults",
            indexing=arguments.indexing,
            others=arguments.others,
            soak_seconds=arguments.soak_seconds,
            seed=seed,
        )
    if arguments.name:
        importlib.import_module("measurement").save(arguments.name, figures)
    else:
        print(json.dumps(figures, indent=1, ensure_ascii=False))
    found = wrong(figures)
    print(f"{len(found)} wrong", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
