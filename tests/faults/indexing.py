"""Faults while a corpus is indexed: by one process, by an array of tasks, by a Ray cluster, to a store that fails."""

import contextlib
import dataclasses
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults import setting as settings
from faults.processes import UNDISTURBED, Conditions, Outcome, Run, attempt
from faults.setting import KINDS, Kind, Setting, files_of
from faults.tally import Case, Tally
from shard_bytes import without_places

MOST_RUNS = 8
"""How often the same call may have to be made again once nothing disturbs it any more."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """An undisturbed run.

    Attributes:
        files: What it left.
        steps: How many steps changed the disk.
        seconds: How long it took.
        answers: What the index answers.
    """

    files: dict[str, bytes]
    steps: int
    seconds: float
    answers: list[Any]


def undisturbed_indexes(setting: Setting) -> dict[Kind, Expected]:
    """Index without any fault, and see that every example is there once."""
    found: dict[Kind, Expected] = {}
    for kind in KINDS:
        out = setting.undisturbed(kind)
        outcome = Run(UNDISTURBED, settings.index, setting, kind, str(out)).outcome()
        assert outcome.state == "done", outcome.text
        second = Run(UNDISTURBED, settings.index, setting, kind, str(setting.folder / f"again-{kind}")).outcome()
        assert files_of(setting.folder / f"again-{kind}") == files_of(out), "indexing is not deterministic"
        _check_examples(setting, out)
        asked = Run(UNDISTURBED, settings.query, str(out), 0).outcome()
        assert asked.state == "done", asked.text
        found[kind] = Expected(files=files_of(out), steps=second.steps, seconds=second.seconds, answers=asked.value)
    return found


def _check_examples(setting: Setting, out: Path) -> None:
    """Every window of every record that has a token to score is in the index once, in the corpus's order."""
    import json

    from trackstar.store import Index

    there = [stored.example for stored in Index.open(out).examples()]
    places = [(example.record, example.window) for example in there]
    assert places == sorted(set(places)), "an example is there twice, or out of order"
    lines = Path(setting.corpus).read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert {example.record for example in there} == {number for number, text in enumerate(texts) if text}


class Indexing:
    """Makes indexes in spite of faults, and compares them.

    Args:
        setting: What is indexed.
        expected: The undisturbed indexes.
        tally: Counts.
    """

    def __init__(self, setting: Setting, expected: dict[Kind, Expected], tally: Tally) -> None:
        self._setting = setting
        self._expected = expected
        self._tally = tally
        self._cases = 0

    def run(self, way: str, faults: int, seed: int) -> None:
        """Let so many faults strike one way of indexing, some of them the same index."""
        act = {"one process": self._plain, "array of tasks": self._array, "failing remote store": self._remote}[way]
        generator = random.Random(f"{seed} {way}")
        before = self._tally.ways[way]
        while (left := faults - (self._tally.ways[way] - before)) > 0:
            with self.case(way, seed) as case:
                kind = generator.choice(KINDS)
                act(case, kind, min(left, generator.choice((1, 2, 2, 3, 4))))

    @contextlib.contextmanager
    def case(self, way: str, seed: int) -> Iterator[Case]:
        """A new case, whose own seed is told with what goes wrong in it."""
        self._cases += 1
        case = Case(self._tally, way, f"{seed} {way} {self._cases}", self._setting.folder / "cases" / f"i{self._cases}")
        try:
            yield case
        finally:
            case.close()

    def compare(self, case: Case, kind: Kind, out: Path) -> None:
        """See that an index and its answers are the undisturbed ones."""
        expected = self._expected[kind]
        case.compare(out, expected.files)
        asked = case.ran(Run(UNDISTURBED, settings.query, str(out), 0).outcome())
        if asked.state == "done" and asked.value != expected.answers:
            case.wrong("its answers are not those of the undisturbed index")

    # One process

    def _plain(self, case: Case, kind: Kind, faults: int) -> None:
        out = case.folder / "index"
        arguments = (settings.index, self._setting, kind, str(out))
        finished = disturbed_runs(case, self._expected[kind], faults, out, arguments)
        if finished and case.faults < faults:
            # What is lost of a finished index is seen when the same call is made again.
            case.damage(out, cut_only=True)
        until_done(case, lambda: Run(UNDISTURBED, *arguments).outcome())
        self.compare(case, kind, out)

    # An array of tasks

    def _array(self, case: Case, kind: Kind, faults: int) -> None:
        out = case.folder / "index"
        expected = self._expected[kind]
        count = case.random.choice((2, 3))
        to_do = set(range(1, count + 1))
        for _ in range(MOST_RUNS + 3 * faults):
            if to_do:
                to_do = self._tasks(case, kind, out, expected, to_do, count, disturbed=case.faults < faults)
                if to_do and case.random.random() < 0.3:
                    count = case.random.choice((1, 2, 3))
                    to_do = set(range(1, count + 1))
                continue
            if case.faults < faults and case.random.random() < 0.5:
                case.damage(out)
            condition = UNDISTURBED
            fault = None
            if case.faults < faults:
                fault = case.random.choice(("kill -9 at a step", "no space from a step on"))
                step = case.random.randint(1, 12)
                condition = Conditions(die_at=step) if fault.startswith("kill") else Conditions(full_from=step)
            outcome = case.ran(Run(condition, settings.finish, str(out)).outcome(), fault)
            if outcome.state == "done":
                break
            case.mended_by_hand(outcome)
            if outcome.state == "refused" and not outcome.hit:
                to_do = set(range(1, count + 1))
        else:
            case.wrong("is not finished however often it is run again")
            return
        self.compare(case, kind, out)

    def _tasks(
        self, case: Case, kind: Kind, out: Path, expected: Expected, to_do: set[int], count: int, *, disturbed: bool
    ) -> set[int]:
        """Run tasks at the same time, a fault striking one of them; gives those that are still to be run."""
        fault = case.random.choice(
            ("kill -9 at a moment", "kill -9 at a moment", "kill -9 at a step", "no space from a step on",
             "file size limit", "same task twice at once", "clock jumps", "damaged")
        ) if disturbed else ""  # fmt: skip
        if fault == "damaged":
            case.damage(out)
            fault = ""
        victim = case.random.choice(sorted(to_do))
        numbers = [*sorted(to_do), *([victim] if fault == "same task twice at once" else [])]
        conditions = _conditions(case, fault, expected, share=count)
        begun = [
            (number, Run(conditions if number == victim else UNDISTURBED, settings.index, self._setting, kind,
                         str(out), f"{number}/{count}"))
            for number in numbers
        ]  # fmt: skip
        if fault == "same task twice at once":
            case.fault(fault)
        left = set(to_do)
        moment = case.random.uniform(0, expected.seconds) if fault == "kill -9 at a moment" else None
        for number, run in sorted(begun, key=lambda item: item[0] != victim):
            struck = number == victim
            outcome = run.outcome(kill_after=moment if struck else None)
            outcome = case.ran(outcome, fault if struck and fault != "same task twice at once" else None)
            case.mended_by_hand(outcome)
            if outcome.state == "done":
                left.discard(number)
        return left

    # A remote store

    def _remote(self, case: Case, kind: Kind, faults: int) -> None:
        array = case.random.random() < 0.4
        run = Run(UNDISTURBED, remote_runs, self._setting, kind, case.seed, faults, array)
        outcome = run.outcome()
        if outcome.state != "done":
            case.wrong(f"{outcome.error} {outcome.text}")
            case.faults = faults
            self._tally.ways[case.way] += faults
            return
        outcomes, files = outcome.value
        for one, fault in outcomes:
            case.ran(one, fault)
        expected = self._expected[kind].files
        if files != expected:
            different = [
                name for name in sorted(files.keys() | expected.keys()) if files.get(name) != expected.get(name)
            ]
            case.wrong(f"differs from the undisturbed index in {different}")


def until_done(case: Case, run: Callable[[], Outcome]) -> Outcome | None:
    """Make the same call until it gives what it should."""
    for _ in range(MOST_RUNS):
        outcome = case.ran(run())
        if outcome.state == "done":
            return outcome
        case.mended_by_hand(outcome)
    case.wrong("is not finished however often it is run again")
    return None


_FAULTS = (
    "kill -9 at a moment",
    "kill -9 at a moment",
    "kill -9 at a step",
    "kill -9 at a step",
    "no space from a step on",
    "file size limit",
    "full disk",
    "damaged",
    "two writers at once",
    "clock jumps",
)


def disturbed_runs(
    case: Case, expected: Any, faults: int, out: Path, arguments: tuple[Any, ...], kinds: tuple[str, ...] = _FAULTS
) -> bool:
    """Run an operation that writes at `out` under one fault after the other; whether it came to its end."""
    misses = 0
    while case.faults < faults and misses < 6:
        before = case.faults
        if "damaged" in kinds and case.random.random() < 0.3 and case.damage(out):
            continue
        fault = case.random.choice(kinds)
        if fault == "damaged":
            case.damage(out)
            continue_after = False
        elif fault == "two writers at once":
            continue_after = _two_writers(case, out, arguments)
        elif fault == "full disk":
            continue_after = _full_disk(case, out, expected, arguments)
        else:
            if fault == "clock jumps":
                _set_times(case, out)
            moment = case.random.uniform(0, expected.seconds) if fault == "kill -9 at a moment" else None
            conditions = _conditions(case, fault, expected)
            outcome = case.ran(Run(conditions, *arguments).outcome(kill_after=moment), fault)
            case.mended_by_hand(outcome)
            continue_after = outcome.state == "done"
        if continue_after:
            return True
        misses += case.faults == before
    return False


def _conditions(case: Case, fault: str, expected: Any, *, share: int = 1) -> Conditions:
    step = case.random.randint(1, max(2, expected.steps // share))
    if fault == "kill -9 at a step":
        return Conditions(die_at=step)
    if fault == "no space from a step on":
        return Conditions(full_from=step)
    if fault == "file size limit":
        return Conditions(file_bytes=case.random.randint(300, max(map(len, expected.files.values()))))
    if fault == "clock jumps":
        return Conditions(
            clock=case.random.randrange(10**9), die_at=step if share == 1 and case.random.random() < 0.6 else None
        )
    return UNDISTURBED


def _set_times(case: Case, out: Path) -> None:
    """Give files times of the past and the future."""
    for path in sorted(out.rglob("*")) if out.exists() else ():
        moment = time.time() + case.random.uniform(-2, 2) * 86400 * 365
        os.utime(path, (moment, moment))


def _two_writers(case: Case, out: Path, arguments: tuple[Any, ...]) -> bool:
    """Start a second process while a first one, made slow, writes: one of them is refused at once."""
    first = Run(Conditions(pause=0.03), *arguments)
    deadline = time.monotonic() + 20
    while first.running and not (out / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(case.random.uniform(0, 0.4))
    together = first.running
    second = Run(UNDISTURBED, *arguments)
    outcome = second.outcome()
    still = first.running
    ends = [outcome, first.outcome()]
    if together:
        case.fault("two writers at once")
    for one in ends:
        case.ran(one)
    if together and still and outcome.state == "done" and ends[1].state == "done":
        case.wrong("two writers at once, and none was refused")
    for one in ends:
        if one.state == "refused" and one.error != "IndexLockedError":
            case.wrong(f"two writers at once, and one says {one.text}")
    return any(one.state == "done" for one in ends)


def _full_disk(case: Case, out: Path, expected: Any, arguments: tuple[Any, ...]) -> bool:
    """Run on a file system that is too small, then make room; without the right to mount, a limit of the kernel."""
    total = sum(map(len, expected.files.values()))
    size = case.random.randint(16 << 10, max(17 << 10, total))
    parent = out.parent
    if os.path.ismount(parent):
        size += sum(path.stat().st_size for path in parent.rglob("*") if path.is_file())
        mounted = _mount("remount,", size, parent)
    else:
        if any(parent.iterdir()):
            return False  # an index has been begun there
        mounted = _mount("", size, parent)
    if not mounted:
        return False
    outcome = case.ran(Run(UNDISTURBED, *arguments).outcome(), None)
    room = _mount("remount,", 256 << 20, parent)
    assert room, "the file system was made a moment ago"
    if outcome.state == "refused" and "No space left" in outcome.text:
        case.fault("full disk")
    return outcome.state == "done"


def _mount(option: str, size: int, place: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"{option}size={size}", "tmpfs", str(place)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


_REMOTE_FAULTS = (
    "connection lost at operations",
    "connection lost for good",
    "killed at an operation",
    "slow and short answers",
)


def remote_runs(
    setting: Setting, kind: Kind, seed: str, faults: int, array: bool
) -> tuple[list[tuple[Outcome, str | None]], dict[str, bytes]]:
    """Index to a store that fails again and again, until it is done; what each run came to, and what is there then."""
    from faulty_filesystem import FaultyFileSystem, Killed, stored_bytes
    from trackstar.store.files import remote as remote_files

    url = "faulty://bucket/index"
    generator = random.Random(seed)
    remote_files.WAITS = (0.0, 0.0)
    if generator.random() < 0.5:
        remote_files.WHOLE_AT_ONCE = remote_files.WHOLE_AT_ONCE | {"faulty"}  # pyright: ignore[reportConstantRedefinition]
    object_store = "faulty" in remote_files.WHOLE_AT_ONCE
    outcomes: list[tuple[Outcome, str | None]] = []
    calls: list[tuple[Any, ...]] = [(settings.index, setting, kind, url)]
    if array:
        calls = [*((settings.index, setting, kind, url, f"{number}/2") for number in (1, 2)), (settings.finish, url)]
    struck, place, tries = 0, 0, 0
    while place < len(calls) and tries < 40:
        tries += 1
        fault, options = None, dict[str, Any]()
        if struck < faults:
            fault = generator.choice(_REMOTE_FAULTS)
            moment = generator.randint(1, 400)
            if fault == "connection lost at operations":
                share = generator.choice((0.02, 0.1, 0.4))
                options["failing"] = frozenset(n for n in range(1, 20_000) if generator.random() < share)
            elif fault == "connection lost for good":
                options["failing"] = frozenset(range(moment, 20_000))
            elif fault == "killed at an operation":
                options["fatal"] = moment
            else:
                options |= {"short": True, "delay": 0.001}
        now = FaultyFileSystem.reset(whole_at_once=object_store, **options)
        try:
            outcome = attempt(*calls[place])
        finally:
            FaultyFileSystem.faults = type(now)()
        if outcome.state == "failed" and Killed.__name__ in outcome.text.splitlines()[-1]:
            outcome = Outcome(state="killed")
        hit = now.operations >= min(now.failing | {now.fatal}) or now.short
        outcome = dataclasses.replace(outcome, hit=hit)
        outcomes.append((outcome, fault))
        struck += fault is not None and hit
        if outcome.state == "done":
            place += 1
        elif outcome.state == "refused" and array and not hit and calls[place][0] is settings.finish:
            place = 0
        if struck < faults and generator.random() < 0.2 and outcome.state != "done":
            names = [name for name in stored_bytes(url) if name.endswith(".safetensors")]
            if names:
                path = FaultyFileSystem._strip_protocol(url) + "/" + generator.choice(names)
                file = FaultyFileSystem.store[path]
                content = bytearray(file.getvalue())
                if content:
                    content = content[: generator.randrange(len(content))]
                    file.seek(0)
                    file.truncate()
                    file.write(bytes(content))
                    outcomes.append((Outcome(state="killed", hit=True), "damaged file (cut off)"))
                    struck += 1
    if place < len(calls):
        outcomes.append((Outcome(state="failed", text="is not finished however often it is run again"), None))
    files = stored_bytes(url)
    return outcomes, {
        name: without_places(content) if name == "manifest.json" else content for name, content in files.items()
    }
