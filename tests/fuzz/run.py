"""Fuzz every reader with atheris: how many files in how many seconds, and whether anything escaped that is not ours.

    make fuzz                                               every reader, 30 minutes each
    python tests/fuzz/run.py --seconds 1800 manifest shard  some readers
    python tests/fuzz/run.py --replay FILE shard            one file, with the traceback of what it does

Each reader has processes of its own, which keep what covers more in `--work`, so that a later one begins there. A file
that a reader neither takes nor refuses as it must is put there as `crash-...`, `timeout-...` or `oom-...`. Figures
go to `benchmarks/results/fuzzing-cpu.json`; a reader's figures of an earlier run stay until it is run again.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import filelock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE.parent), str(ROOT / "benchmarks")]

# For a file of a few kilobytes, slower than this is a hang, and more memory, beyond that of imports, an explosion.
SECONDS_A_FILE = 20
# What the fuzzer itself keeps grows with the number of files: 2 KB for each was seen, 3 GB in half an hour.
SECONDS_A_PROCESS = 600
MEMORY_MIB = 3000
ADDRESS_SPACE = 6 << 30
# Kernels that Numba compiles cannot be instrumented.
COMPILED = ["trackstar.retrieval.packed_products", "trackstar.retrieval.packed_scan"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", help="which; all where none is named")
    parser.add_argument("--seconds", type=int, default=1800, help="for each reader")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "fuzzing", help="where inputs are kept")
    parser.add_argument("--name", default="fuzzing-cpu", help="of the file of results")
    parser.add_argument("--replay", type=Path, help="a file to give to one reader")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fuzz(options.readers[0], options.seconds, options.work)
        return
    from fuzz.readers import READERS, accepts, scratch

    if options.replay is not None:
        with scratch() as folder:
            taken = accepts(READERS[options.readers[0]], options.replay.read_bytes(), Path(folder))
            print("taken" if taken else "refused")
        return
    escaped = 0
    for name in options.readers or list(READERS):
        about = importlib.import_module("measurement").environment()
        figures = run(name, options.seconds, options.work)
        escaped += len(figures["escaped"])
        record(options.name, name, about, figures)
    sys.exit(1 if escaped else 0)


def run(name: str, seconds: int, work: Path) -> dict[str, Any]:
    """Fuzz one reader for so long, or until something escapes, in processes of at most ten minutes; its figures."""
    figures: dict[str, Any] = {"executions": 0, "seconds": 0, "edges_covered": 0, "inputs_kept": 0, "escaped": []}
    while figures["seconds"] < seconds and not figures["escaped"]:
        found = run_once(name, min(SECONDS_A_PROCESS, seconds - figures["seconds"]), work)
        for field, value in found.items():
            figures[field] = figures[field] + value if field in ("executions", "seconds") else value
    return figures


def run_once(name: str, seconds: int, work: Path) -> dict[str, Any]:
    """Fuzz one reader in a process of its own, from the inputs that earlier ones kept; its figures."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    before = set(folder.glob("*-*"))
    begun = time.monotonic()
    command = [sys.executable, __file__, "--child", "--seconds", str(seconds), "--work", str(work), name]
    with log.open("wb") as stream:
        status = subprocess.run(command, stdout=stream, stderr=stream, check=False).returncode
    text = log.read_text(encoding="utf-8", errors="replace")
    done = re.search(r"Done (\d+) runs in (\d+) second", text)
    executions = re.search(r"number_of_executed_units: (\d+)", text)
    escaped = sorted(path.name for path in set(folder.glob("*-*")) - before if not path.name.startswith("slow"))
    if not escaped and (status != 0 or done is None):
        escaped = [f"exit status {status}; see {log.name}"]
    return {
        "executions": int(done.group(1)) if done else int(executions.group(1)) if executions else 0,
        "seconds": int(done.group(2)) if done else round(time.monotonic() - begun),
        "edges_covered": max((int(number) for number in re.findall(r"cov: (\d+)", text)), default=0),
        "inputs_kept": int((re.findall(r"corp: (\d+)", text) or [0])[-1]),
        "escaped": escaped,
    }


def record(file: str, name: str, about: dict[str, Any], figures: dict[str, Any]) -> None:
    """Put a reader's figures into the file of results, with what they were measured on; several runs may do so."""
    measurement = importlib.import_module("measurement")
    path = measurement.RESULTS / f"{file}.json"
    versions = {package: importlib.metadata.version(package) for package in ("atheris", "pyarrow", "zstandard")}
    limits = {"seconds_a_file": SECONDS_A_FILE, "resident_mib": MEMORY_MIB, "address_space_gib": ADDRESS_SPACE >> 30}
    with filelock.FileLock(f"{path}.lock"):
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        known, note = before.get("readers", {}), {"note": before["note"]} if "note" in before else {}
        known[name] = {"commit": about["commit"], "uncommitted_changes": about["uncommitted_changes"], **figures}
        measurement.save(file, {"fuzzer_versions": versions, "limits": limits, **note, "readers": known})
    Path(f"{path}.lock").unlink(missing_ok=True)


def fuzz(name: str, seconds: int, work: Path) -> None:
    """Fuzz a reader in this process until the time is over or something escapes; does not return."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # By name: an extra that only this needs, and no checker sees.
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["trackstar"], exclude=COMPILED):
        readers: Any = importlib.import_module("fuzz.readers")
    reader, havoc = readers.READERS[name], readers.mutations.havoc
    folder = work / name
    kept, seeds = folder / "kept", folder / "seeds"
    for each in (kept, seeds):
        each.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(reader.seeds()):
        (seeds / f"{number:03d}").write_bytes(seed)
    place = readers.scratch()
    most_memory = _address_space() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most_memory, most_memory))
    count = 0

    def test(content: bytes) -> None:
        nonlocal count
        count += 1
        if count % 2000 == 0:
            readers.free()
        readers.accepts(reader, content, Path(place.name))

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        generator = random.Random(seed)
        if generator.randrange(5) == 0:
            return atheris.Mutate(content, most)
        try:
            changed = reader.mutate(content, generator, lambda part, _: _mutated(atheris, part, most, generator))
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            changed = havoc(content, generator)  # what earlier changes have made of it cannot be told apart any more
        return changed if len(changed) <= most else atheris.Mutate(content, most)

    regression = HERE / "corpus" / name
    arguments = [
        sys.argv[0], str(kept), str(seeds), *([str(regression)] if regression.is_dir() else []),
        f"-max_total_time={seconds}", f"-max_len={reader.longest}", f"-timeout={SECONDS_A_FILE}",
        f"-rss_limit_mb={MEMORY_MIB}", f"-artifact_prefix={folder}/", "-print_final_stats=1", "-len_control=0",
    ]  # fmt: skip
    atheris.Setup(arguments, test, custom_mutator=mutate)
    atheris.Fuzz()


def _mutated(atheris: Any, part: bytes, most: int, generator: random.Random) -> bytes:
    """A part changed by libFuzzer or by us."""
    havoc = importlib.import_module("fuzz.mutations").havoc
    return havoc(part, generator) if generator.randrange(2) else atheris.Mutate(part, max(most, len(part) + 1))


def _address_space() -> int:
    """Bytes of address space that this process has now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
