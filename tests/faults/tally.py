"""What is counted: faults of each kind, runs, refusals, and whatever should not have been."""

import dataclasses
import os
import random
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

from faults.processes import Outcome
from faults.setting import files_of


@dataclasses.dataclass(slots=True, kw_only=True)
class Tally:
    """Counts of one part of the harness.

    Attributes:
        kinds: Faults by kind.
        ways: Faults by what was done when they struck.
        cases: How many indexes or answers were made under faults.
        runs: How many runs that took.
        refusals: Refusals by the error's class.
        by_hand: How often a file had to be taken away first, as the refusal said.
        wrong: What should not have been, in words.
    """

    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    ways: Counter[str] = dataclasses.field(default_factory=Counter)
    cases: int = 0
    runs: int = 0
    refusals: Counter[str] = dataclasses.field(default_factory=Counter)
    by_hand: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)

    @property
    def faults(self) -> int:
        """All of them."""
        return self.kinds.total()

    def figures(self) -> dict[str, Any]:
        """The counts as they are kept."""
        return {
            "faults": self.faults,
            "faults_by_kind": dict(sorted(self.kinds.items())),
            "faults_by_way": dict(sorted(self.ways.items())),
            "cases": self.cases,
            "runs": self.runs,
            "refusals": dict(sorted(self.refusals.items())),
            "files_taken_away_as_a_refusal_said": self.by_hand,
            "wrong": self.wrong,
        }


class Case:
    """One index or answer, made in spite of faults.

    Args:
        tally: Where everything is counted.
        way: What is done.
        seed: Of all that is random in it.
        folder: An empty place of its own.
    """

    def __init__(self, tally: Tally, way: str, seed: str, folder: Path) -> None:
        self.tally = tally
        self.way = way
        self.seed = seed
        self.random = random.Random(seed)
        self.folder = folder
        self.faults = 0
        self._story: list[str] = []
        self._damaged: set[Path] = set()
        folder.mkdir(parents=True)
        tally.cases += 1

    def fault(self, kind: str) -> None:
        """Count a fault that has taken place."""
        self.faults += 1
        self.tally.kinds[kind] += 1
        self.tally.ways[self.way] += 1
        self._story.append(kind)

    def ran(self, outcome: Outcome, fault: str | None = None) -> Outcome:
        """Count a run, and the fault that struck it, if one did."""
        self.tally.runs += 1
        if fault is not None and outcome.hit:
            self.fault(fault)
        self._story.append(f"{outcome.state} {outcome.error}".strip())
        if outcome.state == "refused":
            self.tally.refusals[outcome.error] += 1
            if "\n" in outcome.text or not outcome.text:
                self.wrong(f"a refusal that is not one line: {outcome.text!r}")
        if outcome.state == "failed":
            self.wrong(outcome.text)
        return outcome

    def mended_by_hand(self, outcome: Outcome) -> None:
        """Take away a damaged file that a refusal names, where that is what it asks for."""
        if outcome.error != "IndexMismatchError":
            return
        for path in self._damaged:
            if str(path) in outcome.text and path.exists():
                path.unlink()
                self.tally.by_hand += 1

    def wrong(self, what: str) -> None:
        """Note what should not have been."""
        self.tally.wrong.append(f"{self.way}, seed {self.seed!r}, after {', '.join(self._story) or 'nothing'}: {what}")

    def damage(self, out: Path, *, cut_only: bool = False) -> bool:
        """Change a random file: a bit flips, its end is lost, all of it, or it goes; False where there is none."""
        files = sorted(path for path in out.rglob("*") if path.suffix == ".safetensors")
        if not files:
            return False
        # Each folder is as likely as another: there are many shards, and one of each of the other files.
        folder = self.random.choice(sorted({path.parent for path in files}))
        path = self.random.choice([path for path in files if path.parent == folder])
        content = bytearray(path.read_bytes())
        ways = ("cut", "empty", "gone") if cut_only else ("bit", "bit", "bit", "cut", "empty", "gone")
        how = self.random.choice(ways)
        if how == "bit" and content:
            content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        elif how == "cut":
            del content[self.random.randrange(max(1, len(content))) :]
        elif how == "empty":
            content.clear()
        path.unlink()  # the file may be mapped by a process that still reads it
        if how != "gone":
            path.write_bytes(content)
        self._damaged.add(path)
        self.fault(f"damaged file ({'bit' if how == 'bit' else 'cut off' if how != 'gone' else 'missing'})")
        self._story.append(f"[{path.relative_to(out)}]")
        return True

    def compare(self, out: Path, expected: dict[str, bytes]) -> None:
        """See that an index is the undisturbed one, byte for byte, and remove it."""
        found = files_of(out)
        if found != expected:
            names = sorted(found.keys() | expected.keys())
            different = [name for name in names if found.get(name) != expected.get(name)]
            self.wrong(f"differs from the undisturbed index in {different}")

    def close(self) -> None:
        """Remove what it has made."""
        if os.path.ismount(self.folder):
            subprocess.run(["umount", str(self.folder)], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
