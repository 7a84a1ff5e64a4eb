"""Losses, gradient factors and projected gradients, compared with the oracle."""

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import reference
from comparisons import (
    assert_rows_close,
    by_block,
    language_model,
    package_phi,
    random_examples,
    reference_gradients,
    reference_losses,
    reference_phi,
    with_targets,
)
from tiny_models import ARCHITECTURES, CORE_ARCHITECTURES, matrix_parameters, tiny_model, tiny_tokenizer
from trackstar.choices import Output
from trackstar.corpus import TokenizedExample
from trackstar.gradients.per_example import GradientConsumer, gradient_pass, loss_and_hidden_gradients
from trackstar.gradients.second_moment import ElementwiseMoment, FactoredMoment, SecondMoment
from trackstar.model.batching import Batch, make_batch
from trackstar.model.language_model import Head, wrap_model
from trackstar.model.layer_blocks import WeightMatrix


class Materialized(GradientConsumer):
    """Multiplies the factors out: G = Σ_t g_t a_tᵀ of every example and matrix."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def start(self, batch: Batch) -> None:
        self.gradients.clear()

    def save_for_backward(self, matrix: WeightMatrix, inputs: Tensor) -> Tensor:
        return inputs.clone()

    def add(self, matrix: WeightMatrix, saved: Tensor, gradients: Tensor) -> None:
        assert matrix.name not in self.gradients
        self.gradients[matrix.name] = torch.einsum("eti,etj->eij", gradients, saved)


def mixed_examples() -> list[TokenizedExample]:
    """Different lengths, so all but one are padded; targets: all tokens, a completion, one, scattered."""
    every, completion, single, scattered = random_examples([17, 23, 9, 12])
    return [
        every,
        with_targets(completion, [t >= 15 for t in range(23)]),
        with_targets(single, [t == 5 for t in range(9)]),
        with_targets(scattered, [t in (1, 4, 11) for t in range(12)]),
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses_and_gradients_of_a_padded_batch_equal_the_references_one_by_one(architecture: str):
    model, examples, consumer = language_model(architecture), mixed_examples(), Materialized()
    with gradient_pass(model, consumer) as run:
        losses = run(make_batch(examples, range(len(examples))))
    torch.testing.assert_close(losses.double(), reference_losses(model, examples), rtol=1e-5, atol=1e-5)
    expected = reference_gradients(model, examples)
    for matrix in model.matrices:
        assert_rows_close(
            consumer.gradients[matrix.name], torch.stack([of[matrix.name] for of in expected]), label=matrix.name
        )


OUTPUTS: dict[Output, reference.Output] = {
    "loss": reference.loss_output,
    "margin": reference.margin_output,
    "logit": reference.logit_output,
}


@pytest.mark.parametrize("output", ["margin", "logit"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_gradients_of_other_output_functions_equal_the_references(architecture: str, output: Output):
    model, examples, consumer = language_model(architecture), mixed_examples(), Materialized()
    with gradient_pass(model, consumer, output=output) as run:
        losses = run(make_batch(examples, range(len(examples))))
    torch.testing.assert_close(losses.double(), reference_losses(model, examples), rtol=1e-5, atol=1e-5)
    expected = reference_gradients(model, examples, output=OUTPUTS[output])
    for matrix in model.matrices:
        assert_rows_close(
            consumer.gradients[matrix.name], torch.stack([of[matrix.name] for of in expected]), label=matrix.name
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_attention_and_mlp_matrix_is_covered_once(architecture: str):
    model = language_model(architecture)
    names = [matrix.parameter for matrix in model.matrices]
    assert sorted(names) == sorted(matrix_parameters(model.module))
    assert len(set(names)) == len(names)
    assert sorted(matrix.name for matrix in model.matrices) == sorted(model.input_groups)
    for block in model.blocks:
        assert {matrix.kind for matrix in block.matrices} == {block.kind}
        assert [matrix.block for matrix in block.matrices] == [model.blocks.index(block)] * len(block.matrices)
        assert {matrix.layer for matrix in block.matrices} == set(range(block.first_layer, block.last_layer + 1))


@pytest.mark.parametrize("kind", ["none", "factored", "elementwise"])
@pytest.mark.parametrize("architecture", CORE_ARCHITECTURES)
def test_projected_gradients_equal_the_dense_kronecker_projections(architecture: str, kind: str):
    model, examples = language_model(architecture), mixed_examples()
    second_moment = random_second_moment(model.matrices, kind)
    expected = reference_phi(model, examples, dense(second_moment), seed=3)
    found = by_block(model, package_phi(model, examples, second_moment, seed=3))
    assert list(found) == list(expected)
    for block, phi in expected.items():
        assert_rows_close(found[block], phi, label=block)


@pytest.mark.parametrize("kind", ["factored", "elementwise"])
def test_entries_of_the_second_moment_below_the_floor_count_as_the_floor(kind: str):
    model, examples = language_model("llama"), mixed_examples()
    second_moment = random_second_moment(model.matrices, kind, floor=0.2, with_zeros=True)
    expected = reference_phi(model, examples, dense(second_moment))
    for block, phi in by_block(model, package_phi(model, examples, second_moment)).items():
        assert_rows_close(phi, expected[block], label=block)


@pytest.mark.parametrize("layer_blocks", [1, 3])
def test_pooling_sums_the_same_projected_gradients_however_many_layers_a_block_has(layer_blocks: int):
    model, examples = language_model("qwen3", layer_blocks=layer_blocks), mixed_examples()
    expected = reference_phi(model, examples)
    assert len(expected) == 2 * layer_blocks
    for block, phi in by_block(model, package_phi(model, examples)).items():
        assert_rows_close(phi, expected[block], label=block)
    whole = language_model("qwen3", layer_blocks=1)
    for kind, name in (("attention", "attention.0-2"), ("mlp", "mlp.0-2")):
        parts = torch.stack([phi for block, phi in expected.items() if block.startswith(kind)]).sum(dim=0)
        assert_rows_close(by_block(whole, package_phi(whole, examples))[name], parts, label=kind)


def test_bfloat16_gradients_point_where_the_references_do():
    module = tiny_model("llama", num_hidden_layers=2)
    exact = wrap_model(module, tiny_tokenizer(), layer_blocks=1)
    expected = torch.cat(list(reference_phi(exact, mixed_examples(), side=8).values()), dim=1)
    rounded = wrap_model(tiny_model("llama", num_hidden_layers=2).bfloat16(), tiny_tokenizer(), layer_blocks=1)
    found = package_phi(rounded, mixed_examples(), side=8).double()
    assert float(torch.cosine_similarity(found, expected).min()) > 0.98


@hypothesis.given(
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    cap=st.sampled_from([None, 2.0, 30.0]),
    biased=st.booleans(),
    padding=st.integers(0, 3),
    output=st.sampled_from(["loss", "margin", "logit"]),
)
def test_closed_form_of_the_heads_gradient_equals_autograds(
    seed: int, scale: float, cap: float | None, biased: bool, padding: int, output: Output
):
    draw = torch.Generator().manual_seed(seed)
    head = Head(
        weight=torch.randn(11, 5, generator=draw),
        bias=torch.randn(11, generator=draw) if biased else None,
        scale=scale,
        cap=cap,
    )
    hidden = torch.randn(3, 6 + padding, 5, generator=draw)
    token_ids = torch.randint(0, 11, (3, 6 + padding), generator=draw)
    mask = torch.rand(3, 6 + padding, generator=draw) < 0.6
    mask[:, 0], mask[:, 6:], mask[:, 2] = False, False, True
    losses, gradients = loss_and_hidden_gradients(head, hidden, token_ids, mask, output=output)
    for example in range(3):
        states = hidden[example].double().requires_grad_(True)
        logits = states @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
        logits = scale * logits if cap is None else cap * torch.tanh(scale * logits / cap)
        loss = reference.loss_output(logits, token_ids[example], mask[example])
        torch.testing.assert_close(losses[example].double(), loss.detach(), rtol=1e-5, atol=1e-5)
        (expected,) = torch.autograd.grad(OUTPUTS[output](logits, token_ids[example], mask[example]), states)
        torch.testing.assert_close(gradients[example].double(), expected, rtol=1e-4, atol=1e-5)


def test_heads_chunks_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch):
    model, examples = language_model("gemma2"), mixed_examples()
    whole = package_phi(model, examples)
    monkeypatch.setattr("trackstar.gradients.per_example._CHUNK_BYTES", {"cpu": 1})  # 16 positions, the smallest chunk
    assert sum(int(example.target_mask.sum()) for example in examples) > 16
    assert_rows_close(package_phi(model, examples), whole, tolerance=1e-5)


def random_second_moment(
    matrices: tuple[WeightMatrix, ...], kind: str, *, floor: float = 1e-8, with_zeros: bool = False
) -> SecondMoment:
    """V drawn over a few orders of magnitude, optionally with zeros."""
    draw = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> Tensor:
        values = torch.exp(2 * torch.randn(*shape, generator=draw))
        return values * (torch.rand(*shape, generator=draw) > 0.2) if with_zeros else values

    moments: dict[str, Any] = {}
    for matrix in matrices if kind != "none" else ():
        if kind == "factored":
            moments[matrix.name] = FactoredMoment(row=drawn(matrix.rows), column=drawn(matrix.columns))
        else:
            moments[matrix.name] = ElementwiseMoment(entries=drawn(matrix.rows, matrix.columns))
    return SecondMoment(kind=kind, moments=moments, source="drawn", floor=floor)  # pyright: ignore[reportArgumentType]


def dense(second_moment: SecondMoment) -> dict[str, Tensor] | None:
    """V in full, with entries below the floor, a fraction of their mean, raised to it."""
    if second_moment.kind == "none":
        return None

    def floored(values: Tensor) -> Tensor:
        return values.double().clamp(min=second_moment.floor * float(values.double().mean()))

    return {
        name: reference.adafactor_second_moment(floored(moment.row), floored(moment.column))
        if isinstance(moment, FactoredMoment)
        else floored(moment.entries)
        for name, moment in second_moment.moments.items()
    }
