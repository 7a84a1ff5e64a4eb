"""Made-up command lines: each does what it is for or is refused in one line, and none changes what it reads."""

import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import hypothesis
import pytest

from fuzz.command_lines import SECONDS_A_CASE, SUPPRESSED, Hang, command_lines, defect_of, state_of, world

# What once escaped.
KEPT = [
    "index --model in/model --data in/corpus.jsonl --out out/new --limit 99999999999999999999",
    "index --model in/model --data in/corpus.jsonl --out out/new --threads 10000",
    "index --model in/model --data in/corpus.jsonl --out out/new --attention-pattern '((\\w+)+)+!'",
    "index --model in/model --data in/corpus.jsonl --out out/new --mlp-pattern 'a{9999999999}'",
    "query in/index --queries in/queries.jsonl --out in/corpus.jsonl",
    "query in/index --queries in/queries.jsonl --out in/index/manifest.json",
    "query in/index --queries in/queries.jsonl --out /dev/stdout",
    "pretrain --data in/corpus.jsonl --out out/run --layers 939169 --width 8 --heads 2",
    "pretrain --data in/corpus.jsonl --out out/run --layers 1 --width 8 --heads 2 --initial-spread 450",
    "convert in/index --codec float16 --out in/loop",
    "query in/index --prompt Paris --completion France --device meta",
    "demo --out in/model",
]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    def alarm(_signal: int, _frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, alarm)
    with world() as made:
        yield made
    signal.signal(signal.SIGALRM, before)


def check(words: list[str], folder: Path) -> None:
    inputs = state_of(folder / "in")
    signal.alarm(SECONDS_A_CASE)
    try:
        defect = defect_of(words, inputs, folder)
    finally:
        signal.alarm(0)
    assert defect is None, (shlex.join(words), defect)


@pytest.mark.parametrize("line", KEPT)
def test_what_once_escaped_is_refused(line: str, folder: Path):
    check(shlex.split(line), folder)


def test_command_lines_do_their_work_or_are_refused_in_one_line(folder: Path):
    @hypothesis.settings(max_examples=40, suppress_health_check=SUPPRESSED)
    @hypothesis.given(command_lines())
    def run(words: list[str]) -> None:
        check(words, folder)

    run()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["verify", "in/index"], None), (["verify"], None), (["boom"], "RuntimeError"),
        (["spoil"], "inputs changed: names.txt"),
    ],
)  # fmt: skip
def test_defects_are_found(words: list[str], expected: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch):
    names = folder / "in" / "names.txt"
    content = names.read_bytes()
    inputs = state_of(folder / "in")

    def run(_group: object, given: list[str]) -> int:
        if given == ["boom"]:
            raise RuntimeError("boom")
        names.write_text("changed")
        return 0

    if expected is not None:
        monkeypatch.setattr("fuzz.command_lines.framework.run", run)
    found = defect_of(words, inputs, folder)
    names.write_bytes(content)
    assert (found is None) if expected is None else expected in str(found)
