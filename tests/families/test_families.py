"""Every causal family of the installed Transformers: gradients of a padded batch against autograd, or one line."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import reference
from comparisons import random_examples
from families.configurations import tiny_configuration
from families.outcomes import FAST, NOT_BUILT, REFUSED, SINGLE_PRECISION
from tiny_models import tiny_tokenizer
from trackstar.corpus import TokenizedExample
from trackstar.errors import TrackstarError
from trackstar.gradients.consumer import GradientConsumer
from trackstar.gradients.per_example import BatchedPass
from trackstar.gradients.projection import ProjectedGradients, projections
from trackstar.gradients.second_moment import NO_SECOND_MOMENT
from trackstar.model.batching import Batch
from trackstar.model.language_model import LanguageModel, wrap_model
from trackstar.model.layer_blocks import WeightMatrix

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LENGTHS = (9, 13, 6)
MIXED = {"inkling2_text"}
"""Families whose own code mixes float32 into float64, and so runs in float64 only in `precision`."""
TOKENS = 50


class Materialized(GradientConsumer):
    """G = Σ_t g_t a_tᵀ of every example and matrix; zero for an expert that no token reaches."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}

    def start(self, batch: Batch) -> None:
        self.gradients = {}

    def save_for_backward(self, matrix: WeightMatrix, inputs: Tensor) -> Tensor:
        return inputs.clone()

    def add(self, matrix: WeightMatrix, saved: Tensor, gradients: Tensor) -> None:
        assert matrix.name not in self.gradients, f"{matrix.name} is added twice"
        self.gradients[matrix.name] = torch.einsum("eti,etj->eij", gradients, saved)

    def result(self) -> dict[str, Tensor]:
        return self.gradients


def build(family: str) -> Any:
    """A tiny random model of the family, in evaluation mode, its experts computed one by one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: Any = transformers.AutoModelForCausalLM.from_config(tiny_configuration(family)).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(0.3 * torch.randn_like(parameter))
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    with contextlib.suppress(ValueError):
        module.set_experts_implementation("eager")
    return module if family in SINGLE_PRECISION else module.double()


def precision(family: str) -> contextlib.AbstractContextManager[Any]:
    """Every step in float64, also those that a family's code asks to be in float32."""
    return contextlib.nullcontext() if family in SINGLE_PRECISION else reference._EverythingInDouble()


def package_gradients(model: LanguageModel, examples: list[TokenizedExample]) -> list[dict[str, Tensor]]:
    consumer, gradients = Materialized(), [{} for _ in examples]
    with BatchedPass(model, consumer, batch_tokens=TOKENS, note=print) as run:
        for indices, by_matrix, losses in run.batches(examples, consumer.result):
            for row, index in enumerate(indices):
                gradients[index] = {name: of[row] for name, of in by_matrix.items()} | {"loss": losses[row]}
    return gradients


def autograd_gradients(
    module: torch.nn.Module, example: TokenizedExample, names: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one example alone, and its gradients by the parameters, from the model's own forward pass."""
    parameters = [module.get_parameter(name).requires_grad_(True) for name in names]
    ids = torch.from_numpy(example.token_ids).long()
    logits = module(input_ids=ids[None], use_cache=False).logits[0]
    loss = reference.loss_output(logits, ids, torch.from_numpy(example.target_mask))
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter in parameters:
        parameter.requires_grad_(False)
    pairs = zip(names, parameters, gradients, strict=True)
    return loss.detach(), {n: torch.zeros_like(p) if g is None else g for n, p, g in pairs}


def check_gradients(family: str, module: Any, **patterns: Any) -> LanguageModel:
    """Compare the package's gradients of a padded batch with autograd's, example by example."""
    examples = random_examples(LENGTHS, vocabulary=TOKENS)
    tolerance = 1e-4 if family in SINGLE_PRECISION else 1e-7
    with precision(family):
        model = wrap_model(module, tiny_tokenizer(), layer_blocks=2, **patterns)
        found = package_gradients(model, examples)
        names = sorted({matrix.parameter for matrix in model.matrices})
        for example, gradients in zip(examples, found, strict=True):
            loss, expected = autograd_gradients(module, example, names)
            torch.testing.assert_close(gradients["loss"].double(), loss.double(), rtol=1e-5, atol=1e-5)
            largest = max(float(gradient.norm()) for gradient in expected.values())
            for matrix in model.matrices:
                exact = stored(expected[matrix.parameter], matrix)
                one = gradients.get(matrix.name, torch.zeros_like(exact))
                error = float((one - exact).norm())
                assert error <= tolerance * (float(exact.norm()) + 1e-6 * largest), f"{matrix.name}: off by {error:.3g}"
    if family not in MIXED:
        check_projection(model, examples, found)
    return model


def check_projection(model: LanguageModel, examples: list[TokenizedExample], gradients: list[dict[str, Tensor]]):
    """φ of the same batch, where matrices that read the same input share a product, against Σ P₀ G P₁ᵀ."""
    side = 2
    consumer = ProjectedGradients(model, NO_SECOND_MOMENT, seed=0, side=side)
    with BatchedPass(model, consumer, batch_tokens=TOKENS, note=print) as run:
        found = {index: row for indices, phi, _ in run.batches(examples, consumer.result)
                 for index, row in zip(indices, phi.double(), strict=True)}  # fmt: skip
    for number, by_matrix in enumerate(gradients):
        blocks = torch.zeros(len(model.blocks), side, side, dtype=torch.float64)
        for matrix in model.matrices:
            if matrix.name in by_matrix:
                left, right = projections(matrix, seed=0, side=side)
                blocks[matrix.block] += left.double() @ by_matrix[matrix.name].double() @ right.double().T
        error = float((found[number] - blocks.flatten()).norm())
        assert error <= 1e-3 * float(blocks.norm()), f"φ of example {number}: off by {error:.3g}"


def stored(gradient: Tensor, matrix: WeightMatrix) -> Tensor:
    """The part of a parameter's gradient that is one matrix's, [outputs, inputs]."""
    part = gradient if matrix.expert is None else gradient[matrix.expert]
    return part.T if matrix.transposed else part


def families() -> Iterator[Any]:
    for family in FAMILIES:
        yield pytest.param(family, marks=() if family in FAST else pytest.mark.slow)


@pytest.mark.parametrize("family", list(families()))
def test_gradients_of_a_padded_batch_equal_autograds_or_the_family_is_refused_in_one_line(family: str):
    if family in NOT_BUILT:
        with pytest.raises(Exception):  # noqa: B017, PT011 - each library's own
            build(family)
        return
    module = build(family)
    refusal = REFUSED.get(family)
    if refusal is None:
        model = check_gradients(family, module)
        assert not [handle for child in module.modules() for handle in child._forward_hooks]
        assert {block.kind for block in model.blocks} <= {"attention", "mlp"}
        return
    with pytest.raises(TrackstarError) as caught:
        check_gradients(family, module)
    message = str(caught.value)
    assert refusal.message in message
    assert message.isprintable()
    if refusal.attention is not None:  # what the line advises works
        assert "`attention_pattern`" in message
        assert "`mlp_pattern`" in message
        check_gradients(family, module, attention_pattern=refusal.attention, mlp_pattern=refusal.mlp)


def test_every_listed_family_exists():
    assert {*REFUSED, *NOT_BUILT, *SINGLE_PRECISION, *FAST} <= set(FAMILIES)
    assert not REFUSED.keys() & NOT_BUILT.keys()
