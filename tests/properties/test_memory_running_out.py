"""Memory that runs out in the middle of a batch makes batches smaller and changes no result."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from comparisons import SIDE, assert_rows_close, language_model, package_phi, random_examples
from trackstar.errors import OptionError
from trackstar.gradients.estimated_moment import FactoredSquares, estimate_second_moment
from trackstar.gradients.projection import ProjectedGradients
from trackstar.gradients.projector import GradientProjector
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, FactoredMoment
from trackstar.model.batching import plan_batches, run_adaptively
from trackstar.model.layer_blocks import WeightMatrix

LENGTHS = [9, 17, 5, 12, 12, 8, 20, 6, 11, 7]


def out_of_memory() -> Exception:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    fits=st.integers(1, 6),
    error=st.sampled_from([out_of_memory, lambda: torch.OutOfMemoryError("CUDA out of memory"), MemoryError]),
)
def test_every_example_runs_once_for_any_batch_size_that_fits(
    lengths: list[int], fits: int, error: Callable[[], Exception]
):
    def run(indices: list[int]) -> list[int]:
        if len(indices) > fits:
            raise error()
        return indices

    notes: list[str] = []
    ran = [result for _, result in run_adaptively(plan_batches(lengths, 100), run, notes.append)]
    assert sorted(index for indices in ran for index in indices) == list(range(len(lengths)))
    assert all("memory ran out at" in note for note in notes)
    assert len(notes) <= 6  # halved, not reduced by one


def test_one_example_that_does_not_fit_is_refused_in_one_line():
    def run(_: list[int]) -> None:
        raise out_of_memory()

    with pytest.raises(OptionError, match=r"one example alone does not fit in memory; .*`window_tokens`"):
        list(run_adaptively([[0, 1]], run, lambda _: None))


def test_other_errors_are_not_mistaken_for_memory_running_out():
    def run(_: list[int]) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(run_adaptively([[0, 1]], run, lambda _: None))


def failing_above(monkeypatch: pytest.MonkeyPatch, consumer: type, examples: int) -> None:
    """Let the consumer's `add` run out of memory at the last matrix of a batch of more than `examples`."""
    original: Any = consumer.add  # pyright: ignore[reportAttributeAccessIssue]

    def add(self: Any, matrix: WeightMatrix, saved: Tensor, gradients: Tensor) -> None:
        original(self, matrix, saved, gradients)
        if len(gradients) > examples and matrix.name.endswith("layers.0.self_attn.q_proj"):
            raise out_of_memory()

    monkeypatch.setattr(consumer, "add", add)


def test_projected_gradients_are_the_same_when_memory_runs_out_in_the_middle(monkeypatch: pytest.MonkeyPatch):
    model, examples = language_model("llama"), random_examples(LENGTHS)
    expected = package_phi(model, examples)
    failing_above(monkeypatch, ProjectedGradients, 2)
    notes: list[str] = []
    found = torch.full_like(expected, torch.nan)
    with GradientProjector(
        model, NO_SECOND_MOMENT, seed=0, side=SIDE, batch_tokens=128, note=notes.append
    ) as projector:
        for indices, phi, _ in projector.batches(examples):
            found[indices] = phi
    assert_rows_close(found, expected, tolerance=1e-5)
    assert "memory ran out" in notes[0]


def test_estimated_second_moment_counts_no_batch_twice_when_memory_runs_out(monkeypatch: pytest.MonkeyPatch):
    model, examples = language_model("llama"), random_examples(LENGTHS)
    expected = estimate_second_moment(model, examples, batch_tokens=128)
    failing_above(monkeypatch, FactoredSquares, 2)
    found = estimate_second_moment(model, examples, batch_tokens=128)
    for name, moment in expected.moments.items():
        other = found.moments[name]
        assert isinstance(moment, FactoredMoment)
        assert isinstance(other, FactoredMoment)
        torch.testing.assert_close(other.row, moment.row, rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(other.column, moment.column, rtol=1e-4, atol=1e-12)
