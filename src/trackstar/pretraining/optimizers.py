"""The optimizers of pretraining, their schedule, and their state as named tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers.optimization import Adafactor

from trackstar.errors import PretrainingError
from trackstar.pretraining.config import PretrainingConfig

ADAMW_GRADIENT_NORM = 1.0
"""Bound on the gradient's norm, for AdamW only: Adafactor clips its updates, to a root mean square of 1."""

_HYPERPARAMETERS = (
    "betas",
    "beta1",
    "decay_rate",
    "eps",
    "clip_threshold",
    "weight_decay",
    "scale_parameter",
    "relative_step",
)


def learning_rate(step: int, config: PretrainingConfig) -> float:
    """Learning rate of a step, counted from 1: base/√max(step, warmup), as in the paper's Table A.4 (T5X).

    It is constant for `warmup_steps`, then decreases with the inverse square root. Adafactor
    multiplies it by each weight matrix's root mean square. For AdamW, whose steps are not relative,
    it rises linearly during the warmup.
    """
    rate = config.base_learning_rate / max(step, config.warmup_steps) ** 0.5
    return rate * min(1.0, step / config.warmup_steps) if config.optimizer == "adamw" else rate


def make_optimizer(module: nn.Module, config: PretrainingConfig) -> Optimizer:
    """A new optimizer of all the model's parameters."""
    parameters = list(module.parameters())
    if config.optimizer == "adafactor":
        return Adafactor(
            parameters,
            lr=learning_rate(1, config),
            eps=(1e-30, 1e-3),
            clip_threshold=1.0,
            decay_rate=-0.8,
            beta1=None,
            weight_decay=0.0,
            scale_parameter=True,
            relative_step=False,
            warmup_init=False,
        )
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
    return AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=learning_rate(1, config),
        betas=(0.9, 0.95),
        eps=1e-8,
    )


def apply_gradients(module: nn.Module, optimizer: Optimizer, step: int, config: PretrainingConfig) -> None:
    """Make optimizer step number `step` with the parameters' gradients."""
    if config.optimizer == "adamw":
        nn.utils.clip_grad_norm_(module.parameters(), ADAMW_GRADIENT_NORM)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
    optimizer.step()


def optimizer_tensors(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors named `STATE/PARAMETER`; numbers become tensors without dimensions."""
    tensors = {}
    for name, parameter in module.named_parameters():
        for key, value in sorted(optimizer.state[parameter].items()):
            tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def optimizer_hyperparameters(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's class and its hyperparameters except the learning rate, as JSON represents them."""
    package = type(optimizer).__module__.partition(".")[0]
    hyperparameters: dict[str, Any] = {"optimizer": f"{package}.{type(optimizer).__name__}"}
    for key in _HYPERPARAMETERS:
        if key in optimizer.param_groups[0]:
            value = optimizer.param_groups[0][key]
            hyperparameters[key] = list(value) if isinstance(value, tuple) else value
    return hyperparameters


def restore_optimizer(module: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load the tensors of `optimizer_tensors` into a new optimizer.

    Raises:
        PretrainingError: The state belongs to another optimizer or model.
    """
    advice = "restore the file from a copy, or delete its folder to resume from the previous checkpoint"
    states: dict[str, dict[str, Any]] = {name: {} for name, _ in module.named_parameters()}
    for key, tensor in tensors.items():
        state, _, name = key.partition("/")
        if name not in states:
            raise PretrainingError(f"{source}: holds {key}, expected only parameters of the model; {advice}")
        states[name][state] = tensor
    whole_steps = isinstance(optimizer, Adafactor)
    for name, parameter in module.named_parameters():
        keys, expected = sorted(states[name]), sorted(_state_keys(optimizer, parameter))
        if keys != expected:
            raise PretrainingError(f"{source}: holds {keys} of {name}, expected {expected}; {advice}")
        # Copies, because memory from a file may have another alignment, and then sums have another order.
        optimizer.state[parameter] = {
            key: int(value) if key == "step" and whole_steps else value.to(_state_device(key, parameter)).clone()
            for key, value in states[name].items()
        }


def _state_device(key: str, parameter: Tensor) -> torch.device:
    """Device of a state: AdamW counts its steps on the CPU."""
    return torch.device("cpu") if key == "step" else parameter.device


def _state_keys(optimizer: Optimizer, parameter: Tensor) -> tuple[str, ...]:
    if isinstance(optimizer, AdamW):
        return ("step", "exp_avg", "exp_avg_sq")
    return ("step", "RMS", *(("exp_avg_sq_row", "exp_avg_sq_col") if parameter.ndim > 1 else ("exp_avg_sq",)))
