"""`benchmarks/gpu.py` on a pretended GPU and on the CPU: every section gives its figures, and a failure its status."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretended_devices import MEMORY, pretended_devices

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RATES = {
    "indexing": ("indexing_tokens_per_s", "training_tokens_per_s", "activations_tokens_per_s"),
    "reranking": ("candidates_per_s",),
    "tail_patch": ("fast_pairs_per_s", "exact_pairs_per_s"),
}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; its folder is on the path only meanwhile."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu")
    for name in set(sys.modules) - before:
        if (BENCHMARKS / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def run(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the script on a device with a tiny model; gives its exit status and what it wrote."""

    def call(device: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        given = ["gpu.py", "--tiny", "--rounds", "1", "--device", device, "--folder", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", given)
        status = benchmark.main()
        return status, json.loads((tmp_path / f"gpu-tiny-{device}.json").read_text(encoding="utf-8"))

    return call


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_sections_give_their_figures(device: str, run: Callable[..., tuple[int, dict[str, Any]]]):
    if device == "cuda":
        with pretended_devices():
            status, found = run(device)
    else:
        status, found = run(device)
    assert status == 0, found["sections"]
    assert {"commit", "hardware", "versions", "device", "cuda", "scale", "sections"} <= found.keys()
    sections = found["sections"]
    assert set(sections) == {"agreement", "scan", *RATES}
    assert sections["agreement"]["float32"]["exceeded"] == []
    assert sections["agreement"]["float32"]["differences"]["first ten shared"] == 1
    peak = MEMORY / 2 / 2**30 if device == "cuda" else None
    for section, rates in RATES.items():
        (case,) = (of for name, of in sections[section].items() if name != "seconds")
        assert all(case[rate] > 0 for rate in rates)
        assert case["peak_gpu_gib"] == peak
    for codec in ("1-bit", "4-bit", "int8", "float16"):
        assert all(sections["scan"][f"{codec}, {count} queries"]["gb_per_s"] >= 0 for count in (1, 16))
        assert sections["scan"][codec]["peak_gpu_gib"] == peak


def test_figures_beyond_a_tolerance_end_with_a_status(
    benchmark: Any, run: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
):
    draw = torch.Generator().manual_seed(0)
    right = {name: torch.rand(12, 12, generator=draw) for name in ("V", "φ", "R", "losses", "influences")}
    wrong = {**right, "φ": right["φ"] * 1.01}
    values = iter((right, wrong, right, right))
    monkeypatch.setattr(benchmark, "small_index", lambda *_: next(values))
    status, found = run("cpu", "--sections", "agreement")
    assert status == 1
    assert found["sections"]["agreement"]["float32"]["exceeded"] == ["φ"]
    assert found["sections"]["agreement"]["bfloat16"]["differences"]["φ"] == 0


def test_a_section_that_fails_leaves_the_others_their_figures(
    benchmark: Any, run: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
):
    def fails(_setting: Any, _add: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setitem(benchmark.RUN, "scan", fails)
    monkeypatch.setitem(benchmark.RUN, "reranking", lambda _setting, add: add("1-bit", {"candidates_per_s": 7}))
    status, found = run("cpu", "--sections", "scan", "reranking")
    assert status == 1
    assert found["sections"]["scan"]["error"] == {"type": "RuntimeError", "message": "CUDA out of memory"}
    assert found["sections"]["reranking"]["1-bit"] == {"candidates_per_s": 7}
