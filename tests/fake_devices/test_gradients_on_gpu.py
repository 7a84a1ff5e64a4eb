"""Gradients on a GPU, pretended: φ, V, token splits and training steps are those of the CPU."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.optimization import Adafactor

from adapters import save_adapter
from comparisons import random_examples
from pretended_devices import assert_same_on
from tiny_models import CONTEXT_TOKENS, VOCABULARY, save_tiny_model, tiny_tokenizer
from trackstar.choices import Dtype, Output, ProjectionKind
from trackstar.gradients.estimated_moment import estimate_second_moment
from trackstar.gradients.optimizer_state import second_moment_of
from trackstar.gradients.projector import GradientProjector, projected
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, SecondMoment, SecondMomentKind
from trackstar.gradients.token_split import ProjectionSettings, split_over_tokens
from trackstar.model.language_model import LanguageModel, load_model, wrap_model
from trackstar.tail_patch import Pair, TrainingStep, tail_patch

SIDE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)


@functools.cache
def loaded(folder: Path, device: str, **options: Any) -> LanguageModel:
    """A model on a device, loaded once; no test changes its weights."""
    model = load_model(folder, device=device, layer_blocks=2, **options)
    assert {parameter.device.type for parameter in model.module.parameters()} == {device}
    return model


def phi(
    model: LanguageModel, moment: SecondMoment, *, projection: ProjectionKind = "two-sided", output: Output = "loss"
) -> tuple[Tensor, Tensor]:
    """φ and losses of a few examples."""
    with GradientProjector(
        model, moment, seed=0, side=SIDE, batch_tokens=24, note=print, kind=projection, output=output
    ) as projector:
        return projected(projector, random_examples([5, 9, 12]))


def stepped(model: LanguageModel, optimizer: str) -> torch.optim.Optimizer:
    """An optimizer after one step that leaves the weights as they are."""
    parameters = list(model.module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    made = torch.optim.AdamW(parameters, lr=0.0)
    if optimizer == "adafactor":
        made = Adafactor(parameters, lr=0.0, relative_step=False, scale_parameter=True)
    token_ids = torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0)).to(model.device)
    model.module(input_ids=token_ids, labels=token_ids).loss.backward()
    made.step()
    made.zero_grad()
    for parameter in parameters:
        parameter.requires_grad_(False)
    made.param_groups[0]["lr"] = 0.01
    return made


@pytest.mark.parametrize(
    ("projection", "kind", "dtype"),
    [
        ("two-sided", "factored", "bfloat16"),
        ("two-sided", "elementwise", "float32"),
        ("one-sided", "factored", "float32"),
        ("one-sided", "elementwise", "bfloat16"),
    ],
)
def test_projected_gradients_with_an_estimated_second_moment(
    projection: ProjectionKind, kind: SecondMomentKind, dtype: Dtype, folder: Path
):
    def compute(device: str) -> tuple[Tensor, Tensor]:
        model = loaded(folder, device, dtype=dtype)
        moment = estimate_second_moment(model, random_examples([7, 11]), kind=kind)
        return phi(model, moment, projection=projection)

    assert_same_on("cuda", compute)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_projected_gradients_of_other_families(architecture: str, tmp_path: Path):
    folder = save_tiny_model(tmp_path, architecture, num_hidden_layers=1)
    assert_same_on("cuda", lambda device: phi(loaded(folder, device), NO_SECOND_MOMENT))


def test_projected_gradients_of_the_margin(folder: Path):
    assert_same_on("cuda", lambda device: phi(loaded(folder, device), NO_SECOND_MOMENT, output="margin"))


@pytest.mark.parametrize(("optimizer", "kind"), [("adafactor", "factored"), ("adamw", "elementwise")])
def test_second_moment_of_a_live_optimizer(optimizer: str, kind: SecondMomentKind, folder: Path):
    def compute(device: str) -> list[Any]:
        model = loaded(folder, device)
        moment = second_moment_of(stepped(model, optimizer), model, kind=kind)
        return [*moment.tensors().values(), phi(model, moment)]

    assert_same_on("cuda", compute)


@pytest.mark.parametrize(("projection", "kind"), [("two-sided", "factored"), ("one-sided", "elementwise")])
def test_split_over_tokens(projection: ProjectionKind, kind: SecondMomentKind, folder: Path):
    def compute(device: str) -> list[Tensor]:
        model = loaded(folder, device)
        moment = second_moment_of(stepped(model, "adafactor"), model, kind=kind)
        vectors = torch.linspace(-1, 1, 3 * len(model.blocks) * SIDE**2).view(3, -1)
        settings = ProjectionSettings(seed=0, side=SIDE, output="loss", kind=projection)
        return split_over_tokens(model, moment, random_examples([5, 9, 12]), vectors, settings)

    assert_same_on("cuda", compute)


def test_projected_gradients_of_an_adapter(tmp_path: Path):
    folder = save_adapter(tmp_path)
    assert_same_on("cuda", lambda device: phi(loaded(folder, device, parameters="adapter"), NO_SECOND_MOMENT))


@functools.cache
def experts(family: str) -> nn.Module:
    """A tiny random mixture of experts."""
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=3, num_experts_per_tok=2, sliding_window=8,
        max_position_embeddings=CONTEXT_TOKENS,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter)) if parameter.ndim > 1 else parameter.add_(0.1)
    return module


@pytest.mark.parametrize(("family", "kind"), [("Mixtral", "factored"), ("GptOss", "elementwise")])
def test_projected_gradients_of_fused_experts(family: str, kind: SecondMomentKind):
    def compute(device: str) -> tuple[Tensor, Tensor]:
        module = copy.deepcopy(experts(family))
        module.to(device)
        model = wrap_model(module, tiny_tokenizer(), layer_blocks=2)
        return phi(model, estimate_second_moment(model, random_examples([7, 11]), kind=kind))

    assert_same_on("cuda", compute)


@pytest.mark.parametrize(
    ("step", "path"), [("adafactor", "exact"), ("adafactor", "fast"), ("adamw", "exact"), ("V", "fast")]
)
def test_tail_patch(step: str, path: Any, folder: Path):
    def compute(device: str) -> list[Any]:
        model = loaded(folder, device)
        if step == "V":
            moment = estimate_second_moment(model, random_examples([7, 11]))
            made = TrainingStep.from_second_moment(moment, model)
        else:
            made = TrainingStep.from_optimizer(stepped(model, step), model)
        examples = random_examples([5, 9, 12, 7])
        pairs = [Pair(query=query, proponent=proponent) for query in (0, 1) for proponent in (0, 1)]
        result = tail_patch(model, made, examples[:2], examples[2:], pairs, path=path)
        return [result.before, result.after]

    assert_same_on("cuda", compute)
