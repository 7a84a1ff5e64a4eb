"""Low-bit codes: packed as specified, unbiased, with the theoretical error for normal numbers."""

import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from trackstar.errors import OptionError
from trackstar.store.quantization import Bits, dequantize, levels, quantize

# Squared error of the best codes of a unit normal number (Max 1960, table I): 1, 2 and 4 bits.
MAX_1960: dict[Bits, float] = {1: 0.3634, 2: 0.1175, 4: 0.009497}
ALL: list[Bits] = [1, 2, 4, 8]


def normal(rows: int, blocks: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, blocks, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", ALL)
def test_codes_have_the_specified_size(bits: Bits):
    codes, factors = quantize(normal(3, 2, 64), bits)
    assert codes.shape == (3, 128 * bits // 8)
    assert factors.shape == (3, 2)


def test_levels_are_those_of_max_1960():
    assert levels(2).tolist() == pytest.approx([-1.5104, -0.4528, 0.4528, 1.5104], abs=2e-3)
    # Rounded to 46ths.
    assert levels(4)[8:].tolist() == pytest.approx(
        [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0691, 2.7326], abs=0.5 / 46
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_error_is_that_of_the_best_code_for_a_normal_number(bits: Bits):
    u = normal(200, 1, 4096)
    codes, factors = quantize(u, bits)
    c = dequantize(codes, factors, bits)
    least_squares = (c * u).sum(2, keepdim=True) / c.square().sum(2, keepdim=True)
    error = float((c * least_squares - u).square().mean())
    assert error == pytest.approx(MAX_1960[bits], rel=0.02)


def test_packing_is_low_bits_first():
    u = torch.tensor([[[1.0, -1, -1, -1, 1, 1, -1, 1]]])
    codes, _ = quantize(u, 1)
    assert codes.tolist() == [[0b10110001]]
    table = levels(2) / levels(2).square().mean().sqrt()
    codes, _ = quantize(table[[0, 1, 2, 3, 3, 2, 1, 0]].reshape(1, 1, 8), 2)
    assert codes.tolist() == [[0b11_10_01_00, 0b00_01_10_11]]


@pytest.mark.parametrize("bits", ALL)
@hypothesis.given(scale=st.floats(1e-12, 1e12), seed=st.integers(0, 1000))
def test_codes_do_not_depend_on_scale_and_factors_follow_it(bits: Bits, scale: float, seed: int):
    scale = 2.0 ** round(math.log2(scale))
    u = normal(2, 2, 16, seed)
    codes, factors = quantize(u, bits)
    scaled_codes, scaled_factors = quantize(u * scale, bits)
    assert torch.equal(codes, scaled_codes)
    torch.testing.assert_close(scaled_factors, factors * scale, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", ALL)
def test_a_rows_product_with_itself_is_exact(bits: Bits):
    u = normal(20, 4, 64)
    codes, factors = quantize(u, bits)
    found = (dequantize(codes, factors, bits) * u).sum(dim=2)
    torch.testing.assert_close(found, u.square().sum(dim=2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", ALL)
def test_inner_products_are_unbiased(bits: Bits):
    """For pairs with a given cosine in random directions, the mean estimate is the true product."""
    generator = torch.Generator().manual_seed(3)
    u, rest = torch.randn(2, 4000, 1, 256, generator=generator)
    q = 0.5 * u + math.sqrt(0.75) * rest
    codes, factors = quantize(u, bits)
    estimates = (dequantize(codes, factors, bits) * q).sum(dim=(1, 2))
    difference = (estimates - (u * q).sum(dim=(1, 2))).double()
    standard_error = float(difference.std()) / math.sqrt(len(difference))
    assert abs(float(difference.mean())) < 4 * standard_error
    assert 4 * standard_error < 0.02 * 0.5 * 256


@pytest.mark.parametrize("bits", ALL)
def test_zero_blocks_stay_zero(bits: Bits):
    u = normal(2, 2, 16)
    u[0, 1] = 0
    codes, factors = quantize(u, bits)
    assert factors[0, 1] == 0
    assert not dequantize(codes, factors, bits)[0, 1].any()
    assert torch.isfinite(factors).all()


def test_blocks_that_do_not_fill_bytes_are_refused():
    with pytest.raises(
        OptionError, match="`side`: expected a multiple of 8 for low-bit codecs, found blocks of 9 dimensions"
    ):
        quantize(normal(1, 1, 9), 1)


def test_dequantized_values_are_the_levels_times_the_factor():
    u = normal(5, 3, 32)
    for bits in ALL:
        codes, factors = quantize(u, bits)
        values = dequantize(codes, factors, bits) / factors[:, :, None]
        table = levels(bits).numpy()
        nearest = np.abs(values.numpy().reshape(-1, 1) - table).min(axis=1)
        assert nearest.max() < 1e-4 * np.abs(table).max()
