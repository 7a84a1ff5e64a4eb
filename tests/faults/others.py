"""Faults while indexes are asked, coded anew, joined, thinned and grown, and while a corpus itself is asked."""

import contextlib
import dataclasses
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import setting as settings
from faults.indexing import Expected, disturbed_runs, until_done
from faults.processes import UNDISTURBED, Conditions, Run
from faults.setting import Kind, Setting, files_of
from faults.tally import Case, Tally

_WRITING = ("convert to 1-bit", "convert to int8", "merge", "remove", "add, projected", "add, whitened")
_ASKING = ("query", "query, exact", "stream")
WAYS = (*_WRITING, *_ASKING)


class Others:
    """Does everything but indexing in spite of faults, and compares.

    Args:
        setting: What it is done with.
        tally: Counts.
    """

    def __init__(self, setting: Setting, tally: Tally) -> None:
        self._setting = setting
        self._tally = tally
        self._cases = 0
        self._expected: dict[str, Expected] = {}

    def prepare(self) -> None:
        """Do everything once undisturbed, after the two indexes have been made."""
        setting = self._setting
        for name, corpus in (("one", setting.corpus), ("two", setting.further)):
            _done(Run(UNDISTURBED, settings.index_apart, setting, corpus, str(setting.undisturbed(name))))
        for way in WAYS:
            folder = setting.folder / "others" / way
            folder.mkdir(parents=True)
            outcome = _done(Run(UNDISTURBED, *self._call(way, folder)))
            files = files_of(folder / "new") if way in _WRITING else {}
            self._expected[way] = Expected(
                files=files, steps=outcome.steps, seconds=outcome.seconds, answers=outcome.value or []
            )

    def run(self, faults: int, seed: int) -> None:
        """Let so many faults strike, each way about as often as another."""
        generator = random.Random(f"{seed} others")
        while (left := faults - self._tally.faults) > 0:
            way = WAYS[self._cases % len(WAYS)]
            wanted = min(left, generator.choice((1, 2, 2, 3)))
            with self._case(way, seed) as case:
                (self._writing if way in _WRITING else self._asking)(case, wanted)

    @contextlib.contextmanager
    def _case(self, way: str, seed: int) -> Iterator[Case]:
        self._cases += 1
        case = Case(self._tally, way, f"{seed} {way} {self._cases}", self._setting.folder / "cases" / f"o{self._cases}")
        try:
            yield case
        finally:
            case.close()

    def _call(self, way: str, folder: Path) -> tuple[Any, ...]:
        """A way's function and arguments; indexes that are asked lie in the folder, and what is new comes there."""
        setting, new = self._setting, str(folder / "new")
        if way.startswith("query"):
            kind: Kind = "float16" if way.endswith("exact") else "1-bit"
            if not (folder / "index").exists():
                shutil.copytree(setting.undisturbed(kind), folder / "index", ignore=shutil.ignore_patterns("derived"))
            return (settings.query, str(folder / "index"), 40, way.endswith("exact"))
        return {
            "convert to 1-bit": (settings.convert, setting, "1-bit", new),
            "convert to int8": (settings.convert, setting, "int8", new),
            "merge": (settings.merge, setting, new),
            "remove": (settings.remove, setting, "float16", new),
            "add, projected": (settings.add, setting, "float16", new),
            "add, whitened": (settings.add, setting, "1-bit", new),
            "stream": (settings.stream, setting, str(folder / "kept.json")),
        }[way]

    # What writes an index

    def _writing(self, case: Case, faults: int) -> None:
        out, expected = case.folder / "new", self._expected[case.way]
        call = self._call(case.way, case.folder)
        if case.random.random() < 0.25:
            self._while_read(case, out, call)
        finished = disturbed_runs(case, expected, faults, out, call)
        if finished and case.faults < faults:
            case.damage(out, cut_only=True)
        until_done(case, lambda: Run(UNDISTURBED, *call).outcome())
        case.compare(out, expected.files)

    def _while_read(self, case: Case, out: Path, call: tuple[Any, ...]) -> None:
        """Another process asks the new index while it is written: it is refused, or is given the right answers."""
        writer = Run(Conditions(pause=0.02), *call)
        answers: list[Any] = []
        readers = 0
        while writer.running and readers < 4:
            if (out / "manifest.json").exists():
                readers += 1
                still = writer.running
                read = case.ran(Run(UNDISTURBED, settings.query, str(out), 0).outcome())
                if read.state == "done":
                    answers.append(read.value)
                if readers == 1 and still:
                    case.fault("read while it is written")
            time.sleep(0.005)
        case.ran(writer.outcome(kill_after=case.random.uniform(0, 0.5)))
        if answers:
            until_done(case, lambda: Run(UNDISTURBED, *call).outcome())
            after = Run(UNDISTURBED, settings.query, str(out), 0).outcome()
            if any(value != after.value for value in answers):
                case.wrong("who read it while it was written got other answers")

    # What asks

    def _asking(self, case: Case, faults: int) -> None:
        expected, call = self._expected[case.way], self._call(case.way, case.folder)
        misses = 0
        while case.faults < faults and misses < 8:
            before = case.faults
            fault = case.random.choice(
                ("kill -9 at a moment", "kill -9 at a step", "no space from a step on", "file size limit", "damaged",
                 "damaged", "clock jumps", "asked twice at once")
            )  # fmt: skip
            if fault == "damaged":
                self._damage_kept(case)
            else:
                self._disturbed_question(case, fault, expected, call)
            misses += case.faults == before
        outcome = until_done(case, lambda: Run(UNDISTURBED, *call).outcome())
        self._compare(case, outcome.value if outcome is not None else None)

    def _disturbed_question(self, case: Case, fault: str, expected: Expected, call: tuple[Any, ...]) -> None:
        step = case.random.randint(1, max(2, expected.steps))
        conditions = {
            "kill -9 at a step": Conditions(die_at=step),
            "no space from a step on": Conditions(full_from=step),
            "file size limit": Conditions(file_bytes=case.random.choice((100, 1000, 5000))),
            "clock jumps": Conditions(clock=case.random.randrange(10**9)),
        }.get(fault, UNDISTURBED)
        moment = case.random.uniform(0, expected.seconds) if fault == "kill -9 at a moment" else None
        runs = [Run(conditions, *call)]
        if fault == "asked twice at once" and case.way != "stream":
            runs.append(Run(UNDISTURBED, *call))
            case.fault(fault)
        for run in runs:
            outcome = case.ran(run.outcome(kill_after=moment), fault if len(runs) == 1 else None)
            if outcome.state == "done":
                self._compare(case, outcome.value)

    def _damage_kept(self, case: Case) -> None:
        """Spoil what an earlier run has kept beside the index or the results."""
        derived, kept = case.folder / "index" / "derived", case.folder / "kept.json"
        if derived.exists():
            case.damage(derived)
        elif kept.exists():
            content = bytearray(kept.read_bytes())
            del content[case.random.randrange(len(content)) :]
            kept.write_bytes(content)
            case.fault("damaged file (cut off)")

    def _compare(self, case: Case, answers: Any) -> None:
        if answers is not None and answers != self._expected[case.way].answers:
            case.wrong("its answers are not those of the undisturbed run")


def _done(run: Run) -> Any:
    outcome = run.outcome()
    assert outcome.state == "done", outcome.text
    return dataclasses.replace(outcome)
