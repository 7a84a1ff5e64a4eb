"""Fuzz the command line: every option of every command, with hostile values, against a tiny prepared world.

    python tests/fuzz/command_lines.py --cases 10000 --processes 2

A command line is made from click's own parameters: a run that works, changed in a few options by values of hostile
pools or arbitrary ones. It may do what it is for, or refuse in one line; a traceback, a hang, or a changed input is a
defect. Work that is long for any input (training steps, the demo's model, the explorer's server, a cluster) is cut
where it begins; all checks before it are the real ones.
"""

import argparse
import collections
import contextlib
import faulthandler
import hashlib
import io
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import click
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_models import save_tiny_model
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.errors import LONGEST_MESSAGE, OptionError

SECONDS_A_CASE = 30
SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
TEXTS = ["The capital of France is Paris.", "Berlin is in Germany.", "Gold is Au.", "In Brazil it rains."]
SHAPE = "--steps 2 --width 8 --layers 1 --heads 2 --mlp-width 8 --vocabulary 300 --context-tokens 16".split()

# Command to a command line that works, relative to the world.
WORKING = {
    "index": "--model in/model --data in/corpus.jsonl --out out/new --side 4 --codec float16 --second-moment none",
    "finish": "in/index",
    "add": "in/index --data in/more.jsonl --out out/larger",
    "merge": "in/index in/other --out out/merged",
    "remove": "in/index --names in/names.txt --out out/smaller",
    "convert": "in/index --codec float16 --out out/converted",
    "verify": "in/index",
    "query": "in/index --queries in/queries.jsonl --out out/r.jsonl",
    "explore": "in/index in/results.jsonl --no-browser",
    "audit": "in/results.audit.json --index in/index --queries in/queries.jsonl",
    "generate": "--model in/model --queries in/queries.jsonl --out out/a.jsonl --samples 2 --max-new-tokens 2",
    "evaluate": "--config in/facts.toml --out out/report",
    "pretrain": f"--data in/corpus.jsonl --out out/run {' '.join(SHAPE)}",
    "demo": "--out out/demo",
}
OTHER_WORKING = {
    "query": [
        "in/index --prompt Paris --completion France", "in/index --prompt Paris --generate --max-new-tokens 2",
        "in/index --prompt Par --completion is --join none",
        "--data in/corpus.jsonl --model in/model --side 4 --second-moment none --queries in/queries.jsonl "
        "--out out/s.jsonl",
    ],
    "add": ["--index in/small --data in/more.jsonl --out out/larger-small"],
    "convert": ["in/small --codec 1-bit --out out/converted-small"],
}  # fmt: skip

# What is drawn oftener, as it has more options, or costs less.
COMMANDS = [
    *WORKING,
    *["index", "query"] * 4,
    *["add", "merge", "remove", "convert", "explore", "audit", "generate", "pretrain"] * 2,
]

PATHS = [
    "in", "in/corpus.jsonl", "in/corpus", "in/model", "in/model/config.json", "in/index", "in/index/manifest.json",
    "in/small", "in/other", "in/queries.jsonl", "in/names.txt", "in/facts.toml", "in/results.jsonl", "in/link.jsonl",
    "in/results.audit.json", "in/results.report.json", "in/hard.jsonl", "in/unfinished", "out/new", "out/x",
    "out/r.jsonl",
    "out/deep/er/x.jsonl", ".", "..", "/", "", " ", "-", "~", "/dev/null", "/dev/stdout", "/dev/fd/1", "/proc/self/mem",
    "/proc/self/fd/1", "in/fifo", "in/device", "in/loop", "in/corpus.jsonl/x", "x" * 300, "out/" + "x" * 300,
    "x/" * 2100,
    "a\0b", "\udcff\udcfe", "caf\u00e9 \u202e", "in/*.jsonl", "in/[", "in/**/*", "foo://bar/baz", "http://127.0.0.1:9/x",
    "file:///nowhere", "memory://x/y", "s3:/x", "://", "gs://", "a::b://c", "hub/name", "no-such-folder/x", "$HOME",
    "--out", "a\nb", "\x1b[31m", "in/empty", "in/empty.jsonl", "in/binary.jsonl",
]  # fmt: skip
INTEGERS = [
    "0", "-1", "1", "2", "3", "7", "8", "100", "65535", "65536", "10000", str(2**31), str(2**32), str(2**62),
    str(2**63 - 1),
    str(2**63), str(2**64 - 1), str(2**64), "99999999999999999999", "-99999999999999999999", "1" * 5000, "1e3", "1.5",
    "nan",
    "", "0x10", "1_000", "\u0663", "many", " 4 ", "+4", "-0",
]  # fmt: skip
FLOATS = [
    "0", "-0.0", "0.1", "1", "1.0000001", "-1", "nan", "inf", "-inf", "1e308", "1e999", "1e-320", "5e-324", "many", "",
    "99999999999999999999", "1_0", "0x1p3", "1" * 400,
]  # fmt: skip
WORDS = [
    "", "x", "text", "id", "prompt", "auto", "none",
    "estimate", "cpu", "cuda", "cuda:99", "mps", "meta", "cpu:0", "0/0",
    "1/1",
    "1/2", "2/1", "-1/2", "1/999999999", "1/2/3", "1/" + "9" * 30, "\u0661/\u0662", "(", "(a+)+$", r".*(\d+).*", "[",
    "a{9999999999}",
    r"((\w+)+)+!", r".*\.(\d+)\..*", "(?P<n>x)" * 200, "(" * 500 + ")" * 500, "\\", "localhost:1", "local", "ray://x:1",
    "float32", "1-bit", "a\0b", "\udcff", "x" * 5000, "\n", "\u202e", "%s{}", "'; --",
]  # fmt: skip
WORD_METAVARS = {"NAME", "TEXT", "REGEX", "I/N", "ADDRESS", "V"}
FILLED = {"model", "corpus", "index", "other", "small"}
"""Folders of inputs, which no command may add to."""
FREE = {"empty", "unfinished"}
"""Folders that a command may use as an output: an empty one, and an index in its first pass."""
ARBITRARY = st.one_of(
    st.integers().map(str), st.floats().map(str), st.text(max_size=40), st.binary(max_size=20).map(os.fsdecode)
)


@contextlib.contextmanager
def world() -> Iterator[Path]:
    """A folder, made the current one, with `in/` (all inputs, that no command may change) and `out/`."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="command-lines-") as name, long_work_cut():
        folder = Path(name).resolve()
        os.chdir(folder)
        try:
            _make_inputs(folder / "in")
            (folder / "out").mkdir()
            yield folder
        finally:
            os.chdir(before)


def _make_inputs(folder: Path) -> None:
    save_tiny_model(folder / "model", num_hidden_layers=1)
    lines = [json.dumps({"id": f"e{n}", "text": text}) + "\n" for n, text in enumerate(TEXTS)]
    facts = {"fact_id": "e0", "prompt0": "The capital of France is", "entity1": "Paris", "entity0": "France",
             "relation": "capital", "trex_sentences": ["e0"]}  # fmt: skip
    (folder / "corpus").mkdir()
    files = {
        "corpus.jsonl": "".join(lines), "corpus/part.jsonl": lines[0],
        "more.jsonl": json.dumps({"id": "m", "text": "Rome"}),
        "queries.jsonl": json.dumps({"query_id": "q", "prompt": "The capital of France is", "completion": "Paris"}),
        "names.txt": "e1\n", "facts.jsonl": json.dumps(facts), "empty.jsonl": "", "binary.jsonl": "\0\1\2",
        "facts.toml": 'model = "model"\ncorpus = "corpus.jsonl"\nfacts = "facts.jsonl"\nside = 4\n'
        'second_moment = "none"\nmethods = ["gold", "BM25"]\n',
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
    (folder / "unfinished" / "part").mkdir(parents=True)
    os.link(folder / "corpus.jsonl", folder / "hard.jsonl")
    os.symlink("corpus.jsonl", folder / "link.jsonl")
    os.symlink("loop", folder / "loop")
    os.symlink("/dev/null", folder / "device")
    os.mkfifo(folder / "fifo")
    model = "index --model in/model --side 8 --layer-blocks 2 --second-moment none"
    for line in (
        f"{model} --data in/corpus.jsonl --out in/index --codec float16",
        f"{model} --data in/more.jsonl --out in/other --codec float16",
        f"{model} --data in/corpus.jsonl --out in/small --codec 4-bit",
        "query in/index --queries in/queries.jsonl --out in/results.jsonl",
    ):
        with contextlib.redirect_stderr(io.StringIO()) as shown, contextlib.redirect_stdout(io.StringIO()):
            status = framework.run(command_group, line.split())
        assert status == 0, shown.getvalue()


@contextlib.contextmanager
def long_work_cut() -> Iterator[None]:
    """Cut what takes long whatever the input: training, the demo after its files, servers, clusters."""

    def trained(_run: Any, _state: Any, _bar: Any) -> Path:
        return Path("trained")

    def cut(*_arguments: Any, **_options: Any) -> Any:
        raise OptionError("cut: long work begins here")

    with (
        mock.patch("trackstar.pretraining.training._train", trained),
        mock.patch("trackstar.demo.runner.pretrain", cut),
        mock.patch("trackstar.demo.arithmetic_runner.pretrain", cut),
        mock.patch("trackstar.workers.RayWorkers.__init__", cut),
        mock.patch("uvicorn.Server.run", return_value=None),
        mock.patch("webbrowser.open", return_value=True),
    ):
        yield


# ---- Command lines -------------------------------------------------------------------------------------------------


def values_of(parameter: click.Parameter) -> st.SearchStrategy[str]:
    """Hostile and plain values for a parameter, by click's type and the metavar."""
    if isinstance(parameter.type, click.types.IntParamType):
        pool = st.sampled_from(INTEGERS)
    elif isinstance(parameter.type, click.types.FloatParamType):
        pool = st.sampled_from(FLOATS)
    elif isinstance(parameter.type, click.Choice):
        pool = st.sampled_from([*map(str, parameter.type.choices), *WORDS])
    else:
        is_path = (parameter.metavar or "").strip("[]").split()[0] not in (
            "NAME",
            "TEXT",
            "REGEX",
            "I/N",
            "ADDRESS",
            "V",
        )
        pool = st.sampled_from(PATHS if is_path else WORDS + PATHS)
    return st.one_of(pool, pool, pool, ARBITRARY)


@st.composite
def command_lines(draw: st.DrawFn, commands: Sequence[str] = tuple(COMMANDS)) -> list[str]:
    """A command that works, with a few options added, replaced or left out."""
    name = draw(st.sampled_from(commands))
    command = command_group.commands[name]
    words = shlex.split(draw(st.sampled_from([WORKING[name], *OTHER_WORKING.get(name, [])])))
    parameters = [one for one in command.params if one.expose_value]
    for _ in range(draw(st.integers(0, 3))):
        parameter = draw(st.sampled_from(parameters))
        if not isinstance(parameter, click.Option):
            words.insert(0, draw(values_of(parameter)))
            if draw(st.booleans()) and len(words) > 1 and not words[1].startswith("-"):
                del words[1]
            continue
        flag = draw(st.sampled_from(parameter.opts + parameter.secondary_opts))
        if parameter.is_flag:
            words.append(flag)
            continue
        value = draw(values_of(parameter))
        if flag in words and draw(st.integers(0, 3)):
            words[words.index(flag) + 1 :][:1] = []
            position = words.index(flag)
            words[position : position + 2] = [flag, value]
        else:
            words += [f"{flag}={value}"] if draw(st.booleans()) else [flag, value]
    if draw(st.integers(0, 9)) == 0 and words:
        del words[draw(st.integers(0, len(words) - 1))]
    return [name, *words]


# ---- Running one ---------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """A command line takes too long."""


def state_of(folder: Path) -> dict[str, str]:
    """Kind, link or digest of everything in a folder, but for what runs cache in an index."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name in ("derived", ".lock") or "/derived/" in name:
            continue
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.blake2b(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


def defect_of(words: Sequence[str], inputs: dict[str, str], folder: Path) -> str | None:
    """Run a command line in the world; what is wrong with its end, or None.

    Args:
        words: The command line.
        inputs: `state_of` the world's inputs.
        folder: The world.
    """
    out, err = io.StringIO(), io.StringIO()
    status: object = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = framework.run(command_group, words)
    except Hang:
        return "hang"
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        return "".join(traceback.format_exception(error)[-12:])
    defect = _defect_of_messages(status, err.getvalue())
    changed = changes(inputs, state_of(folder / "in"))
    if defect is None and changed:
        defect = f"inputs changed: {', '.join(changed[:5])}"
    return defect


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Inputs that are changed or gone, and what is new in a folder of inputs; a new name beside them is no change."""
    gone = [name for name in before if now.get(name) != before[name] and name.split("/")[0] not in FREE]
    return [*gone, *(name for name in now if name not in before and name.split("/")[0] in FILLED)]


def _defect_of_messages(status: object, shown: str) -> str | None:
    lines = [line for line in shown.splitlines() if line.strip()]
    if "Traceback" in shown or any(line.startswith("  File ") for line in lines):
        return f"traceback shown: {shown[-400:]}"
    if status not in (0, 1, 2):
        return f"exit status {status}: {shown[-200:]}"
    if status and not lines:
        return f"exit status {status} without a word"
    if any(len(line) > LONGEST_MESSAGE + 200 for line in lines):
        return f"a line of {max(map(len, lines))} characters"
    return None


# ---- Many ----------------------------------------------------------------------------------------------------------


def fuzz(cases: int, first_seed: int, report: Path) -> None:
    """Run so many command lines in this process; defects are appended to the report, one JSON line each."""
    faulthandler.enable()
    counts: collections.Counter[str] = collections.Counter()

    def alarm(_signal: int, _frame: FrameType | None) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, alarm)
    with world() as folder:
        inputs = state_of(folder / "in")

        @seed(first_seed)
        @settings(
            max_examples=cases, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=SUPPRESSED,
        )  # fmt: skip
        @given(command_lines())
        def run(words: list[str]) -> None:
            nonlocal inputs
            begun = time.monotonic()
            _write(report.with_suffix(f".{os.getpid()}"), {"words": words})
            faulthandler.dump_traceback_later(3 * SECONDS_A_CASE, exit=True)
            signal.alarm(SECONDS_A_CASE)
            try:
                defect = defect_of(words, inputs, folder)
            finally:
                signal.alarm(0)
                faulthandler.cancel_dump_traceback_later()
            counts["cases"] += 1
            counts[words[0]] += 1
            seconds = time.monotonic() - begun
            if defect is not None:
                counts["defects"] += 1
                _append(report, {"words": words, "defect": defect, "seconds": round(seconds, 1)})
            if state_of(folder / "in") != inputs:
                shutil.rmtree(folder / "in")
                _make_inputs(folder / "in")
                inputs = state_of(folder / "in")
            if counts["cases"] % 40 == 0:
                shutil.rmtree(folder / "out")
                (folder / "out").mkdir()

        run()
    _append(report, {"counts": counts})


def _append(path: Path, content: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=Path("build/fuzzing/command-lines.jsonl"))
    parser.add_argument("--run", help="one command line, in a world of its own")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if options.run is not None:
        with world() as folder:
            sys.exit(defect_of(shlex.split(options.run), state_of(folder / "in"), folder) or 0)
    report = options.report.resolve()
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    # Processes of 250 cases, so that one that dies takes few cases with it.
    todo = [(250, options.seed + number) for number in range(options.cases // 250)]
    running: list[Any] = []
    died = 0
    while todo or running:
        while todo and len(running) < options.processes:
            cases, number = todo.pop()
            running.append(context.Process(target=fuzz, args=(cases, number, report)))
            running[-1].start()
        time.sleep(0.5)
        for process in [one for one in running if one.exitcode is not None]:
            running.remove(process)
            if process.exitcode != 0:
                died += 1
                last = report.with_suffix(f".{process.pid}").read_text(encoding="utf-8")
                _append(report, {"defect": f"process ended with {process.exitcode}", **json.loads(last)})
            report.with_suffix(f".{process.pid}").unlink(missing_ok=True)
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    counts: collections.Counter[str] = collections.Counter()
    for line in lines:
        counts.update(line.get("counts", {}))
    print(json.dumps({**counts, "processes_died": died}, indent=1))
    for line in lines:
        if "defect" in line:
            print(shlex.join(line["words"])[:300].encode("ascii", "backslashreplace").decode(), "\n   ", line["defect"])
    sys.exit(1 if any("defect" in line for line in lines) else 0)


if __name__ == "__main__":
    main()
