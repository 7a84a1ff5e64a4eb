"""Read optimizer state by parameter name, from `optimizer.safetensors` or a torch state dict.

A torch state dict numbers its parameters. Their names are its `param_names` if it has them, else
they follow one of the orders in common use. An order is accepted only if every tensor has its
parameter's shape, so nothing is guessed.
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
from trackstar.text import shortened, system_reason

ESTIMATE_ADVICE = 'pass `second_moment="estimate"` to estimate V from the corpus instead'
# States that must be tensors.
_TENSORS = {"exp_avg_sq", "max_exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "row_var", "col_var"}
# Prefixes that data parallelism, compilation and PEFT add to a parameter's name.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|base_model\.model\.)+")

ParameterState = Mapping[str, Any]
"""Optimizer state of one parameter: tensors and numbers by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerState:
    """Optimizer state of all parameters.

    Attributes:
        source: Origin of the state, for messages and manifests.
        of: State of each parameter by the parameter's name.
        beta2: β₂ of each parameter whose optimizer has one.
    """

    source: str
    of: Mapping[str, ParameterState]
    beta2: Mapping[str, float]


def beta2_of(group: Mapping[str, Any]) -> float | None:
    """β₂ of a group of parameters, or None if its optimizer has none."""
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        return None
    beta2 = betas[1]
    if not isinstance(beta2, (int, float)) and not (isinstance(beta2, Tensor) and beta2.ndim == 0):
        return None
    try:
        return float(beta2)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # complex, without values, or too many digits
        return None


class _LazyState(Mapping[str, Any]):
    """State of one parameter, whose tensors are read from the file when they are accessed."""

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
    """Read a file of tensors named STATE/PARAMETER; each tensor is read when it is accessed.

    Raises:
        SecondMomentError: The file has another format, or belongs to another model.
    """
    try:
        file: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SecondMomentError(
            f"{path}: not a whole safetensors file ({system_reason(error)}); restore it, or {ESTIMATE_ADVICE}"
        ) from None
    parameters = model.trained()
    keys: dict[str, dict[str, str]] = {}
    for key in file.keys():  # noqa: SIM118 - not a mapping
        state, separator, parameter = key.partition("/")
        parameter = parameter if parameter in parameters else _WRAPPERS.sub("", parameter)
        if not separator:
            raise SecondMomentError(
                f"{path}: holds a tensor named {_short(key)}; expected STATE/PARAMETER, as in "
                "exp_avg_sq/model.layers.0.mlp.up_proj.weight"
            )
        if parameter not in parameters:
            raise SecondMomentError(
                f"{path}: holds state of {_short(parameter)}, which {model.architecture} does not have; it belongs "
                "to another model"
            )
        shape = tuple(file.get_slice(key).get_shape())
        _check_shape(f"{path}: {key}", state, shape, tuple(parameters[parameter].shape))
        keys.setdefault(parameter, {})[state] = key

    def read(key: str) -> Tensor:
        try:
            return file.get_tensor(key)
        except (SafetensorError, OSError) as error:  # such as a number format that torch does not have
            raise SecondMomentError(
                f"{path}: {_short(key)} cannot be read ({system_reason(error)}); {ESTIMATE_ADVICE}"
            ) from None

    try:
        beta2 = beta2_of({"betas": json.loads((file.metadata() or {}).get("betas", "null"))})
    except (ValueError, RecursionError):
        beta2 = None
    return OptimizerState(
        source=str(path),
        of={parameter: _LazyState(read, states) for parameter, states in keys.items()},
        beta2={} if beta2 is None else dict.fromkeys(keys, beta2),
    )


# ---- torch state dicts ---------------------------------------------------------------------------


def read_numbered_state(path: Path, model: LanguageModel) -> OptimizerState:
    """Read a torch state dict, and name its parameters.

    Raises:
        SecondMomentError: The file has another format, belongs to another model, or does not
            identify its parameters.
    """
    state, groups = _torch_state_dict(path)
    names = _parameter_names(path, state, groups, model)
    beta2 = {names[number]: beta2_of(group) for group in groups for number in group["params"]}
    return OptimizerState(
        source=str(path),
        of={names[number]: of_parameter for number, of_parameter in state.items()},
        beta2={name: value for name, value in beta2.items() if value is not None},
    )


def _torch_state_dict(path: Path) -> tuple[dict[Any, dict[str, Any]], list[dict[str, Any]]]:
    """`state` and `param_groups` of a file that torch.save wrote, without running code that may be in it."""
    try:
        # Memory-mapped if the format allows it: Adam's first moment, half of the file, is then never read.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise SecondMomentError(
            f"{path}: cut off, or holds more than tensors and plain values, which could run code when loaded; expected "
            f"what torch.save writes of optimizer.state_dict(), or {ESTIMATE_ADVICE}"
        ) from None
    except Exception as error:  # a damaged or hostile file can raise anything here
        raise SecondMomentError(
            f"{path}: cannot be read as torch state ({system_reason(error)}); expected what torch.save writes of "
            f"optimizer.state_dict(), or {ESTIMATE_ADVICE}"
        ) from None
    state, groups = (loaded.get("state"), loaded.get("param_groups")) if isinstance(loaded, dict) else (None, None)
    if not isinstance(state, dict) or not isinstance(groups, list) or not groups:
        content = f"a dict of {listed(loaded)}" if isinstance(loaded, dict) else type(loaded).__name__
        raise SecondMomentError(
            f"{path}: holds {content}; expected an optimizer's state dict, with state and param_groups"
        )
    if any(not isinstance(group, dict) or not isinstance(group.get("params"), list) for group in groups):
        raise SecondMomentError(f"{path}: an entry of param_groups has no list of params; expected one in each")
    for number, of_parameter in state.items():
        if not isinstance(of_parameter, dict):
            raise SecondMomentError(
                f"{path}: state of parameter {_short(number)} is {type(of_parameter).__name__}; expected a dict of "
                "tensors"
            )
    return state, groups


def _parameter_names(
    path: Path, state: Mapping[Any, ParameterState], groups: Sequence[Mapping[str, Any]], model: LanguageModel
) -> dict[Any, str]:
    """The name of each numbered parameter, by the one order that fits the state's shapes."""
    parameters = model.trained()
    covered = {matrix.parameter for matrix in model.matrices}
    fitting: dict[frozenset[tuple[Any, str]], dict[Any, str]] = {}
    misfits: list[SecondMomentError] = []
    for order in _orders(path, groups, model.module, list(parameters)):
        numbers = itertools.chain.from_iterable(group["params"] for group in groups)
        names = dict(zip(numbers, itertools.chain.from_iterable(order), strict=True))
        try:
            _check_fit(path, state, names, parameters)
        except SecondMomentError as error:
            misfits.append(error)
        else:
            # Orders that agree on the covered matrices give the same V.
            fitting.setdefault(frozenset(pair for pair in names.items() if pair[1] in covered), names)
    if not fitting:
        raise misfits[0]
    if len(fitting) > 1:
        raise SecondMomentError(
            f"{path}: its parameters are numbered, and {len(fitting)} orders of the model's fit their shapes; save the "
            "optimizer with named parameters (model.named_parameters()), so that the state holds param_names"
        )
    return next(iter(fitting.values()))


def _orders(
    path: Path, groups: Sequence[Mapping[str, Any]], module: nn.Module, every: list[str]
) -> Iterator[list[list[str]]]:
    """Each way to name the groups' parameters that has the right number of names in each group.

    Args:
        path: The file, for messages.
        groups: The groups of the file.
        module: The model.
        every: Names of the parameters that its optimizer moves, in the model's order.
    """
    sizes = [len(group["params"]) for group in groups]
    numbers = list(itertools.chain.from_iterable(group["params"] for group in groups))
    if any(not isinstance(number, (int, str)) for number in numbers) or len(set(numbers)) != len(numbers):
        raise SecondMomentError(
            f"{path}: its param_groups do not name each parameter once; expected a number or name for each"
        )
    in_file = [group.get("param_names") for group in groups]
    if all(isinstance(number, str) for number in numbers):
        in_file = [group["params"] for group in groups]
    if all(isinstance(names, list) and len(names) == size for names, size in zip(in_file, sizes, strict=True)):
        named = [[_WRAPPERS.sub("", str(name)) for name in names or ()] for names in in_file]
        if len(set(itertools.chain.from_iterable(named))) != len(numbers):
            raise SecondMomentError(f"{path}: its param_names name one parameter twice; expected each once")
        yield named
        return
    candidates = [[every]] if len(groups) == 1 else list(_decay_orders(module, every))
    fitting = [order for order in candidates if [len(names) for names in order] == sizes]
    if not fitting:
        expected = " or ".join(dict.fromkeys("+".join(str(len(names)) for names in order) for order in candidates))
        raise SecondMomentError(
            f"{path}: holds {'+'.join(map(str, sizes))} numbered parameters, expected {expected} for "
            f"{type(module).__name__}; it belongs to another model; save the optimizer with named parameters, or "
            'pass `second_moment="estimate"`'
        )
    yield from fitting


def _decay_orders(module: nn.Module, every: list[str]) -> Iterator[list[list[str]]]:
    """Usual groups with and without weight decay: the Trainer's (up to version 5), or matrices and
    vectors.
    """
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
    """Raise if a parameter is none of the model's, or a tensor does not have its parameter's shape."""
    for number, of_parameter in state.items():
        name = names.get(number, str(number))
        if name not in parameters:
            raise SecondMomentError(
                f"{path}: holds state of {_short(name)}, which is no parameter of the model; it belongs to another "
                "model"
            )
        for key, value in of_parameter.items():
            if isinstance(value, Tensor) and value.ndim:
                what = f"{path}: {key} of parameter {_short(number)}, {name},"
                if value.layout != torch.strided or not value.is_floating_point() or value.is_meta:
                    format_ = f"{value.layout} of {value.dtype}{', without values' if value.is_meta else ''}"
                    raise SecondMomentError(f"{what} is {format_}; expected floating point")
                _check_shape(what, str(key), tuple(value.shape), tuple(parameters[name].shape))
            elif key in _TENSORS:
                raise SecondMomentError(
                    f"{path}: {key} of parameter {_short(number)}, {name}, is {type(value).__name__} without "
                    "dimensions; expected a tensor"
                )


def _check_shape(what: str, state: str, shape: tuple[int, ...], parameter_shape: tuple[int, ...]) -> None:
    """Raise if a state's tensor has another shape than its parameter implies; unknown states have any."""
    expected = {
        "exp_avg": parameter_shape,
        "exp_avg_sq": parameter_shape,
        "max_exp_avg_sq": parameter_shape,
        "variance": parameter_shape,
        "exp_avg_sq_row": parameter_shape[:-1],
        "exp_avg_sq_col": (*parameter_shape[:-2], *parameter_shape[-1:]),
        "row_var": (*parameter_shape[:-1], 1),
        "col_var": (*parameter_shape[:-2], 1, *parameter_shape[-1:]),
    }.get(state)
    if expected is not None and shape != expected:
        raise SecondMomentError(
            f"{what} has shape {shape}, expected {expected} for a parameter of shape {parameter_shape}; it belongs to "
            "another model"
        )


def listed(keys: Mapping[Any, object], most: int = 6) -> str:
    """The first keys, for a message."""
    return ", ".join(_short(key) for key in list(keys)[:most]) + (" ..." if len(keys) > most else "") or "nothing"


def _short(name: object) -> str:
    """A name from a file, for a message."""
    return shortened(str(name), 80)
