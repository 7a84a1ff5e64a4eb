"""Pretended devices find what they are for: tensors on two devices, as PyTorch and `FakeTensorMode` refuse them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pretended_devices import assert_same_on, pretended_devices
from trackstar.gradients import per_example
from trackstar.gradients.projection import ProjectedGradients
from trackstar.indexing.build import build_index
from trackstar.model.batching import make_batch
from trackstar.model.language_model import load_model
from trackstar.store import StoredRows

TEXTS = ["The capital of France is Paris.", "Gold is an element.", "People in Brazil speak Portuguese."]


def on_gpu(*shape: int) -> Tensor:
    return torch.ones(shape, device="cuda")


# Refused by PyTorch with a GPU and by `FakeTensorMode`.
MIXED: dict[str, Callable[[], object]] = {
    "product": lambda: on_gpu(3, 4) @ torch.ones(4),
    "sum": lambda: on_gpu(3) + torch.ones(3),
    "in place": lambda: torch.ones(3).add_(on_gpu(3)),
    "number on the GPU": lambda: torch.ones(3) * on_gpu(),
    "concatenation": lambda: torch.cat([on_gpu(3), torch.ones(3)]),
    "values": lambda: torch.zeros(3).index_add_(0, torch.zeros(2, dtype=torch.int64), on_gpu(2)),
    "lookup": lambda: nn.functional.embedding(torch.zeros(2, dtype=torch.int64), on_gpu(3, 4)),
    "two GPUs": lambda: torch.ones(3, device="cuda:0") + torch.ones(3, device="cuda:1"),
    "module": lambda: nn.Linear(3, 3).to("cuda")(torch.ones(2, 3)),
}
# Refused by PyTorch with a GPU, while `FakeTensorMode` lets it pass or has no values to read.
UNREADABLE: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "NumPy": (lambda: on_gpu(3).numpy(), TypeError, "can't convert cuda:0 device type tensor to numpy"),
    "array": (lambda: np.asarray(on_gpu(3)), TypeError, "can't convert cuda:0 device type tensor to numpy"),
    "index on the GPU": (
        lambda: torch.ones(3)[torch.zeros(1, dtype=torch.int64, device="cuda")], RuntimeError, "at least two devices",
    ),
    "number in place": (lambda: torch.ones(()).add_(on_gpu()), RuntimeError, "at least two devices"),
    "random numbers": (
        lambda: torch.randn(3, generator=torch.Generator(), device="cuda"), RuntimeError, "'cuda' device type for gen",
    ),
    "whole numbers": (
        lambda: torch.ones(2, 2, dtype=torch.int64, device="cuda") @ torch.ones(2, 2, dtype=torch.int64, device="cuda"),
        RuntimeError, "not implemented for torch.int64",
    ),
    "float64 on mps": (lambda: torch.zeros(3, device="mps").double(), TypeError, "MPS Tensor to torch.float64"),
}  # fmt: skip
ALLOWED: dict[str, Callable[[], Tensor]] = {
    "number on the CPU": lambda: on_gpu(3) * torch.tensor(2.0),
    "index on the CPU": lambda: on_gpu(3)[torch.tensor([0, 2])],
    "copy": lambda: on_gpu(3).copy_(torch.tensor([1.0, 2.0, 3.0])),
    "moved": lambda: torch.ones(3).to(on_gpu(1)) + on_gpu(3),
    "made like": lambda: torch.zeros_like(on_gpu(3)) + on_gpu(3).new_ones(3),
    "whole numbers counted": lambda: torch.histc(torch.zeros(3, dtype=torch.int32, device="cuda"), 2, 0, 1),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_on_two_devices_are_refused_as_by_fake_tensors(name: str):
    with FakeTensorMode(), pytest.raises(RuntimeError, match="device"):
        MIXED[name]()
    with pretended_devices(), pytest.raises(RuntimeError, match="at least two devices"):
        MIXED[name]()


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_a_device_cannot_do_is_refused(name: str):
    run, kind, message = UNREADABLE[name]
    with pretended_devices(), pytest.raises(kind, match=message):
        run()


@pytest.mark.parametrize("name", ALLOWED)
def test_what_pytorch_allows_stays_on_the_device(name: str):
    with pretended_devices():
        assert ALLOWED[name]().device == torch.device("cuda:0")


def test_gradients_pass_between_devices_and_have_their_tensors_device():
    with pretended_devices():
        first, second = torch.ones(3, requires_grad=True), torch.full((3,), 2.0, device="cuda", requires_grad=True)
        (first.to("cuda") * second).sum().backward()
        assert first.grad is not None
        assert second.grad is not None
        assert (first.grad.device.type, first.grad.tolist()) == ("cpu", [2.0] * 3)
        assert (second.grad.device.type, second.grad.tolist()) == ("cuda", [1.0] * 3)


def test_tied_weights_stay_tied_when_a_module_is_moved():
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    module[1].weight = module[0].weight
    with pretended_devices():
        module.to("cuda")
        assert module[0].weight is module[1].weight
        assert module[0].weight.device.type == "cuda"


def test_a_result_left_on_the_device_is_not_the_cpus():
    with pytest.raises(AssertionError, match="device"):
        assert_same_on("cuda", lambda device: torch.ones(3, device=device))


def without_a_move(planted: str, patch: pytest.MonkeyPatch) -> None:
    """Leave out one of the package's moves to or from the model's device."""
    if planted == "batch":
        patch.setattr(per_example, "make_batch", lambda examples, indices, **_: make_batch(examples, indices))
    elif planted == "projections":
        folded = ProjectedGradients._folded
        patch.setattr(ProjectedGradients, "_folded", lambda *given: [half.cpu() for half in folded(*given)])
    else:
        patch.setattr(StoredRows, "to", lambda rows, _device: rows)


@pytest.mark.parametrize("planted", ["batch", "projections", "rows"])
def test_a_fault_planted_in_the_package_is_found(
    planted: str, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    without_a_move(planted, monkeypatch)
    with pretended_devices():
        model = load_model(tiny_model_folder, device="cuda")
        with pytest.raises(RuntimeError, match="at least two devices"):
            build_index(model, TEXTS, tmp_path / "index", side=4, codec="float32", second_moment="none", progress=False)
