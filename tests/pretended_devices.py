"""Devices that this machine lacks, pretended on the CPU: tensors on two devices are found without a GPU.

A tensor on a pretended device has its numbers in main memory. As on a real one, an operation with tensors of two
devices raises, and so does reading a tensor's memory with NumPy. `FakeTensorMode` has the same rules, but no values
to branch on, and cannot index a tensor on cuda where torch is built without it. Here such code runs, and its results
can be compared with the CPU's.
"""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass
from torch.overrides import TorchFunctionMode

PRETENDED = ("cuda", "mps")
GPUS = 2
MEMORY = 16 << 30
_CPU = torch.device("cpu")
_MPS_LACKS = (torch.float64, torch.complex128)


class PretendedTensor(Tensor):
    """A tensor whose `device` is pretended; its numbers are in `held`, in main memory."""

    held: Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: Tensor, place: torch.device) -> "PretendedTensor":
        if place.type == "mps" and held.dtype in _MPS_LACKS:
            raise TypeError(
                f"Cannot convert a MPS Tensor to {held.dtype} dtype as the MPS framework doesn't support it"
            )
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]  # not in its stubs
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held, made.place = held, place
        return made

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.place

    @property
    def is_cuda(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.place.type == "cuda"

    @property
    def is_cpu(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendedTensor({self.held!r}, device={str(self.place)!r})"

    # With these two `nn.Module.to` keeps tied weights tied.
    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["held"], self.place

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], place: torch.device, *_: object) -> "PretendedTensor":
        return PretendedTensor(inner["held"], place)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with DisableTorchFunctionSubclass():
            return _called(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        writes = _writes(func)
        written = writes.of(args, kwargs)
        place = _common_place(func, args, kwargs, written)
        _check_generator(kwargs.get("generator"), place)
        found = _computed(func, _each(args, _held), _each(kwargs, _held))
        if writes.returned:
            return written[0] if len(written) == 1 else tuple(written)
        return found if place == _CPU else _each(found, lambda one: PretendedTensor(one, place))


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The value with its tensors changed, in whatever lists and mappings they are."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_each(one, change) for one in value])
    if isinstance(value, dict):
        return {name: _each(one, change) for name, one in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, PretendedTensor) else tensor


def _place(tensor: Tensor) -> torch.device:
    return tensor.place if isinstance(tensor, PretendedTensor) else tensor.device


@dataclasses.dataclass(frozen=True, slots=True)
class _Writes:
    """Which arguments an operation writes, by place and by name, and whether it returns them."""

    places: tuple[int, ...]
    names: tuple[str, ...]
    returned: bool

    def of(self, args: Any, kwargs: Any) -> list[Tensor]:
        if not self.places:
            return []
        given = [args[place] for place in self.places if place < len(args)]
        return [*_tensors(given), *_tensors([kwargs[name] for name in self.names if name in kwargs])]


@functools.cache
def _writes(func: Any) -> _Writes:
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"{func} changes a tensor's shape in place; pretended devices lack that")
    written = [(n, a.name) for n, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    returned = any(one.alias_info and one.alias_info.is_write for one in func._schema.returns)
    return _Writes(tuple(n for n, _ in written), tuple(name for _, name in written), returned)


_aten: Any = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._foreach_copy_.default}
_INDEXING = {
    _aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default,
    _aten._unsafe_index.Tensor,
}  # fmt: skip
_PRODUCTS = {_aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.mv.default, _aten.dot.default}


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    if func in _PRODUCTS and not args[0].is_floating_point():  # the CPU multiplies whole numbers, GPUs do not
        raise RuntimeError(f'"{func}" not implemented for {args[0].dtype}')
    if func is _aten.histc.default and not args[0].is_floating_point():  # GPUs count whole numbers, the CPU does not
        return func(args[0].double(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _common_place(func: Any, args: Any, kwargs: Any, written: list[Tensor]) -> torch.device:
    """Device of an operation's result.

    Raises:
        RuntimeError: Its tensors are on two devices. A number that is a tensor on the CPU may meet any tensor
            that it is not written to, and indices on the CPU may index any tensor.
    """
    if func in _COPIES:
        return _place(written[0])
    if func in _INDEXING:
        args = (args[0], [index for index in args[1] if index is not None and _place(index) != _CPU], *args[2:])
    tensors = list(_tensors((args, kwargs)))
    sized = [one for one in tensors if one.dim() or _place(one) != _CPU]
    place = _place((written or sized or tensors)[0])
    for one in tensors:
        number = _place(one) == _CPU and not one.dim() and not any(one is other for other in written)
        if _place(one) != place and not number:
            _refuse(func, place, _place(one))
    return place


def _refuse(func: object, first: torch.device, second: torch.device) -> NoReturn:
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {first} and {second}! ({func})"
    )


def _check_generator(generator: torch.Generator | None, place: torch.device) -> None:
    if generator is not None and generator.device.type != place.type:
        raise RuntimeError(f"Expected a '{place.type}' device type for generator but found '{generator.device.type}'")


class _Move(torch.autograd.Function):
    """Copy to another device; the gradient is copied back."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, place: torch.device) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        context.place = _place(tensor)
        return _copied(tensor, place)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _copied(gradient, context.place), None


def _copied(tensor: Tensor, place: torch.device) -> Tensor:
    held = _held(tensor).detach().clone()
    return PretendedTensor(held, place) if place.type in PRETENDED else held.to(place)


def moved(tensor: Tensor, place: Any) -> Tensor:
    """The tensor on a device: itself, or a copy."""
    place = _with_number(place)
    return tensor if _place(tensor) == place else _Move.apply(tensor, place)  # pyright: ignore[reportReturnType]


def _with_number(place: Any) -> torch.device:
    place = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    if place.type in PRETENDED and place.index is None:
        return torch.device(place.type, 0)
    return place


def _called(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A function of torch, whose arguments may name a pretended device."""
    special = _SPECIAL.get(func)
    if special is not None:
        return special(*args, **kwargs)
    place = kwargs.get("device")
    if place is None:
        return func(*args, **kwargs)
    place = _with_number(place)
    if place.type not in PRETENDED and not any(isinstance(one, PretendedTensor) for one in _tensors(args)):
        return func(*args, **kwargs)
    _check_generator(kwargs.get("generator"), place)
    made = func(*args, **{name: value for name, value in kwargs.items() if name not in ("device", "requires_grad")})
    made = moved(made.detach(), place)
    return made.requires_grad_() if kwargs.get("requires_grad") else made


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to` with a device, a dtype, both or another tensor."""
    place, dtype = kwargs.get("device"), kwargs.get("dtype")
    for one in (*args, kwargs.get("other")):
        if isinstance(one, Tensor):
            place, dtype = _place(one), one.dtype
        elif isinstance(one, torch.dtype):
            dtype = one
        elif isinstance(one, (str, torch.device)) or type(one) is int:
            place = one
    if place is None:
        return Tensor.to(tensor, *args, **kwargs)
    converted = tensor if dtype is None else Tensor.to(tensor, dtype)  # on the device that it leaves
    result = moved(converted, place)
    return result.clone() if kwargs.get("copy") and result is tensor else result


def _numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    raise TypeError(
        f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
        "memory first."
    )


def _if_pretended(then: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return (then if isinstance(tensor, PretendedTensor) else otherwise)(tensor, *args, **kwargs)

    return call


def _backward(tensor: Tensor, gradient: Tensor | None = None, **options: Any) -> None:
    """`Tensor.backward`, whose hooks call functions of torch that are looked at in turn."""
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    with _Pretending():
        torch.autograd.Variable._execution_engine.run_backward(  # pyright: ignore[reportAttributeAccessIssue]
            (tensor,), (gradient,), bool(options.get("retain_graph")), False, (), True, True
        )


_SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cpu: lambda tensor, *_: moved(tensor, "cpu"),
    Tensor.cuda: lambda tensor, place=0, *_, **__: moved(tensor, place),
    Tensor.numpy: _if_pretended(_numpy, Tensor.numpy),
    Tensor.__array__: _if_pretended(_numpy, Tensor.__array__),
    Tensor.tolist: _if_pretended(lambda tensor: tensor.held.tolist(), Tensor.tolist),
    Tensor.data_ptr: _if_pretended(lambda tensor: tensor.held.data_ptr(), Tensor.data_ptr),
    Tensor.untyped_storage: _if_pretended(lambda tensor: tensor.held.untyped_storage(), Tensor.untyped_storage),
    Tensor.backward: _backward,
    Tensor.pin_memory: lambda tensor, *_, **__: tensor,
}


class _Pretending(TorchFunctionMode):
    """Makes and moves tensors on pretended devices."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})


_PROPERTIES = types.SimpleNamespace(name="a pretended GPU", total_memory=MEMORY, major=9, minor=0)


@contextlib.contextmanager
def pretended_devices(gpus: int = GPUS, *, mps: bool = True) -> Iterator[None]:
    """A context in which this machine seems to have so many GPUs, `cuda:0` and so on, and `mps`."""
    with pytest.MonkeyPatch.context() as patch, _Pretending():
        patch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        patch.setattr(torch.backends.mps, "is_available", lambda: mps)
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: _PROPERTIES)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (_PROPERTIES.major, _PROPERTIES.minor))
        for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda *_: MEMORY // 2)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (MEMORY, MEMORY))
        for name in ("memory_allocated", "memory_reserved"):
            patch.setattr(torch.cuda, name, lambda *_: 0)
        yield


def assert_same_on(device: str, compute: Callable[[str], Any]) -> None:
    """Assert that `compute`, called with a device's name, returns on a pretended device what it does on the CPU."""
    expected = compute("cpu")
    with pretended_devices():
        found = compute(device)
    assert_same(found, expected)


def assert_same(found: Any, expected: Any) -> None:
    """Assert that values are equal, numbers but for rounding, and that tensors are on the CPU."""
    if isinstance(expected, Mapping):
        assert sorted(found) == sorted(expected)
        assert_same([found[key] for key in expected], list(expected.values()))
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, (Tensor, np.ndarray, float)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    elif dataclasses.is_dataclass(expected):
        fields = [field.name for field in dataclasses.fields(expected)]
        assert_same([getattr(found, name) for name in fields], [getattr(expected, name) for name in fields])
    else:
        assert found == expected
