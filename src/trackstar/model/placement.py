"""Move a loaded model to its device, or spread its layers over several GPUs with Accelerate."""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trackstar.choices import DeviceMap
from trackstar.errors import ModelError, OptionError
from trackstar.model.batching import is_out_of_memory
from trackstar.model.devices import described_device, resolved_device
from trackstar.text import abridged, first_line, one_line

# Share of a GPU's free memory that weights may take; gradients need the rest.
_FOR_WEIGHTS = 0.8

Map = DeviceMap | Mapping[str, torch.device]
"""A rule, or the device of each named part of a model."""


def place(module: nn.Module, target: torch.device | Map, name: str) -> None:
    """Move a model to a device, or spread it over several.

    Args:
        module: The model, in main memory.
        target: The device, or the map of its parts.
        name: Its name in messages.

    Raises:
        ModelError: The memory of the device, or of all GPUs together, does not suffice.
        OptionError: The map cannot be used, or Accelerate is not installed.
    """
    if isinstance(target, str) and torch.cuda.device_count() < 2:
        check_accelerate()
        target = resolved_device()
    if not isinstance(target, torch.device):
        _spread(module, target, name)
        return
    try:
        nn.Module.to(module, target)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{name}: does not fit on {described_device(target)} ({first_line(error, 200)}); expected room for its "
            'weights; pass `dtype="bfloat16"`, `device="cpu"`, or with several GPUs `device_map="auto"`'
        ) from None


def check_accelerate() -> None:
    """Raise if Accelerate is not installed.

    Raises:
        OptionError: It is not.
    """
    if importlib.util.find_spec("accelerate") is None:
        raise OptionError(
            "`device_map`: needs Accelerate, which is not installed; pip install 'trackstar-tda[device-map]'"
        )


def _spread(module: nn.Module, target: Map, name: str) -> None:
    check_accelerate()
    accelerate: Any = importlib.import_module("accelerate")
    places = _inferred(module, target, name) if isinstance(target, str) else _accepted(module, target)
    accelerate.dispatch_model(module, places)


def _inferred(module: nn.Module, rule: DeviceMap, name: str) -> dict[str, str]:
    """A map over all GPUs that splits no layer, as Accelerate finds it."""
    accelerate: Any = importlib.import_module("accelerate")
    unsplit = list(getattr(module, "_no_split_modules", None) or [])
    gpus = range(torch.cuda.device_count())
    memory: dict[Any, int] = {gpu: int(_FOR_WEIGHTS * torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus}
    if rule == "auto":
        memory = accelerate.utils.get_balanced_memory(module, max_memory=memory, no_split_module_classes=unsplit)
    memory["cpu"] = sum(tensor.nbytes for tensor in module.parameters())  # for what no GPU has room for
    places = accelerate.infer_auto_device_map(module, max_memory=memory, no_split_module_classes=unsplit)
    if not all(isinstance(place, int) for place in places.values()):
        raise ModelError(
            f"{name}: does not fit on this machine's {torch.cuda.device_count()} GPUs; expected room for all of its "
            'weights; pass `dtype="bfloat16"`, or use more GPUs'
        )
    return {part: f"cuda:{place}" for part, place in places.items()}


def _accepted(module: nn.Module, given: Mapping[str, torch.device]) -> dict[str, str]:
    """A map that the user has given, with the devices' names.

    Raises:
        OptionError: It names a part that the model lacks, leaves a parameter out, or mixes the CPU with
            GPUs, as then Accelerate would move weights for each product.
    """
    parts = {name for name, _ in (*module.named_modules(), *module.named_parameters())}
    unknown = sorted(given.keys() - parts)
    if unknown:
        raise OptionError(
            f"`device_map`: expected names of the model's modules, such as {next(iter(sorted(parts - {''})))}, found "
            f"{abridged(unknown[0])}"
        )
    for name, _ in module.named_parameters():
        if not any(part in ("", name) or name.startswith(f"{part}.") for part in given):
            raise OptionError(f"`device_map`: expected a device for every parameter, found none for {one_line(name)}")
    kinds = {device.type for device in given.values()}
    if len(kinds) > 1:
        raise OptionError(
            f"`device_map`: expected devices of one kind, found {' and '.join(sorted(kinds))}; name GPUs alone, or "
            "leave it out and pass `device`"
        )
    return {name: str(device) for name, device in given.items()}
