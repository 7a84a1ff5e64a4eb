"""Devices: the one that a name stands for, the best of this machine, and the one that has float64.

`auto` is the first of cuda, mps and cpu that works here. It is resolved before anything is computed, so
that what is recorded and cached names the device itself. A computation in float64 runs on the CPU if
its device has no such numbers, and a note says so once per process.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trackstar.choices import DEVICE_MAPS, DeviceMap
from trackstar.errors import OptionError
from trackstar.progress import note as print_note
from trackstar.text import abridged, first_line

AUTO = "auto"
"""The name of the best device."""

_WITHOUT_FLOAT64 = ("mps",)
_FAULTS = (RuntimeError, AssertionError, TypeError)


def resolved_device(device: str | torch.device = AUTO) -> torch.device:
    """The device of that name, with its number; `auto` is the best that works.

    Raises:
        OptionError: This machine does not have it, or cannot compute on it.
    """
    if device == AUTO:
        return _best_device()
    try:
        return _tried(device)
    except _FAULTS as error:
        raise OptionError(
            f"`device`: expected auto, cpu or an available cuda or mps device, found {abridged(device)} "
            f"({first_line(error, 400)})"
        ) from None


def _best_device() -> torch.device:
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    for name, is_available in available.items():
        if is_available():
            try:
                return _tried(name)
            except _FAULTS as error:
                print_note(f"device: {name} cannot be used ({first_line(error, 400)})")
    return torch.device("cpu")


def _tried(device: str | torch.device) -> torch.device:
    """The device, after one addition on it: a GPU that torch has no kernels for fails only then."""
    target = torch.device(device)
    if target.type == "meta":
        raise RuntimeError("which holds no numbers")
    return (torch.zeros(1, device=target) + 1).device


def described_device(device: torch.device) -> str:
    """Name, model and memory of a device, for a note."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}, {properties.name} with {properties.total_memory / 2**30:,.1f} GiB"
    if device.type == "mps":
        return f"{device}, which shares the machine's {_main_memory() / 2**30:,.1f} GiB"
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' if threads > 1 else ''} and {_main_memory() / 2**30:,.1f} GiB"


def announced_device(device: str, device_map: object, note: Callable[[str], None], *, has_workers: bool = False) -> str:
    """The name to load a model on `device` with; a note describes the device unless the user named it.

    Args:
        device: The user's device.
        device_map: The user's device map.
        note: Callback that receives the note.
        has_workers: Whether the work can be distributed to workers, which the note then mentions.

    Raises:
        OptionError: The device is not available.
    """
    if device != AUTO:
        return device
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device_map is not None and gpus > 1:
        note(f"device: one model spread over {gpus} GPUs")
        return AUTO
    found = resolved_device()
    more = ""
    if device_map is not None:
        more = f"; `device_map` needs two GPUs or more, found {gpus}"
    elif found.type == "cuda" and gpus > 1:
        workers = ', `address="local"` runs a process on each' if has_workers else ""
        more = f'; of {gpus} GPUs one is used: `device_map="auto"` spreads the model over all{workers}'
    note(f"device: {described_device(found)}{more}")
    return AUTO if device_map is not None else str(found)


def _main_memory() -> int:
    import psutil

    return psutil.virtual_memory().total


def float64_device(device: torch.device | str) -> torch.device:
    """The device itself, or the CPU if the device has no float64, which a note then says once."""
    target = torch.device(device)
    if target.type not in _WITHOUT_FLOAT64:
        return target
    _say_without_float64(target.type)
    return torch.device("cpu")


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on `float64_device` of its own."""
    device = float64_device(tensor.device)
    return tensor.to(device).double()


@functools.cache
def _say_without_float64(kind: str) -> None:
    print_note(f"device: {kind} has no float64, so sums and factorizations in it are computed on the cpu")


def checked_device_map(
    device_map: DeviceMap | Mapping[str, Any] | None, device: str
) -> DeviceMap | dict[str, torch.device] | None:
    """A device map, with its devices resolved; see `load_model`.

    Raises:
        OptionError: It is no known name and no table of modules and available devices, or a device is
            given, too.
    """
    if device_map is None:
        return None
    if device != AUTO:
        raise OptionError(
            f"`device_map`: found {abridged(device_map)} and the device {abridged(device)}, which contradict each "
            "other; give one of `device_map` and `device`"
        )
    if isinstance(device_map, Mapping):
        return {name: resolved_device(place) for name, place in device_map.items()}
    if device_map not in DEVICE_MAPS:
        raise OptionError(
            f"`device_map`: expected one of {', '.join(DEVICE_MAPS)}, or a device for each module, found "
            f"{abridged(device_map)}"
        )
    return device_map
