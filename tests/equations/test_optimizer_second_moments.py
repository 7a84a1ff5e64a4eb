"""V is what each optimizer itself divides the gradient by: one real step of it shows the number."""

import math

import pytest
import torch
from torch import Tensor, nn

import reference


def steps(
    optimizer: torch.optim.Optimizer, weight: nn.Parameter, *, seed: int = 0, count: int = 4
) -> tuple[Tensor, Tensor]:
    """A few steps with random gradients; the last step's gradient and how far it moved the weight."""
    draw = torch.Generator().manual_seed(seed)
    before = weight.detach().clone()
    for _ in range(count):
        before = weight.detach().clone()
        weight.grad = torch.randn(weight.shape, generator=draw, dtype=torch.float64) * 0.01
        optimizer.step()
    assert weight.grad is not None
    return weight.grad, before - weight.detach()


def fresh_weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_divides_by_the_root_of_its_bias_corrected_second_moment(optimizer_class: type[torch.optim.Adam]):
    weight = fresh_weight()
    optimizer = optimizer_class([weight], lr=1e-3, betas=(0.0, 0.95), eps=0.0, weight_decay=0.0)
    gradient, moved = steps(optimizer, weight)
    state = optimizer.state[weight]
    found = reference.adam_second_moment(state["exp_avg_sq"], int(state["step"]), 0.95)
    torch.testing.assert_close(found, (1e-3 * gradient / moved) ** 2)


def test_transformers_adafactor_divides_by_the_root_of_its_factored_second_moment():
    from transformers.optimization import Adafactor

    weight = fresh_weight()
    optimizer = Adafactor([weight], lr=1e-3, clip_threshold=1e9, scale_parameter=False, relative_step=False)
    gradient, moved = steps(optimizer, weight)
    state = optimizer.state[weight]
    found = reference.adafactor_second_moment(state["exp_avg_sq_row"], state["exp_avg_sq_col"])
    torch.testing.assert_close(found, (1e-3 * gradient / moved) ** 2)


@pytest.mark.parametrize("epsilon1", [1e-12, 1.0, 0.02], ids=["no clamp", "all clamped", "mean clamped"])
def test_torch_adafactor_divides_by_the_root_of_its_clamped_second_moment(epsilon1: float):
    weight = fresh_weight()
    optimizer = torch.optim.Adafactor([weight], lr=1e-3, eps=(epsilon1, 1e-3), d=1e9, weight_decay=0.0)
    rms = float(weight.detach().norm()) / math.sqrt(weight.numel())
    gradient, moved = steps(optimizer, weight, count=1)
    state = optimizer.state[weight]
    found = reference.torch_adafactor_second_moment(state["row_var"], state["col_var"], epsilon1=epsilon1)
    torch.testing.assert_close(found, (1e-3 * rms * gradient / moved) ** 2)
