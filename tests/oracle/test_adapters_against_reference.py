"""Gradients of merged networks and of adapters' own matrices, compared with autograd in float64 one by one."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from adapters import GPT2, adapted, adapted_tiny_model, lora, save_adapter, wrapped
from comparisons import assert_rows_close, by_block, package_phi, random_examples, reference_phi_of, with_targets
from tiny_models import tiny_model, tiny_tokenizer
from trackstar.choices import Parameters
from trackstar.corpus import TokenizedExample
from trackstar.gradients.estimated_moment import estimate_second_moment
from trackstar.gradients.optimizer_state import second_moment_from_state, second_moment_of
from trackstar.gradients.second_moment import FactoredMoment
from trackstar.model.language_model import LanguageModel, load_model, wrap_model
from trackstar.tail_patch import Pair, TrainingStep, tail_patch

# PEFT itself calls what Transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def mixed_examples() -> list[TokenizedExample]:
    """Different lengths, so all but one are padded; targets: all tokens, a completion, scattered."""
    every, completion, scattered = random_examples([17, 23, 12])
    return [
        every,
        with_targets(completion, [t >= 15 for t in range(23)]),
        with_targets(scattered, [t in (1, 4, 11) for t in range(12)]),
    ]


def double_network(module: Any) -> Any:
    """The network with its adapter in place, in float64."""
    return reference.double_copy(module.get_base_model())


def autograd_of(double: Any, example: TokenizedExample, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of an example's loss by named tensors of the network."""
    value = reference.output_value(double, torch.from_numpy(example.token_ids), torch.from_numpy(example.target_mask))
    return dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))


def merged_by_hand(module: Any) -> Any:
    """The base model in float64 with W + s B A written out for every adapted layer, independently of PEFT's merging."""
    double = double_network(module)
    for path, layer in list(double.named_modules()):
        if not hasattr(layer, "lora_A"):
            continue
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        change = layer.scaling["default"] * up @ down
        base = layer.base_layer
        base.weight = torch.nn.Parameter(base.weight + (change.T if type(base).__name__ == "Conv1D" else change))
        parent, _, child = path.rpartition(".")
        setattr(double.get_submodule(parent), child, base)
    return double.requires_grad_(False)


def of_matrices(model: LanguageModel, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {m.name: gradients[m.parameter].T if m.transposed else gradients[m.parameter] for m in model.matrices}


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("llama", {}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "ranks that differ": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    "Conv1D": ("gpt2", {"target_modules": GPT2, "fan_in_fan_out": True}),
    "dropout": ("llama-tied", {"lora_dropout": 0.3}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_gradients_equal_autograd_of_the_merged_matrices(name: str):
    architecture, options = ADAPTERS[name]
    module = adapted_tiny_model(lora(**options), architecture=architecture)
    model, examples = wrapped(module), mixed_examples()
    double = merged_by_hand(module)
    parameters = {m.parameter: double.get_parameter(m.parameter).requires_grad_() for m in model.matrices}
    expected = [of_matrices(model, autograd_of(double, example, parameters)) for example in examples]
    assert_phi_is(model, examples, expected)
    assert len(model.matrices) == len(wrap_model(tiny_model(architecture), tiny_tokenizer()).matrices)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_gradients_equal_autograd_of_its_matrices(name: str):
    architecture, options = ADAPTERS[name]
    module = adapted_tiny_model(lora(**options), architecture=architecture)
    model, examples = wrapped(module, parameters="adapter"), mixed_examples()
    double = double_network(module)
    trained = [path for path, parameter in module.get_base_model().named_parameters() if parameter.requires_grad]
    assert sorted(trained) == sorted(matrix.parameter for matrix in model.matrices)
    parameters = {path: double.get_parameter(path).requires_grad_() for path in trained}
    expected = [of_matrices(model, autograd_of(double, example, parameters)) for example in examples]
    assert_phi_is(model, examples, expected)
    for matrix in model.matrices:  # A is r×inputs, B is outputs×r
        assert matrix.parameter == f"{matrix.name}.default.weight"
        assert (matrix.rows, matrix.columns) == tuple(double.get_parameter(matrix.parameter).shape)


def assert_phi_is(model: LanguageModel, examples: list[TokenizedExample], expected: list[dict[str, Tensor]]) -> None:
    """φ of padded batches equals that of the gradients, also if each example has a batch of its own."""
    blocks = reference_phi_of(model, expected)
    for budget, pad_to in ((256, 0), (1, 0), (256, 40)):
        found = by_block(model, package_phi(model, examples, batch_tokens=budget, pad_to=pad_to))
        for block, rows in blocks.items():
            assert_rows_close(found[block], rows, label=block)


METHODS = ("LoRA", "DoRA", "AdaLoRA", "IA3", "LoHa", "LoKr", "OFT", "VeRA")


def configuration_of(method: str) -> Any:
    import peft

    modules = ["q_proj", "v_proj", "down_proj"]
    return {
        "LoRA": lambda: lora(),
        "DoRA": lambda: lora(use_dora=True),
        "AdaLoRA": lambda: peft.AdaLoraConfig(target_modules=modules, init_r=4, total_step=10),
        "IA3": lambda: peft.IA3Config(target_modules=modules, feedforward_modules=["down_proj"]),
        "LoHa": lambda: peft.LoHaConfig(target_modules=modules, r=4),
        "LoKr": lambda: peft.LoKrConfig(target_modules=modules, r=4),
        "OFT": lambda: peft.OFTConfig(target_modules=["q_proj", "v_proj"], oft_block_size=4),
        "VeRA": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4, save_projection=True),
    }[method]()


@pytest.mark.parametrize("method", METHODS)
def test_any_method_that_can_be_merged_has_the_merged_networks_gradients(method: str):
    module = adapted_tiny_model(configuration_of(method))
    model, examples = wrapped(module), mixed_examples()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = copy.deepcopy(module).merge_and_unload()
    double = reference.double_copy(plain)
    parameters = {m.parameter: double.get_parameter(m.parameter).requires_grad_() for m in model.matrices}
    expected = [of_matrices(model, autograd_of(double, example, parameters)) for example in examples]
    assert_phi_is(model, examples, expected)
    with torch.no_grad():  # the method changes what the network computes, and the merged network computes the same
        tokens = torch.arange(3, 12)[None]
        assert torch.allclose(module(tokens).logits, model.module(tokens).logits, rtol=1e-3, atol=1e-3)
        base = tiny_model("llama")(tokens).logits
    assert not torch.allclose(base, module(tokens).logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["factored", "elementwise"])
@pytest.mark.parametrize("parameters", ["merged", "adapter"])
def test_estimated_second_moment_is_the_mean_square_of_the_gradients(parameters: Parameters, kind: Any):
    module = adapted_tiny_model()
    model, examples = wrapped(module, parameters=parameters), mixed_examples()
    double = double_network(module) if parameters == "adapter" else merged_by_hand(module)
    named = {m.parameter: double.get_parameter(m.parameter).requires_grad_() for m in model.matrices}
    gradients = [of_matrices(model, autograd_of(double, example, named)) for example in examples]
    found = estimate_second_moment(model, examples, kind=kind)
    for matrix in model.matrices:
        squares = torch.stack([of[matrix.name] for of in gradients]).square().mean(dim=0)
        expected = reference.factored_second_moment(squares) if kind == "factored" else squares
        assert_rows_close(found.moments[matrix.name].values(), expected, tolerance=1e-3, label=matrix.name)


# ---- V of a real run of the Trainer ---------------------------------------------------------------------------------


def texts_of(count: int) -> list[dict[str, Any]]:
    return [{"input_ids": [0, *range(3 + n, 15 + n)], "labels": [0, *range(3 + n, 15 + n)]} for n in range(count)]


def trained_checkpoint(folder: Path, configuration: Any, **options: Any) -> tuple[Path, Any]:
    """A LoRA adapter tuned by Transformers' Trainer for three steps: its checkpoint, and the trainer."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    adapter = save_adapter(folder, configuration)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = adapted(base, configuration, seed=3)
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=3, per_device_train_batch_size=2, save_steps=3, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no", **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=texts_of(6))  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert adapter.is_dir()
    return folder / "run" / "checkpoint-3", trainer


RUNS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "a trained norm, and biases": {"modules_to_save": ["norm"], "lora_bias": True},
    "a trained head": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("name", RUNS)
def test_second_moment_of_a_trainers_checkpoint_is_its_optimizers_own_by_name(name: str, tmp_path: Path):
    checkpoint, trainer = trained_checkpoint(tmp_path, lora(**RUNS[name]), weight_decay=0.1)
    model = load_model(checkpoint, parameters="adapter", layer_blocks=2)
    optimizer = trainer.optimizer.optimizer
    beta2 = optimizer.param_groups[0]["betas"][1]
    own = {
        path.removeprefix("base_model.model."): reference.adam_second_moment(
            optimizer.state[parameter]["exp_avg_sq"], int(optimizer.state[parameter]["step"]), beta2
        )
        for path, parameter in trainer.model.named_parameters()
        if parameter.requires_grad
    }
    found = second_moment_from_state(checkpoint, model, kind="elementwise")
    factored = second_moment_from_state(checkpoint / "optimizer.pt", model)
    assert len(model.matrices) == 24
    assert sorted(found.moments) == sorted(matrix.name for matrix in model.matrices)
    for matrix in model.matrices:
        assert_rows_close(found.moments[matrix.name].values(), own[matrix.parameter], label=matrix.name)
        moment = factored.moments[matrix.name]
        assert isinstance(moment, FactoredMoment)
        torch.testing.assert_close(moment.row.double(), own[matrix.parameter].mean(dim=1), rtol=1e-5, atol=0)


def test_second_moment_of_a_live_optimizer_is_its_own(tmp_path: Path):
    checkpoint, trainer = trained_checkpoint(tmp_path, lora())
    live = wrap_model(trainer.model, tiny_tokenizer(), parameters="adapter", layer_blocks=2)
    found = second_moment_of(trainer.optimizer.optimizer, live, kind="elementwise")
    saved = second_moment_from_state(checkpoint, live, kind="elementwise")
    for name, moment in found.moments.items():
        torch.testing.assert_close(moment.values(), saved.moments[name].values())


def test_checkpoint_is_loaded_as_the_trainer_left_it(tmp_path: Path):
    configuration = lora(modules_to_save=["lm_head", "embed_tokens"])
    checkpoint, trainer = trained_checkpoint(tmp_path, configuration)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=tokens).logits
        for parameters in ("merged", "adapter"):
            loaded = load_model(checkpoint, parameters=parameters, layer_blocks=2)
            torch.testing.assert_close(loaded.module(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-4)
            live = wrap_model(trainer.model, tiny_tokenizer(), parameters=parameters, layer_blocks=2)
            assert live.digest() == loaded.digest()


# ---- Tail-patch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", ["merged", "adapter"])
def test_a_step_moves_the_matrices_whose_gradients_are_taken_and_no_others(parameters: Parameters):
    module = adapted_tiny_model()
    model, examples = wrapped(module, parameters=parameters), mixed_examples()
    moment = estimate_second_moment(model, examples)
    step = TrainingStep.from_second_moment(moment, model, learning_rate=0.1)
    pairs = [Pair(query=0, proponent=1), Pair(query=0, proponent=2), Pair(query=1, proponent=2)]
    before = {name: parameter.clone() for name, parameter in model.module.named_parameters()}
    results = [tail_patch(model, step, examples, examples, pairs, path=path) for path in ("fast", "exact")]
    expected = [patched_by_hand(module, model, moment, examples, pair) for pair in pairs]
    for result in results:
        torch.testing.assert_close(torch.tensor(result.after).log(), torch.stack(expected), rtol=2e-3, atol=2e-3)
        assert (abs(result.after - result.before) > 1e-12 * result.before).all()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.module.named_parameters())


def patched_by_hand(module: Any, model: LanguageModel, moment: Any, examples: Any, pair: Pair) -> Tensor:
    """log p of a query after W ← W - η max(ε₂, RMS(W)) U / max(1, RMS(U)), U = G/√V, in float64."""
    double = double_network(module) if model.parameters == "adapter" else merged_by_hand(module)
    named = {m.parameter: double.get_parameter(m.parameter).requires_grad_() for m in model.matrices}
    gradients = autograd_of(double, examples[pair.proponent], named)
    with torch.no_grad():
        for matrix in model.matrices:
            weight = named[matrix.parameter]
            update = gradients[matrix.parameter] / moment.moments[matrix.name].values().double().sqrt()
            size = max(1e-3, float(weight.square().mean().sqrt()))
            weight -= 0.1 * size * update / max(1.0, float(update.square().mean().sqrt()))
        query = examples[pair.query]
        return -reference.output_value(double, torch.from_numpy(query.token_ids), torch.from_numpy(query.target_mask))
