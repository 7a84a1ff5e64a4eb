"""Optimizer state by parameter name, from the project's `optimizer.safetensors` and from torch state dicts.

A torch state dict names parameters by number. They are named by its `param_names` where it has them, else in the
orders that are in use; an order is taken only where every tensor has its parameter's shape, so nothing is guessed.
"""

import itertools
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trackstar.errors import SecondMomentError
from trackstar.model.language_model import LanguageModel

INSTEAD = "give --second-moment estimate to estimate V from the corpus instead"
# Second moments, which must be tensors.
_TENSORS = {"exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var"}
# What data parallelism and compilation put before a parameter's name.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")

ParameterState = Mapping[str, Any]
"""What an optimizer keeps of one parameter: its state's names to tensors and numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerState:
    """What an optimizer keeps of each parameter.

    Attributes:
        source: Where it comes from, for people.
        of: By parameter name.
        beta2: β₂ of each parameter, where the optimizer has one.
    """

    source: str
    of: Mapping[str, ParameterState]
    beta2: Mapping[str, float]


def beta2_of(group: Mapping[str, Any]) -> float | None:
    """β₂ of a group of parameters, or None where its optimizer has none."""
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return None
    beta2 = betas[1]
    if not isinstance(beta2, (int, float)) and not (isinstance(beta2, Tensor) and beta2.ndim == 0):
        return None
    try:
        return float(beta2)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # complex, without values, of hundreds of digits
        return None


class _Lazily(Mapping[str, Any]):
    """One parameter's state, each tensor read from the file when it is asked for."""

    def __init__(self, read: Callable[[str], Tensor], keys: Mapping[str, str]) -> None:
        self._read = read
        self._keys = keys

    def __getitem__(self, state: str) -> Tensor:
        return self._read(self._keys[state])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def read_named_state(path: Path, model: LanguageModel) -> OptimizerState:
    """The state in a file of tensors named STATE/PARAMETER; tensors are read when they are asked for.

    Raises:
        SecondMomentError: It is not such a file, or is another model's.
    """
    try:
        file: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SecondMomentError(
            f"{path}: not a whole safetensors file ({_one_line(error)}); restore it, or {INSTEAD}"
        ) from None
    parameters = dict(model.module.named_parameters())
    keys: dict[str, dict[str, str]] = {}
    for key in file.keys():  # noqa: SIM118 - it is no mapping
        state, separator, parameter = key.partition("/")
        if not separator:
            raise SecondMomentError(
                f"{path}: holds a tensor named {_printable(key)}; expected STATE/PARAMETER, as in "
                "exp_avg_sq/model.layers.0.mlp.up_proj.weight"
            )
        if parameter not in parameters:
            raise SecondMomentError(
                f"{path}: holds state of {_printable(parameter)}, which {model.architecture} does not have; it belongs "
                "to another model"
            )
        found = tuple(file.get_slice(key).get_shape())
        _check_shape(f"{path}: {key}", state, found, tuple(parameters[parameter].shape))
        keys.setdefault(parameter, {})[state] = key

    def read(key: str) -> Tensor:
        try:
            return file.get_tensor(key)
        except (SafetensorError, OSError) as error:  # such as a number format that torch does not have
            raise SecondMomentError(
                f"{path}: {_printable(key)} cannot be read ({_one_line(error)}); {INSTEAD}"
            ) from None

    try:
        beta2 = beta2_of({"betas": json.loads((file.metadata() or {}).get("betas", "null"))})
    except (ValueError, RecursionError):
        beta2 = None
    return OptimizerState(
        source=str(path),
        of={parameter: _Lazily(read, states) for parameter, states in keys.items()},
        beta2={} if beta2 is None else dict.fromkeys(keys, beta2),
    )


# ---- torch state dicts ---------------------------------------------------------------------------------------


def read_numbered_state(path: Path, model: LanguageModel) -> OptimizerState:
    """The state in a torch state dict, its parameters named.

    Raises:
        SecondMomentError: It is not such a file, is another model's, or does not say which parameter is which.
    """
    state, groups = _torch_state_dict(path)
    names = _parameter_names(path, state, groups, model)
    beta2 = {names[number]: beta2_of(group) for group in groups for number in group["params"]}
    return OptimizerState(
        source=str(path),
        of={names[number]: kept for number, kept in state.items()},
        beta2={name: value for name, value in beta2.items() if value is not None},
    )


def _torch_state_dict(path: Path) -> tuple[dict[Any, dict[str, Any]], list[dict[str, Any]]]:
    """`state` and `param_groups` of a file of torch.save, without running code that may be in it."""
    try:
        # Mapped where the format allows it: Adam's first moment, half of the file, is then never read.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise SecondMomentError(
            f"{path}: cut off, or holds more than tensors and plain values, which could run code when loaded; expected "
            f"what torch.save writes of optimizer.state_dict(), or {INSTEAD}"
        ) from None
    except Exception as error:  # a damaged or hostile file can raise anything here
        raise SecondMomentError(
            f"{path}: cannot be read as torch state ({_one_line(error)}); expected what torch.save writes of "
            f"optimizer.state_dict(), or {INSTEAD}"
        ) from None
    state, groups = (loaded.get("state"), loaded.get("param_groups")) if isinstance(loaded, dict) else (None, None)
    if not isinstance(state, dict) or not isinstance(groups, list) or not groups:
        found = f"a dict of {listed(loaded)}" if isinstance(loaded, dict) else type(loaded).__name__
        raise SecondMomentError(
            f"{path}: holds {found}; expected an optimizer's state dict, with state and param_groups"
        )
    if any(not isinstance(group, dict) or not isinstance(group.get("params"), list) for group in groups):
        raise SecondMomentError(f"{path}: an entry of param_groups has no list of params; expected one in each")
    for number, kept in state.items():
        if not isinstance(kept, dict):
            raise SecondMomentError(
                f"{path}: state of parameter {_printable(number)} is {type(kept).__name__}; expected a dict of tensors"
            )
    return state, groups


def _parameter_names(
    path: Path, state: Mapping[Any, ParameterState], groups: Sequence[Mapping[str, Any]], model: LanguageModel
) -> dict[Any, str]:
    """The name of every numbered parameter: the one order that fits the state's shapes."""
    parameters = dict(model.module.named_parameters())
    covered = {matrix.parameter for matrix in model.matrices}
    fitting: dict[frozenset[tuple[Any, str]], dict[Any, str]] = {}
    misfits: list[SecondMomentError] = []
    for order in _orders(path, groups, model.module):
        numbers = itertools.chain.from_iterable(group["params"] for group in groups)
        names = dict(zip(numbers, itertools.chain.from_iterable(order), strict=True))
        try:
            _check_fit(path, state, names, parameters)
        except SecondMomentError as error:
            misfits.append(error)
        else:
            # Orders that agree on the matrices are the same to us.
            fitting.setdefault(frozenset(pair for pair in names.items() if pair[1] in covered), names)
    if not fitting:
        raise misfits[0]
    if len(fitting) > 1:
        raise SecondMomentError(
            f"{path}: its parameters are numbered, and {len(fitting)} orders of the model's fit their shapes; save the "
            "optimizer with named parameters (model.named_parameters()), so that the state holds param_names"
        )
    return next(iter(fitting.values()))


def _orders(path: Path, groups: Sequence[Mapping[str, Any]], module: nn.Module) -> Iterator[list[list[str]]]:
    """Every way to name the groups' parameters that has the right number of them in each group."""
    sizes = [len(group["params"]) for group in groups]
    numbers = list(itertools.chain.from_iterable(group["params"] for group in groups))
    if any(not isinstance(number, (int, str)) for number in numbers) or len(set(numbers)) != len(numbers):
        raise SecondMomentError(
            f"{path}: its param_groups do not name each parameter once; expected a number or name for each"
        )
    given = [group.get("param_names") for group in groups]
    if all(isinstance(number, str) for number in numbers):
        given = [group["params"] for group in groups]
    if all(isinstance(names, list) and len(names) == size for names, size in zip(given, sizes, strict=True)):
        named = [[_WRAPPERS.sub("", str(name)) for name in names or ()] for names in given]
        if len(set(itertools.chain.from_iterable(named))) != len(numbers):
            raise SecondMomentError(f"{path}: its param_names name one parameter twice; expected each once")
        yield named
        return
    every = [name for name, _ in module.named_parameters()]
    candidates = [[every]] if len(groups) == 1 else list(_decay_orders(module, every))
    fitting = [order for order in candidates if [len(names) for names in order] == sizes]
    if not fitting:
        expected = " or ".join(dict.fromkeys("+".join(str(len(names)) for names in order) for order in candidates))
        raise SecondMomentError(
            f"{path}: holds {'+'.join(map(str, sizes))} numbered parameters, expected {expected} for "
            f"{type(module).__name__}; it belongs to another model, or save the optimizer with named parameters"
        )
    yield from fitting


def _decay_orders(module: nn.Module, every: list[str]) -> Iterator[list[list[str]]]:
    """The usual two groups, with and without weight decay: of the Trainer (5 and before), and matrices apart."""
    shapes = {name: parameter.ndim for name, parameter in module.named_parameters()}
    in_norms = {
        f"{path}.{name}" if path else name
        for path, child in module.named_modules()
        if "norm" in type(child).__name__.lower()
        for name, _ in child.named_parameters(recurse=False)
    }
    in_layer_norms = {
        f"{path}.{name}"
        for path, child in module.named_modules()
        if isinstance(child, nn.LayerNorm)
        for name, _ in child.named_parameters(recurse=False)
    }
    patterns = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")
    rules: list[Callable[[str], bool]] = [
        lambda name: name not in in_layer_norms and not patterns.search(name.lower()),
        lambda name: name not in in_norms and "bias" not in name,
        lambda name: name not in in_layer_norms and "bias" not in name,
        lambda name: shapes[name] >= 2,
    ]
    for decays in rules:
        yield [[name for name in every if decays(name)], [name for name in every if not decays(name)]]


def _check_fit(
    path: Path, state: Mapping[Any, ParameterState], names: Mapping[Any, str], parameters: Mapping[str, Tensor]
) -> None:
    """That every parameter with a state is one of the model's, and every tensor has its shape."""
    for number, kept in state.items():
        name = names.get(number, str(number))
        if name not in parameters:
            raise SecondMomentError(
                f"{path}: holds state of {_printable(name)}, which is no parameter of the model; it belongs to another "
                "model"
            )
        for key, value in kept.items():
            if isinstance(value, Tensor) and value.ndim:
                what = f"{path}: {key} of parameter {_printable(number)}, {name},"
                if value.layout != torch.strided or not value.is_floating_point() or value.is_meta:
                    found = f"{value.layout} of {value.dtype}{', without values' if value.is_meta else ''}"
                    raise SecondMomentError(f"{what} is {found}; expected floating point")
                _check_shape(what, str(key), tuple(value.shape), tuple(parameters[name].shape))
            elif key in _TENSORS:
                raise SecondMomentError(
                    f"{path}: {key} of parameter {_printable(number)}, {name}, is {type(value).__name__} without "
                    "dimensions; expected a tensor"
                )


def _check_shape(what: str, state: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """That a state's tensor has the shape that its parameter's makes it have; unknown states may have any."""
    expected = {
        "exp_avg": shape,
        "exp_avg_sq": shape,
        "max_exp_avg_sq": shape,
        "variance": shape,
        "exp_avg_sq_row": shape[:-1],
        "exp_avg_sq_col": (*shape[:-2], *shape[-1:]),
        "row_var": (*shape[:-1], 1),
        "col_var": (*shape[:-2], 1, *shape[-1:]),
    }.get(state)
    if expected is not None and found != expected:
        raise SecondMomentError(
            f"{what} has shape {found}, expected {expected} for a parameter of shape {shape}; it belongs to another "
            "model"
        )


def listed(keys: Mapping[Any, object], most: int = 6) -> str:
    """The first of the keys, printable."""
    return ", ".join(_printable(key) for key in list(keys)[:most]) + (" ..." if len(keys) > most else "") or "nothing"


def _printable(value: object) -> str:
    text = str(value)[:80]
    return "".join(character if character.isprintable() else "�" for character in text)


def _one_line(error: Exception) -> str:
    return _printable(" ".join(str(error).split())) or type(error).__name__
