"""Low-bit codes of whitened coordinates: b bits per dimension, one factor per layer block.

A row's block u is whitened, so its entries are nearly normal and isotropic. Each entry is replaced
by one of 2^b levels L: c_i = L[code_i]. The inner product with a query q is

    ⟨u, q⟩ ≈ f ⟨c, q⟩,    f = ‖u‖² / ⟨c, u⟩

as in RaBitQ (Gao and Long, SIGMOD 2024) and its multi-bit form. The estimate is unbiased. To see
this, write q = α u + r with r orthogonal to u:

    f ⟨c, q⟩ = α f ⟨c, u⟩ + f ⟨c, r⟩ = α ‖u‖² + f ⟨c, r⟩ = ⟨u, q⟩ + f ⟨c, r⟩

The part of q along u counts in full, and the error f ⟨c, r⟩ has mean zero over random directions r.
(The least-squares factor, ⟨c, u⟩ / ‖c‖², would shrink every score.)

    bits    levels L
    1       -1 and 1: the signs of u
    2, 4    levels of least squared error for a unit normal entry (Lloyd and Max; Max 1960), after
            division of u by its root mean square; rounded to 53rds (2 bits) or 46ths (4 bits), so
            that integer instructions can multiply with them
    8       equal steps up to the block's largest entry

Codes are packed with the lowest bits first: byte i holds 8/b codes, from dimension (8/b)·i.
"""

import functools
import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor

from trackstar.errors import OptionError

Bits = Literal[1, 2, 4, 8]
_LEVEL_UNITS: dict[Bits, int] = {1: 1, 2: 53, 4: 46, 8: 1}
"""Denominator of the levels, whose numerators fit into one byte."""

_TINY = 1e-30


@functools.cache
def levels(bits: Bits) -> Float32[Tensor, "levels"]:
    """Level of each code of a unit normal entry, ascending; for 8 bits the whole numbers from -128 to 127.

    2 and 4 bits: Lloyd's fixed point in float64. Each level is the mean of the normal distribution
    between the midpoints to the neighbouring levels.
    """
    if bits == 8:
        return torch.arange(-128, 128, dtype=torch.float32)
    if bits == 1:
        return torch.tensor([-1.0, 1.0])
    count = 2**bits
    means = np.array([_normal_quantile((k + 0.5) / count) for k in range(count)])  # [levels]
    for _ in range(2000):
        edges = np.concatenate([[-np.inf], (means[1:] + means[:-1]) / 2, [np.inf]])  # [levels + 1]
        density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        mass = np.array([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
        # The mean of a normal x between a and b is (density(a) - density(b)) / (mass(b) - mass(a)).
        means = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])  # [levels]
    symmetric = (means - means[::-1]) / 2
    unit = _LEVEL_UNITS[bits]
    return torch.from_numpy(np.rint(symmetric * unit) / unit).float()


def whole_levels(bits: Bits) -> tuple[Int8[Tensor, "levels"], int]:
    """The levels' numerators and their common denominator."""
    unit = _LEVEL_UNITS[bits]
    return (levels(bits).double() * unit).round().to(torch.int8), unit


def quantize(
    coordinates: Float[Tensor, "rows blocks dim"], bits: Bits
) -> tuple[UInt8[Tensor, "rows bytes"], Float32[Tensor, "rows blocks"]]:
    """Encode whitened coordinates.

    Args:
        coordinates: u of each row, block by block; dim is a multiple of 8.
        bits: Bits per dimension.

    Returns:
        Packed codes, one block after the other, and the factor f of each block, which is 0 for a
        block of zeros.

    Raises:
        OptionError: The dimensions of a block do not fill whole bytes.
    """
    rows, blocks, dim = coordinates.shape
    if dim % 8:
        raise OptionError(f"`side`: expected a multiple of 8 for low-bit codecs, found blocks of {dim} dimensions")
    u = coordinates.float()
    codes = _codes(u, bits)
    c = levels(bits).to(u.device)[codes.long()]  # [rows, blocks, dim]
    # In float64, so that factors do not depend on the machine's order of summation.
    squares, product = u.double().square().sum(dim=2), (c.double() * u).sum(dim=2)  # ‖u‖², ⟨c, u⟩: [rows, blocks]
    factors = torch.where(product > 0, squares / product.clamp_min(_TINY), 0.0).float()
    return _pack(codes.reshape(rows, blocks * dim), bits), factors


def dequantize(
    codes: UInt8[Tensor, "rows bytes"], factors: Float32[Tensor, "rows blocks"], bits: Bits
) -> Float32[Tensor, "rows blocks dim"]:
    """f·c of each row; its inner products with queries estimate those of u."""
    unpacked = _unpack(codes, bits)
    c = levels(bits).to(codes.device)[unpacked.long()]  # [rows, blocks · dim]
    return c.reshape(len(codes), factors.shape[1], -1) * factors[:, :, None]


def _codes(u: Float32[Tensor, "rows blocks dim"], bits: Bits) -> UInt8[Tensor, "rows blocks dim"]:
    """The code of each entry, not packed: the index of the nearest level."""
    if bits == 1:
        return (u >= 0).to(torch.uint8)
    if bits == 8:
        largest = u.abs().amax(dim=2, keepdim=True).clamp_min(_TINY)
        return ((u * (127 / largest)).round() + 128).to(torch.uint8)
    scaled = u / u.square().mean(dim=2, keepdim=True).sqrt().clamp_min(_TINY)  # u / ρ
    table = levels(bits).to(u.device)
    return torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def _pack(codes: UInt8[Tensor, "rows dimensions"], bits: Bits) -> UInt8[Tensor, "rows bytes"]:
    if bits == 8:
        return codes
    parts = codes.reshape(len(codes), -1, 8 // bits)  # [rows, bytes, codes per byte]
    packed = torch.zeros(parts.shape[:2], dtype=torch.uint8, device=codes.device)
    for k in range(8 // bits):
        packed |= parts[:, :, k] << (bits * k)
    return packed


def _unpack(packed: UInt8[Tensor, "rows bytes"], bits: Bits) -> UInt8[Tensor, "rows dimensions"]:
    if bits == 8:
        return packed
    parts = [(packed >> (bits * k)) & (2**bits - 1) for k in range(8 // bits)]  # each [rows, bytes]
    return torch.stack(parts, dim=2).reshape(len(packed), -1)


def _normal_quantile(probability: float) -> float:
    return float(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)))
