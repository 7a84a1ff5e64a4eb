"""V read from optimizer state is the optimizer's own second moment; state that does not fit is an error."""

import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.optimization import Adafactor

import reference
from comparisons import assert_rows_close
from tiny_models import tiny_model, tiny_tokenizer
from trackstar.choices import SecondMomentKind
from trackstar.errors import SecondMomentError
from trackstar.gradients.optimizer_state import find_optimizer_state, second_moment_from_state, second_moment_of
from trackstar.gradients.second_moment import FactoredMoment, SecondMoment
from trackstar.model.language_model import LanguageModel, wrap_model

STEPS = 3
BETA2 = 0.97

Parameters = Any
OPTIMIZERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.9, BETA2)),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, BETA2), weight_decay=0.1),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, BETA2), amsgrad=True),
    "torch Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
    "transformers Adafactor": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False),
}
GROUPINGS = ["one group", "named", "Trainer", "matrices apart"]


def optimizers_own(state: Mapping[str, Any]) -> Tensor:
    """V of one weight as it is stored, by the oracle's formula for what the optimizer keeps."""
    if "exp_avg_sq_row" in state:
        return reference.adafactor_second_moment(state["exp_avg_sq_row"], state["exp_avg_sq_col"])
    if "row_var" in state:
        epsilon1 = torch.finfo(torch.float32).eps
        return reference.torch_adafactor_second_moment(state["row_var"], state["col_var"], epsilon1=epsilon1)
    squares = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    return reference.adam_second_moment(squares, int(state["step"]), BETA2)


def groups(module: nn.Module, grouping: str) -> Parameters:
    named = list(module.named_parameters())
    if grouping == "one group":
        return list(module.parameters())
    if grouping == "named":
        return named[::-1]
    if grouping == "matrices apart":
        decayed = [name for name, parameter in named if parameter.ndim > 1]
    else:
        from transformers import Trainer

        decayed = Trainer.get_decay_parameter_names(None, module)  # pyright: ignore[reportArgumentType]
    return [
        {"params": [parameter for name, parameter in named if name in decayed], "weight_decay": 0.1},
        {"params": [parameter for name, parameter in named if name not in decayed], "weight_decay": 0.0},
    ]


def trained(
    architecture: str, optimizer_name: str, grouping: str = "one group", **overrides: Any
) -> tuple[LanguageModel, torch.optim.Optimizer, dict[str, Tensor]]:
    """A model after a few steps on random tokens, its optimizer, and the optimizer's V by parameter name."""
    module = tiny_model(architecture, **overrides).requires_grad_(True)
    optimizer = OPTIMIZERS[optimizer_name](groups(module, grouping))
    draw = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        token_ids = torch.randint(3, 300, (2, 12), generator=draw)
        module(input_ids=token_ids, labels=token_ids).loss.mul(30).backward()
        optimizer.step()
        optimizer.zero_grad()
    own = {name: optimizers_own(optimizer.state[p]) for name, p in module.named_parameters() if p.ndim == 2}
    return wrap_model(module, tiny_tokenizer("bos"), layer_blocks=2), optimizer, own


def write_named(path: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> Path:
    """optimizer.safetensors as pretraining writes it."""
    tensors = {
        f"{key}/{name}": torch.as_tensor(value).contiguous()
        for name, parameter in model.module.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    betas = optimizer.param_groups[0].get("betas")
    metadata = {"optimizer": type(optimizer).__name__, **({"betas": json.dumps(betas)} if betas else {})}
    save_file(tensors, path / "optimizer.safetensors", metadata=metadata)
    return path / "optimizer.safetensors"


def write_torch(path: Path, optimizer: torch.optim.Optimizer) -> Path:
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    return path / "optimizer.pt"


def assert_is_own(
    found: SecondMoment, model: LanguageModel, own: Mapping[str, Tensor], *, factors_of_full: bool = False
) -> None:
    """`found` is V by matrix in the orientation [outputs, inputs], or the row and column means of V."""
    assert sorted(found.moments) == sorted(matrix.name for matrix in model.matrices)
    for matrix in model.matrices:
        V = own[matrix.parameter].T if matrix.transposed else own[matrix.parameter]
        assert V.shape == (matrix.rows, matrix.columns)
        if factors_of_full:
            V = reference.factored_second_moment(V)
        assert_rows_close(found.moments[matrix.name].values(), V, tolerance=1e-5, label=matrix.name)


@pytest.mark.parametrize("where", ["named file", "torch file", "live"])
@pytest.mark.parametrize("kind", ["factored", "elementwise"])
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_second_moment_is_the_real_optimizers_own(
    architecture: str, optimizer_name: str, kind: SecondMomentKind, where: str, tmp_path: Path
):
    model, optimizer, own = trained(architecture, optimizer_name)
    if where == "live":
        found = second_moment_of(optimizer, model, kind=kind, floor=0.25)
    else:
        file = write_named(tmp_path, model, optimizer) if where == "named file" else write_torch(tmp_path, optimizer)
        found = second_moment_from_state(file, model, kind=kind, floor=0.25)
        assert str(file) in found.source
    assert (found.kind, found.floor) == (kind, 0.25)
    adam = optimizer_name.startswith("Adam")
    assert_is_own(found, model, own, factors_of_full=adam and kind == "factored")
    assert f"at step {STEPS}" in found.source
    assert ("multiplied out" in found.source) == (not adam and kind == "elementwise")


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "gpt_neox", "gemma2", "qwen2", "olmo2"])
def test_numbered_parameters_find_their_names(architecture: str, grouping: str, tmp_path: Path):
    # All layers have the same shapes, so only the right order gives the right numbers.
    model, optimizer, own = trained(architecture, "AdamW", grouping)
    found = second_moment_from_state(write_torch(tmp_path, optimizer), model, kind="elementwise")
    assert_is_own(found, model, own)


def test_parameter_names_of_wrapped_modules_lose_their_prefix(tmp_path: Path):
    model, optimizer, own = trained("llama", "AdamW", "named")
    content = optimizer.state_dict()
    for group in content["param_groups"]:
        group["param_names"] = [f"_orig_mod.module.{name}" for name in group["param_names"]]
    torch.save(content, tmp_path / "state.pth")
    assert_is_own(second_moment_from_state(tmp_path / "state.pth", model, kind="elementwise"), model, own)


def test_state_keyed_by_name_needs_no_numbers(tmp_path: Path):
    model, optimizer, own = trained("llama", "AdamW", "named")
    content = optimizer.state_dict()
    names = dict(zip(content["param_groups"][0]["params"], content["param_groups"][0].pop("param_names"), strict=True))
    content["state"] = {names[number]: kept for number, kept in content["state"].items()}
    content["param_groups"][0]["params"] = list(names.values())
    torch.save(content, tmp_path / "state.bin")
    assert_is_own(second_moment_from_state(tmp_path / "state.bin", model, kind="elementwise"), model, own)


def test_factored_kind_keeps_the_row_and_column_means_of_adam():
    model, optimizer, own = trained("gpt2", "AdamW")
    found = second_moment_of(optimizer, model)
    for matrix in model.matrices:
        V = own[matrix.parameter].T if matrix.transposed else own[matrix.parameter]
        moment = found.moments[matrix.name]
        assert isinstance(moment, FactoredMoment)
        assert_rows_close(moment.row[None], V.mean(dim=1)[None], tolerance=1e-5)
        assert_rows_close(moment.column[None], V.mean(dim=0)[None], tolerance=1e-5)


def test_old_torch_format_is_read(tmp_path: Path):
    model, optimizer, own = trained("llama", "AdamW")
    torch.save(optimizer.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_is_own(second_moment_from_state(tmp_path / "old.pt", model, kind="elementwise"), model, own)


def test_bfloat16_state_is_read(tmp_path: Path):
    model, optimizer, own = trained("gpt2", "transformers Adafactor")
    content = optimizer.state_dict()
    for kept in content["state"].values():
        kept |= {k: v.bfloat16() for k, v in kept.items() if isinstance(v, Tensor) and v.ndim}
    torch.save(content, tmp_path / "optimizer.pt")
    found = second_moment_from_state(tmp_path, model)
    for matrix in model.matrices:
        moment, V = found.moments[matrix.name], own[matrix.parameter].T
        assert moment.values().dtype == torch.float32
        assert_rows_close(moment.values(), V, tolerance=1e-2)


def test_named_state_is_preferred_to_torchs(tmp_path: Path):
    model, optimizer, _ = trained("llama", "AdamW")
    assert find_optimizer_state(tmp_path) is None
    numbered = write_torch(tmp_path, optimizer)
    assert find_optimizer_state(tmp_path) == numbered
    named = write_named(tmp_path, model, optimizer)
    assert find_optimizer_state(tmp_path) == named
    assert str(named) in second_moment_from_state(tmp_path, model).source


# ---- Errors ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> tuple[LanguageModel, dict[str, Any]]:
    """A model and its AdamW's state dict, for tests to corrupt a copy of."""
    model, optimizer, _ = trained("llama", "AdamW")
    return model, optimizer.state_dict()


class Exploit:
    """Runs code when it is unpickled without `weights_only`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploited",)


def _first_matrix(content: dict[str, Any]) -> dict[str, Any]:
    return next(kept for kept in content["state"].values() if kept["exp_avg_sq"].shape == (24, 24))


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: _first_matrix(content).__setitem__(key, value)


def _drop_state(content: dict[str, Any]) -> None:
    number = next(n for n, kept in content["state"].items() if kept["exp_avg_sq"].shape == (24, 24))
    del content["state"][number]


def _reversed(content: dict[str, Any]) -> None:
    content["param_groups"][0]["params"].reverse()


def _sgd(content: dict[str, Any]) -> None:
    for kept in content["state"].values():
        kept["momentum_buffer"] = kept.pop("exp_avg_sq")


def _doubly_named(content: dict[str, Any]) -> None:
    group = content["param_groups"][0]
    group["param_names"] = ["model.norm.weight"] * len(group["params"])


def _two_odd_groups(content: dict[str, Any]) -> None:
    group = content["param_groups"][0]
    params = group["params"]
    content["param_groups"] = [{**group, "params": params[:4]}, {**group, "params": params[4:]}]


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "not a state dict": (lambda c: c.pop("param_groups"), "a dict of state; expected an optimizer's state dict"),
    "state is a list": (lambda c: c.__setitem__("state", []), "expected an optimizer's state dict"),
    "no groups": (lambda c: c.__setitem__("param_groups", []), "expected an optimizer's state dict"),
    "group without params": (lambda c: c["param_groups"][0].pop("params"), "no list of params"),
    "state of a parameter is text": (lambda c: c["state"].__setitem__(3, "x"), "is str; expected a dict of tensors"),
    "one parameter too few": (lambda c: c["param_groups"][0]["params"].pop(), "numbered parameters, expected 30 for"),
    "one parameter twice": (lambda c: c["param_groups"][0]["params"].append(0), "do not name each parameter once"),
    "names one parameter twice": (_doubly_named, "param_names name one parameter twice"),
    "groups in no known order": (_two_odd_groups, r"holds 4\+26 numbered parameters, expected 23\+7 or"),
    "order reversed": (_reversed, "belongs to another model"),
    "state of an unknown parameter": (lambda c: c["state"].__setitem__(99, {}), "state of 99, which is no parameter"),
    "no state of a matrix": (_drop_state, "holds no state of model.layers.0.self_attn.q_proj.weight"),
    "another optimizer": (_sgd, "keeps step, exp_avg, momentum_buffer of"),
    "NaN": (_set("exp_avg_sq", torch.full((24, 24), torch.nan)), "has NaN, infinite or negative entries"),
    "negative": (_set("exp_avg_sq", -torch.ones(24, 24)), "has NaN, infinite or negative entries"),
    "zero throughout": (_set("exp_avg_sq", torch.zeros(24, 24)), "is zero throughout"),
    "another shape": (_set("exp_avg_sq", torch.ones(24, 23)), r"has shape \(24, 23\), expected \(24, 24\)"),
    "claims to be huge": (_set("exp_avg_sq", torch.ones(1).expand(2**30, 2**20)), r"has shape \(1073741824, 1048576\)"),
    "sparse": (_set("exp_avg_sq", torch.ones(24, 24).to_sparse()), "expected floating point"),
    "a number": (_set("exp_avg_sq", 0.5), "is float without dimensions; expected a tensor"),
    "step zero": (_set("step", torch.tensor(0.0)), "has step 0 and beta2 0.97"),
    "step NaN": (_set("step", torch.tensor(torch.nan)), "has step 0 and beta2 0.97"),
    "no betas": (lambda c: c["param_groups"][0].pop("betas"), f"has step {STEPS} and beta2 None"),
    "beta2 one": (lambda c: c["param_groups"][0].__setitem__("betas", (0.9, 1.0)), "beta2 1.0"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_state_that_does_not_fit_is_refused_in_one_line(
    case: str, llama: tuple[LanguageModel, dict[str, Any]], tmp_path: Path
):
    model, content = llama
    spoiled = {
        "state": {number: dict(kept) for number, kept in content["state"].items()},
        "param_groups": [{**group, "params": list(group["params"])} for group in content["param_groups"]],
    }
    spoil, message = SPOILED[case]
    spoil(spoiled)
    torch.save(spoiled, tmp_path / "optimizer.pt")
    with pytest.raises(SecondMomentError, match=message) as caught:
        second_moment_from_state(tmp_path / "optimizer.pt", model)
    assert str(caught.value).startswith(str(tmp_path / "optimizer.pt"))
    assert "\n" not in str(caught.value)


def test_hostile_pickle_is_refused_and_never_run(
    llama: tuple[LanguageModel, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": Exploit(), "param_groups": []}, "zip.pt")
    Path("plain.pt").write_bytes(pickle.dumps(Exploit(), protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(SecondMomentError, match="could run code when loaded") as caught:
            second_moment_from_state(name, llama[0])
        assert "\n" not in str(caught.value)
    assert not Path("exploited").exists()


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, 0.99])
@pytest.mark.parametrize("name", ["optimizer.safetensors", "optimizer.pt", "old.pt"])
def test_a_file_cut_off_anywhere_is_refused_in_one_line(
    name: str, length: float, llama: tuple[LanguageModel, dict[str, Any]], tmp_path: Path
):
    model, content = llama
    path = tmp_path / name
    if name == "optimizer.safetensors":
        names = [name for name, _ in model.module.named_parameters()]
        save_file({f"exp_avg_sq/{names[n]}": state["exp_avg_sq"] for n, state in content["state"].items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=name == "optimizer.pt")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(length * len(whole)) if isinstance(length, float) else length])
    with pytest.raises(SecondMomentError) as caught:
        second_moment_from_state(path, model)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_state_of_a_model_of_other_sizes_is_refused(tmp_path: Path):
    model, _, _ = trained("llama", "AdamW")
    other, optimizer, _ = trained("llama", "AdamW", intermediate_size=48)
    deeper, deeper_optimizer, _ = trained("llama", "AdamW", num_hidden_layers=4)
    message = (
        r"has shape \((48, 24|24, 48)\), expected \((40, 24|24, 40)\) for a parameter of shape .*; it belongs to an"
    )
    with pytest.raises(SecondMomentError, match=message):
        second_moment_from_state(write_named(tmp_path, other, optimizer), model)
    with pytest.raises(SecondMomentError, match=message):
        second_moment_from_state(write_torch(tmp_path, optimizer), model)
    with pytest.raises(SecondMomentError, match="which LlamaForCausalLM does not have"):
        second_moment_from_state(write_named(tmp_path, deeper, deeper_optimizer), model)
    with pytest.raises(SecondMomentError, match="holds 39 numbered parameters, expected 30"):
        second_moment_from_state(write_torch(tmp_path, deeper_optimizer), model)
    with pytest.raises(SecondMomentError, match="keeps no state of the model's parameters"):
        second_moment_of(optimizer, model)


def test_named_state_without_its_betas_or_in_other_names_is_refused(tmp_path: Path):
    model, optimizer, _ = trained("llama", "AdamW")
    path = write_named(tmp_path, model, optimizer)
    tensors = {
        f"{key}/{name}": value
        for name, parameter in model.module.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    for metadata in (None, {"betas": "what"}):
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(SecondMomentError, match="beta2 None"):
            second_moment_from_state(path, model)
    save_file({"model.norm.weight": torch.ones(24)}, path)
    with pytest.raises(SecondMomentError, match=r"holds a tensor named model\.norm\.weight; expected STATE/PARAMETER"):
        second_moment_from_state(path, model)


def test_a_path_without_state_is_refused(llama: tuple[LanguageModel, dict[str, Any]], tmp_path: Path):
    with pytest.raises(SecondMomentError, match=r"holds neither optimizer\.safetensors nor optimizer\.pt"):
        second_moment_from_state(tmp_path, llama[0])
    with pytest.raises(SecondMomentError, match="no such file"):
        second_moment_from_state(tmp_path / "optimizer.pt", llama[0])
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(SecondMomentError, match=r"unknown kind of file; expected .safetensors or a torch state dict"):
        second_moment_from_state(tmp_path / "state.json", llama[0])


def test_orders_that_fit_alike_but_differ_are_refused(tmp_path: Path):
    class Renamed(nn.Module):
        """Gives two matrices of one shape a name that only some rules take for a norm's."""

    model, optimizer, _ = trained("llama", "AdamW")
    module = model.module
    before = module.named_parameters
    names = [name for name, _ in before()]
    swapped = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"]
    content = optimizer.state_dict()
    matrices = [name for name, p in before() if p.ndim > 1]
    vectors = [name for name in names if name not in matrices]
    numbers = {name: number for number, name in enumerate(names)}
    group = content["param_groups"][0]
    content["param_groups"] = [
        {**group, "params": [numbers[name] for name in matrices]},
        {**group, "params": [numbers[name] for name in vectors]},
    ]
    assert Renamed is not None
    assert swapped[0] in matrices
    torch.save(content, tmp_path / "optimizer.pt")
    assert second_moment_from_state(tmp_path / "optimizer.pt", model).kind == "factored"
