"""GPUs that are simulated on the CPU, with values: mistakes that only a GPU shows are found without one.

A tensor on a simulated device computes on the CPU, and like a real one refuses what a GPU refuses: an
operation on tensors of two devices, `numpy()`, and on `mps` any float64. `FakeTensorMode` finds the
first as well, but has no values, so that nothing that depends on them can run in it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
_WITHOUT = (torch.float64, torch.complex128)


class Simulated(torch.Tensor):
    """A tensor on a simulated device; its values lie in `inner`, on the CPU, where torch's core sees it."""

    inner: Any
    place: torch.device

    @staticmethod
    def __new__(cls, inner: Tensor, place: torch.device) -> "Simulated":
        if place.type == "mps" and inner.dtype in _WITHOUT:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        made = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=CPU, requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        made.place = place if place.index is not None else torch.device(place.type, 0)
        return made

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.place

    @property
    def is_cuda(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.place.type == "cuda"

    def __repr__(self, **_: Any) -> str:
        return f"Simulated({self.inner!r}, {self.place})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy; use Tensor.cpu()")

    def tolist(self) -> Any:
        return self.inner.tolist()

    def to(self, *arguments: Any, **options: Any) -> Any:
        return _moved(self, *_asked(arguments, options))

    def cpu(self, *_: Any, **__: Any) -> Any:
        return _moved(self, CPU, None)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def on(tensor: Tensor, place: torch.device) -> Tensor:
    """A copy of a tensor on a simulated device, or on the CPU."""
    values = tensor.inner if isinstance(tensor, Simulated) else tensor.detach()
    return values.clone() if place == CPU else Simulated(values.clone(), place)


class _Move(torch.autograd.Function):
    """Move a tensor; its gradient moves back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, place: torch.device) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.place = tensor.device
        return on(tensor, place)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return on(gradient, ctx.place), None


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation, on the device of its tensors or the one that it names."""
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    place = _place_of(func, args, kwargs, tensors)
    if place.type == "meta":  # a model without values, as Transformers makes before it reads weights
        return func(*args, **kwargs)
    args, kwargs = tree_map(lambda one: one.inner if isinstance(one, Simulated) else one, (args, kwargs))
    result = func(*args, **({**kwargs, "device": CPU} if kwargs.get("device") is not None else kwargs))
    if place == CPU:
        return result
    known = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, Simulated)}

    def placed(one: Any) -> Any:
        return known.get(id(one)) if id(one) in known else Simulated(one, place) if isinstance(one, Tensor) else one

    return tree_map(placed, result)


def _place_of(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> torch.device:
    """The device of an operation's result.

    Raises:
        RuntimeError: Its tensors are on several devices.
    """
    name = func.__name__
    if name.startswith("copy_"):
        return args[0].device
    places = {tensor.device for tensor in tensors if tensor.ndim or isinstance(tensor, Simulated)}
    if name.startswith(("index.", "index_put", "_index_put", "_unsafe_index")):
        places = places - {CPU} or places  # a GPU's tensor may be indexed by one on the CPU
    if len(places) > 1:
        found = ", ".join(sorted(map(str, places)))
        raise RuntimeError(f"Expected all tensors to be on the same device, found {found} in {func}")
    named = kwargs.get("device")
    if named is not None and not (places and torch.device(named) == CPU):
        return torch.device(named)
    return next(iter(places), CPU)


class _Dispatch(TorchDispatchMode):
    """Sends operations that create tensors on a simulated device to `computed`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """Moves tensors of the CPU to simulated devices so that their gradients move back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and not isinstance(args[0], Simulated):
            place, dtype = _asked(args[1:], kwargs or {})
            if place is not None and place.type in ("cuda", "mps"):
                return _moved(args[0], place, dtype)
        if func is torch.tensor and kwargs and torch.device(kwargs.get("device") or CPU).type in ("cuda", "mps"):
            return on(func(*args, **{**kwargs, "device": CPU}), torch.device(kwargs["device"]))
        return func(*args, **(kwargs or {}))


def _asked(arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the dtype that a call of `Tensor.to` names."""
    if arguments and isinstance(arguments[0], Tensor):
        return arguments[0].device, arguments[0].dtype
    options = {name: value for name, value in options.items() if name != "copy"}
    place, dtype = torch._C._nn._parse_to(*arguments, **options)[:2]  # pyright: ignore[reportAttributeAccessIssue]
    return (torch.device(place.type, 0) if place is not None and place != CPU and place.index is None else place), dtype


def _moved(tensor: Tensor, place: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    if dtype is not None and dtype is not tensor.dtype:
        tensor = torch.ops.aten._to_copy.default(tensor, dtype=dtype)
    return tensor if place is None or place == tensor.device else _Move.apply(tensor, place)  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def simulated(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, mps: bool = False) -> Iterator[None]:
    """This machine with so many CUDA GPUs of 8 GiB, or with an Apple GPU."""
    properties = type("Properties", (), {"name": "Simulated GPU", "total_memory": 8 << 30})()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        patch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (8 << 30, 8 << 30))
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.backends.mps, "is_available", lambda: mps)
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            with _Dispatch(), _Moves():
                yield
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swaps)
