"""Speed of indexing at an earlier revision and now, in one run: the same benchmark by turns, each against a plain pass.

    python benchmarks/revisions.py --before REVISION [--case 14m-8x128] [--turns 3] [--rounds 4]

Each turn runs `indexing.py` of the earlier revision and then of this checkout. Both time the whole indexing pass as a
ratio to a plain training pass, so that a machine that becomes slower between turns does not count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measurement import save

ROOT = Path(__file__).resolve().parent.parent


def ratios(checkout: Path, case: str, rounds: int, threads: int) -> list[float]:
    """Ratios of one turn, as the checkout's own `indexing.py` measures them."""
    name = "of-one-turn"
    subprocess.run(
        [sys.executable, "benchmarks/indexing.py", "--cases", case, "--rounds", str(rounds),
         "--threads", str(threads), "--name", name],
        cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout / "src")}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    path = checkout / "benchmarks" / "results" / f"{name}.json"
    measured = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return measured["cases"][case]["time_ratios"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", required=True)
    parser.add_argument("--case", default="14m-8x128")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    measured: dict[str, list[float]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as folder:
        earlier = Path(folder) / "earlier"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(earlier)], check=True)
        subprocess.run(["git", "checkout", "--quiet", options.before], cwd=earlier, check=True)
        for turn in range(options.turns):
            for name, checkout in (("before", earlier), ("now", ROOT)):
                measured[name] += ratios(checkout, options.case, options.rounds, options.threads)
                print(turn, name, measured[name][-options.rounds :], flush=True)
    medians = {name: round(statistics.median(values), 4) for name, values in measured.items()}
    save(
        f"revisions-{options.case}-cpu-{options.threads}-threads",
        {
            "before_commit": options.before,
            "case": options.case,
            "time_ratios": measured,
            "time_ratio_medians": medians,
            "now_over_before": round(medians["now"] / medians["before"], 4),
        },
    )
    print(medians)


if __name__ == "__main__":
    main()
