"""How projected gradients become the numbers that a shard stores, and back.

A row φ is stored as codes c and one scale s, a power of two: φ ≈ c·s. Multiplying by a power of two is exact, so the
only rounding is that of the codec's own number format; and a row of any magnitude fits into it.
"""

import math
from typing import get_args

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from trackstar.errors import OptionError
from trackstar.store.manifest import CodecName

CODEC_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(CodecName)}

# The scale and its inverse are then both normal float32 numbers.
SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 126


def codec_dtype(codec: str) -> torch.dtype:
    """The dtype of a codec's codes.

    Raises:
        OptionError: There is no codec of that name.
    """
    if codec not in CODEC_DTYPES:
        raise OptionError(f"--codec {codec}: expected one of {', '.join(CODEC_DTYPES)}")
    return CODEC_DTYPES[codec]


def encode(
    projected_gradients: Float[Tensor, "rows dim"], codec: str
) -> tuple[Float[Tensor, "rows dim"], Float32[Tensor, "rows"]]:
    """Codes and scales of projected gradients.

    float32 is lossless: codes are the values, scales are 1. For bfloat16 and float16 the scale is the power of two
    nearest to the row's root mean square (1 where the row is zero), so that codes are of the order of 1: no row is too
    large or too small, and a code's relative error is at most 2^-9 (bfloat16) or 2^-11 (float16, for values above
    2^-14 of the row's root mean square; its absolute error below that is at most 2^-25 of it).

    Args:
        projected_gradients: φ, finite, on any device.
        codec: `float32`, `bfloat16` or `float16`.

    Returns:
        Codes [rows, dim] in the codec's dtype and scales [rows], on the same device.

    Raises:
        OptionError: There is no codec of that name.
    """
    dtype = codec_dtype(codec)
    values = projected_gradients.to(torch.float32)
    if dtype is torch.float32:
        return values, torch.ones(values.shape[0], device=values.device)
    exponents = _nearest_exponents(values)
    scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    inverses = torch.ldexp(torch.ones_like(scales), -exponents)
    return (values * inverses[:, None]).to(dtype), scales


def decode(codes: Float[Tensor, "rows dim"], scales: Float32[Tensor, "rows"]) -> Float32[Tensor, "rows dim"]:
    """Projected gradients φ = c·s, of the codes' device, always a new tensor."""
    return codes.to(torch.float32) * scales[:, None]


def _nearest_exponents(values: Float32[Tensor, "rows dim"]) -> Tensor:
    """Of each row the e for which 2^e is nearest, as a ratio, to the root mean square; 0 where the row is zero."""
    # In float64 the square of no float32 overflows or vanishes.
    norms = torch.linalg.vector_norm(values, dim=1, dtype=torch.float64)
    mantissas, exponents = torch.frexp(norms / math.sqrt(values.shape[1]))
    nearest = torch.where(mantissas < math.sqrt(0.5), exponents - 1, exponents)
    return torch.where(norms > 0, nearest.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT), 0)
