"""Random faults and a load, as `run.py` counts them: a few in the quick suite, 200 and 100 in the whole one.

Each seed is new, and told where something is wrong: `python tests/faults/run.py --seed N` lets the same faults strike.
"""

import time
from pathlib import Path
from typing import Any

import pytest

from faults.changes import changes
from faults.run import harness, wrong


def _struck(folder: Path, **wanted: Any) -> dict[str, Any]:
    seed = time.time_ns() % 10**9
    figures = harness(folder, seed=seed, **wanted)
    assert not wrong(figures), f"seed {seed}: " + "\n".join(wrong(figures))
    assert figures["indexing"]["faults"] >= wanted["indexing"]
    assert figures["others"]["faults"] >= wanted["others"]
    assert figures["explorer"]["requests"] > 10 * wanted["soak_seconds"]
    return figures


def test_a_few_random_faults_lose_and_double_nothing(tmp_path: Path) -> None:
    """Without a cluster: `tests/cluster` kills workers of one."""
    _struck(tmp_path / "faults", indexing=12, others=7, soak_seconds=1, ray_share=0)


def _changed(folder: Path, count: int) -> None:
    seed = time.time_ns() % 10**9
    figures = changes(folder, count, seed)
    assert figures["silent_changes"] == [], f"seed {seed}"
    assert figures["detected"] > count // 4


def test_a_few_random_changes_between_making_and_using_an_index_are_not_silent(tmp_path: Path) -> None:
    """`python tests/faults/changes.py --seed N` draws the same changes."""
    _changed(tmp_path / "changes", 12)


@pytest.mark.slow
def test_two_hundred_random_changes_are_not_silent(tmp_path: Path) -> None:
    _changed(tmp_path / "changes", 200)


@pytest.mark.slow
def test_two_hundred_faults_while_indexing_and_a_hundred_others_lose_and_double_nothing(tmp_path: Path) -> None:
    figures = _struck(tmp_path / "faults", indexing=200, others=100, soak_seconds=60)
    assert any("Ray" in way for way in figures["indexing"]["faults_by_way"])
    assert any("Ray" in way for way in figures["others"]["faults_by_way"])
