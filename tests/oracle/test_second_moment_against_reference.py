"""Estimated second moments of the package, held against the oracle's mean of squared gradients."""

import pytest
import torch

import reference
from comparisons import assert_rows_close, language_model, random_examples, reference_gradients
from tiny_models import CORE_ARCHITECTURES
from trackstar.choices import SecondMomentKind
from trackstar.gradients.estimated_moment import estimate_second_moment
from trackstar.gradients.second_moment import ElementwiseMoment, FactoredMoment, SecondMoment, checked_second_moment

# G is not materialized if tokens·(rows + columns) < rows·columns: below about 15 tokens for these shapes.
SHORT, LONG = [6, 3, 9, 2], [30, 21]
# More examples than one part has.
MANY = [5, 3, 8, 2] * 9


@pytest.mark.parametrize("lengths", [SHORT, LONG, MANY], ids=["from factors", "from gradients", "in parts"])
@pytest.mark.parametrize("kind", ["factored", "elementwise"])
@pytest.mark.parametrize("architecture", CORE_ARCHITECTURES)
def test_estimated_second_moment_is_the_mean_of_squared_gradients(
    architecture: str, kind: SecondMomentKind, lengths: list[int]
):
    model, examples = language_model(architecture), random_examples(lengths)
    gradients = reference_gradients(model, examples)
    found = estimate_second_moment(model, examples, kind=kind, batch_tokens=64)
    assert found.kind == kind
    for matrix in model.matrices:
        V = reference.mean_squared_gradient([of[matrix.name] for of in gradients])
        moment = found.moments[matrix.name]
        if kind == "factored":
            assert isinstance(moment, FactoredMoment)
            assert_rows_close(moment.row[None], V.mean(dim=1)[None], label=f"{matrix.name} rows")
            assert_rows_close(moment.column[None], V.mean(dim=0)[None], label=f"{matrix.name} columns")
            V = reference.factored_second_moment(V)
        assert_rows_close(moment.values()[None], V[None], label=matrix.name)


@pytest.mark.parametrize("kind", ["factored", "elementwise"])
def test_estimate_does_not_depend_on_how_examples_are_batched_or_ordered(kind: SecondMomentKind):
    model, examples = language_model("llama"), random_examples([*SHORT, *LONG])
    one = estimate_second_moment(model, examples, kind=kind, batch_tokens=1)
    other = estimate_second_moment(model, examples[::-1], kind=kind, batch_tokens=10_000)
    for name, moment in one.moments.items():
        assert_rows_close(other.moments[name].values()[None], moment.values()[None], tolerance=1e-5, label=name)


def test_factoring_an_elementwise_moment_is_the_references_rank_one_form():
    V = torch.tensor([[1.0, 2.0, 0.5], [4.0, 0.25, 8.0]])
    torch.testing.assert_close(
        ElementwiseMoment(entries=V).factored().values().double(), reference.factored_second_moment(V)
    )


@pytest.mark.parametrize("kind", ["factored", "elementwise"])
def test_stored_tensors_restore_the_same_second_moment(kind: SecondMomentKind):
    model = language_model("gpt2")
    moment = estimate_second_moment(model, random_examples(SHORT), kind=kind, floor=0.01)
    restored = SecondMoment.from_tensors(moment.tensors(), source=moment.source, floor=moment.floor)
    assert (restored.kind, restored.source, restored.floor) == (kind, moment.source, 0.01)
    assert list(checked_second_moment(restored, model.matrices).moments) == [matrix.name for matrix in model.matrices]
    for name, values in moment.moments.items():
        assert torch.equal(restored.moments[name].values(), values.values())
