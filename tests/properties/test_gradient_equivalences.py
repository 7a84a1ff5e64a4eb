"""Projected gradients do not depend on batches, padding, order or neighbours, and add up over targets."""

import dataclasses

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from comparisons import assert_rows_close, language_model, package_phi, random_examples, with_targets
from tiny_models import ARCHITECTURES, CORE_ARCHITECTURES, tiny_model, tiny_tokenizer
from trackstar.errors import ModelError, OptionError
from trackstar.gradients.estimated_moment import estimate_second_moment
from trackstar.gradients.per_example import BatchedPass, gradient_pass
from trackstar.gradients.projection import ProjectedGradients
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, FactoredMoment, Moment, SecondMoment
from trackstar.model.batching import Batch, make_batch, plan_batches
from trackstar.model.language_model import LanguageModel, wrap_model

LENGTHS = [14, 3, 25, 9, 9, 2, 17]
# Tolerance of results that differ only in the order of float32 sums.
TOLERANCE = 2e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_projected_gradient_does_not_depend_on_batch_size(architecture: str):
    model, examples = language_model(architecture), random_examples(LENGTHS)
    alone = package_phi(model, examples, batch_tokens=1)
    assert_rows_close(package_phi(model, examples, batch_tokens=10_000), alone, tolerance=TOLERANCE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_projected_gradient_does_not_depend_on_the_amount_of_padding(architecture: str):
    model, examples = language_model(architecture), random_examples(LENGTHS)
    padded = package_phi(model, examples, pad_to=40)
    assert_rows_close(padded, package_phi(model, examples, batch_tokens=1), tolerance=TOLERANCE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_projected_gradient_does_not_depend_on_the_tokens_of_padding(architecture: str):
    model, examples = language_model(architecture), random_examples([6, 11])
    batch = make_batch(examples, [0, 1], pad_to=20)
    noise = torch.randint(0, 300, batch.token_ids.shape, generator=torch.Generator().manual_seed(0))
    is_padding = torch.arange(20) >= torch.tensor([[6], [11]])
    other = Batch(
        token_ids=torch.where(is_padding, noise, batch.token_ids), target_mask=batch.target_mask, indices=batch.indices
    )
    consumer = ProjectedGradients(model, NO_SECOND_MOMENT, side=4)
    with gradient_pass(model, consumer) as run:
        losses = run(batch)
        phi = consumer.result().clone()
        torch.testing.assert_close(run(other), losses, rtol=1e-6, atol=0)
        assert_rows_close(consumer.result(), phi, tolerance=TOLERANCE)


@hypothesis.settings(max_examples=8)
@hypothesis.given(order=st.permutations(range(len(LENGTHS))), batch_tokens=st.sampled_from([1, 20, 60, 1000]))
def test_projected_gradient_does_not_depend_on_order_or_neighbours(order: list[int], batch_tokens: int):
    model, examples = language_model("llama"), random_examples(LENGTHS)
    found = package_phi(model, [examples[place] for place in order], batch_tokens=batch_tokens)
    expected = package_phi(model, examples, batch_tokens=1)
    assert_rows_close(found, expected[list(order)], tolerance=TOLERANCE)


@pytest.mark.parametrize("architecture", CORE_ARCHITECTURES)
def test_tokens_after_the_last_target_do_not_matter(architecture: str):
    model = language_model(architecture)
    (example,) = random_examples([16])
    early = with_targets(example, [1 <= t < 9 for t in range(16)])
    cut = dataclasses.replace(early, token_ids=early.token_ids[:9], target_mask=early.target_mask[:9])
    phi = package_phi(model, [early, cut], batch_tokens=1)
    assert_rows_close(phi[:1], phi[1:], tolerance=TOLERANCE)


@pytest.mark.parametrize("kind", ["none", "factored", "elementwise"])
def test_projected_gradients_of_parts_of_the_targets_add_up(kind: str):
    model = language_model("qwen3")
    (example,) = random_examples([18])
    moment = NO_SECOND_MOMENT
    if kind != "none":
        moment = estimate_second_moment(model, random_examples(LENGTHS, seed=1), kind=kind)  # pyright: ignore[reportArgumentType]
    odd = with_targets(example, [t % 2 == 1 for t in range(18)])
    even = with_targets(example, [t > 0 and t % 2 == 0 for t in range(18)])
    whole, one, two = package_phi(model, [example, odd, even], moment)
    assert_rows_close((one + two)[None], whole[None], tolerance=TOLERANCE)


def test_gradients_do_not_depend_on_the_global_random_state_or_earlier_passes():
    model, examples = language_model("gpt2"), random_examples(LENGTHS)  # GPT-2's configuration has dropout
    torch.manual_seed(0)
    first = package_phi(model, examples)
    torch.manual_seed(1)
    assert torch.equal(package_phi(model, examples), first)


def test_pass_leaves_the_model_as_it_was():
    model, examples = language_model("llama"), random_examples([5])
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.module.parameters()]
    package_phi(model, examples)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
    assert [parameter.requires_grad for parameter in model.module.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert not any(module._forward_hooks for module in model.module.modules())


def package_phi_of_unknown_token(model: LanguageModel) -> None:
    consumer, example = ProjectedGradients(model, NO_SECOND_MOMENT, side=4), random_examples([5], vocabulary=10**6)[0]
    with BatchedPass(model, consumer, batch_tokens=64, note=print) as run:
        assert not any(child.training for child in model.module.modules())
        list(run.batches([example], consumer.result))


def test_callers_model_keeps_its_training_mode_and_trainable_parameters_also_when_something_raises():
    module, examples = tiny_model("qwen2").train(), random_examples([5, 7])
    module.get_submodule("model.layers.0").eval()
    module.get_parameter("model.norm.weight").requires_grad_(False)

    def state() -> tuple[list[bool], list[bool]]:
        return [child.training for child in module.modules()], [p.requires_grad for p in module.parameters()]

    before = state()
    model = wrap_model(module, tiny_tokenizer(), layer_blocks=2)
    assert state() == before
    in_training = package_phi(model, examples)
    assert state() == before
    assert torch.equal(in_training, package_phi(wrap_model(module.eval(), tiny_tokenizer(), layer_blocks=2), examples))
    module.train()
    module.get_submodule("model.layers.0").eval()
    with pytest.raises(OptionError, match="expected a regular expression"):
        wrap_model(module, tiny_tokenizer(), attention_pattern="(")
    with pytest.raises(ModelError, match="has no embedding"):
        package_phi_of_unknown_token(model)
    assert state() == before


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_second_moment_of_a_ninth_triples_the_projected_gradient(architecture: str):
    model, examples = language_model(architecture), random_examples(LENGTHS)

    def moment(scale: float) -> SecondMoment:
        draw = torch.Generator().manual_seed(0)
        moments: dict[str, Moment] = {
            matrix.name: FactoredMoment(
                row=scale * torch.rand(matrix.rows, generator=draw),
                column=scale * torch.rand(matrix.columns, generator=draw),
            )
            for matrix in model.matrices
        }
        return SecondMoment(kind="factored", moments=moments, source="drawn")

    ninth, whole = (package_phi(model, examples, moment(scale)) for scale in (1 / 9, 1.0))
    assert_rows_close(ninth, 3 * whole, tolerance=TOLERANCE)


def test_coverage_counts_matrices_but_no_biases_norms_or_embeddings():
    module = tiny_model("qwen2")
    model = wrap_model(module, tiny_tokenizer(), layer_blocks=2)
    assert {module.get_parameter(matrix.parameter).ndim for matrix in model.matrices} == {2}
    covered = sum(matrix.rows * matrix.columns for matrix in model.matrices)
    assert model.coverage.parameters == covered
    assert model.coverage.total_parameters == sum(parameter.numel() for parameter in module.parameters())
    assert model.coverage.left_out == ("model.embed_tokens.weight",)


@hypothesis.given(lengths=st.lists(st.integers(2, 50), max_size=30), batch_tokens=st.integers(1, 120))
def test_planned_batches_hold_every_example_once_within_the_budget(lengths: list[int], batch_tokens: int):
    batches = plan_batches(lengths, batch_tokens)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        widest = max(lengths[place] for place in batch)
        assert len(batch) == 1 or len(batch) * widest <= batch_tokens
    widths = [lengths[batch[0]] for batch in batches]
    assert widths == sorted(widths, reverse=True)


def test_batch_pads_on_the_right_and_never_makes_padding_a_target():
    examples = random_examples([2, 5, 3])
    batch = make_batch(examples, [2, 0, 1])
    assert batch.token_ids.shape == (3, 5)
    for row, place in enumerate(batch.indices):
        length = len(examples[place].token_ids)
        assert batch.token_ids[row, :length].tolist() == examples[place].token_ids.tolist()
        assert batch.target_mask[row].tolist() == [*examples[place].target_mask.tolist(), *[False] * (5 - length)]
    assert not np.any(batch.target_mask[:, 0].numpy())
