"""V read from optimizer state, live or from files, equals the second moment that the optimizer divides by."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

import reference
from comparisons import assert_rows_close, by_block, package_phi, random_examples, reference_phi
from tiny_models import tiny_model, tiny_tokenizer
from trackstar.choices import SecondMomentKind
from trackstar.gradients.optimizer_state import second_moment_from_state, second_moment_of
from trackstar.model.language_model import LanguageModel, wrap_model

BETA2 = 0.95


def transformers_adafactor(parameters: list[nn.Parameter]) -> Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-3, scale_parameter=False, relative_step=False)


# ε₁ is too small to clamp anything; `test_torch_adafactor_divides_...` tests a larger one.
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, betas=(0.9, BETA2)),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, BETA2), weight_decay=0.1),
    "transformers adafactor": transformers_adafactor,
    "torch adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3, eps=(1e-15, 1e-3)),
}


def trained(architecture: str, optimizer_name: str) -> tuple[LanguageModel, Optimizer]:
    """A tiny model after three real training steps, and its optimizer."""
    module = tiny_model(architecture, num_hidden_layers=2) if architecture != "gpt2" else tiny_model("gpt2", n_layer=2)
    module.requires_grad_(True)
    optimizer = OPTIMIZERS[optimizer_name](list(module.parameters()))
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        token_ids = torch.randint(3, 300, (2, 12), generator=draw)
        module(input_ids=token_ids, labels=token_ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrap_model(module, tiny_tokenizer(), layer_blocks=1), optimizer


def own_second_moments(model: LanguageModel, optimizer: Optimizer) -> dict[str, Tensor]:
    """V of every matrix by the optimizer's own formula, [rows = outputs, columns = inputs]."""
    found = {}
    for matrix in model.matrices:
        state = optimizer.state[model.module.get_parameter(f"{matrix.name}.weight")]
        if "exp_avg_sq_row" in state:
            V = reference.adafactor_second_moment(state["exp_avg_sq_row"], state["exp_avg_sq_col"])
        elif "row_var" in state:
            V = reference.torch_adafactor_second_moment(state["row_var"], state["col_var"], epsilon1=1e-15)
        else:
            V = reference.adam_second_moment(state["exp_avg_sq"], int(state["step"]), BETA2)
        found[matrix.name] = V.T if reference.stored_transposed(model.module, f"{matrix.name}.weight") else V
    return found


def save_tensors(path: Path, model: LanguageModel, optimizer: Optimizer) -> None:
    """`optimizer.safetensors`: STATE/PARAMETER, with Adam's betas in the metadata."""
    tensors = {
        f"{key}/{name}": torch.as_tensor(value, dtype=torch.float32).clone()
        for name, parameter in model.module.named_parameters()
        for key, value in optimizer.state[parameter].items()
        if key != "RMS"
    }
    betas = optimizer.param_groups[0].get("betas")
    save_file(tensors, path, metadata={"betas": json.dumps(betas)} if betas else {})


def read(route: str, model: LanguageModel, optimizer: Optimizer, folder: Path, kind: SecondMomentKind):
    if route == "live":
        return second_moment_of(optimizer, model, kind=kind)
    if route == "safetensors":
        save_tensors(folder / "optimizer.safetensors", model, optimizer)
    else:
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return second_moment_from_state(folder, model, kind=kind)


@pytest.mark.parametrize("route", ["live", "safetensors", "torch"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("architecture", ["llama-tied", "gpt2"])
def test_second_moment_equals_the_optimizers_own_numbers(
    architecture: str, optimizer_name: str, route: str, tmp_path: Path
):
    model, optimizer = trained(architecture, optimizer_name)
    expected = own_second_moments(model, optimizer)
    found = read(route, model, optimizer, tmp_path, "elementwise")
    factored = read(route, model, optimizer, tmp_path, "factored")
    assert found.moments.keys() == factored.moments.keys() == expected.keys()
    for name, V in expected.items():
        torch.testing.assert_close(found.moments[name].values().double(), V, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            factored.moments[name].values().double(), reference.factored_second_moment(V), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("optimizer_name", ["adamw", "transformers adafactor"])
def test_gradients_corrected_by_an_optimizers_state_equal_the_references(optimizer_name: str):
    model, optimizer = trained("gpt2", optimizer_name)
    examples = random_examples([11, 7])
    expected = reference_phi(model, examples, own_second_moments(model, optimizer))
    found = package_phi(model, examples, second_moment_of(optimizer, model, kind="elementwise"))
    for block, phi in by_block(model, found).items():
        assert_rows_close(phi, expected[block], tolerance=1e-3, label=block)
