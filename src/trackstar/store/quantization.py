"""Low-bit codes of whitened coordinates: b bits a dimension and one factor a layer block, inner products unbiased.

A row's block u (whitened, nearly normal and isotropic) is coded entry by entry: c = L[code] with levels L of unit
spacing for a unit normal entry, after division by the block's root mean square. An inner product with a query is

    ⟨u, q⟩ ≈ f ⟨c, q⟩,    f = ‖u‖² / ⟨c, u⟩

as in RaBitQ (Gao and Long, SIGMOD 2024) and its multi-bit form: c points in a direction near u's, and this f makes the
part of q along u count in full, so that over random directions of the rest the estimate is unbiased. (The factor of
least squares, ⟨c, u⟩/‖c‖², would shrink every score.) 1-bit codes are signs; 2 and 4 bits use the levels of Lloyd and
Max, which have the least squared error for a normal entry (Max 1960), rounded to 46ths (4 bits) or 53rds (2 bits), so
that integer instructions serve to multiply with them; 8 bits use equal steps up to the block's largest entry. Codes are
packed low bits first: the dimension 8k/b·i + j of a b-bit code is in byte i.
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
# Levels are whole numbers of one byte over this.
_LEVEL_UNITS: dict[Bits, int] = {1: 1, 2: 53, 4: 46, 8: 1}
_TINY = 1e-30


@functools.cache
def levels(bits: Bits) -> Float32[Tensor, "levels"]:
    """What the codes of a unit normal entry stand for, ascending; for 8 bits the whole numbers from -127 to 127.

    Lloyd's fixed point by its own condition, in float64: a level is the mean of the normal density between the middles
    to its neighbours.
    """
    if bits == 8:
        return torch.arange(-128, 128, dtype=torch.float32)
    if bits == 1:
        return torch.tensor([-1.0, 1.0])
    count = 2**bits
    found = np.array([_normal_quantile((k + 0.5) / count) for k in range(count)])
    for _ in range(2000):
        edges = np.concatenate([[-np.inf], (found[1:] + found[:-1]) / 2, [np.inf]])
        density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        mass = np.array([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
        found = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    symmetric = (found - found[::-1]) / 2
    unit = _LEVEL_UNITS[bits]
    return torch.from_numpy(np.rint(symmetric * unit) / unit).float()


def whole_levels(bits: Bits) -> tuple[Int8[Tensor, "levels"], int]:
    """The levels as whole numbers, and what they are to be divided by."""
    unit = _LEVEL_UNITS[bits]
    return (levels(bits).double() * unit).round().to(torch.int8), unit


def quantize(
    coordinates: Float[Tensor, "rows blocks dim"], bits: Bits
) -> tuple[UInt8[Tensor, "rows bytes"], Float32[Tensor, "rows blocks"]]:
    """Packed codes and factors of whitened coordinates.

    Args:
        coordinates: u of each row, block by block; dim is a multiple of 8.
        bits: A dimension's.

    Returns:
        Codes, blocks one after the other, and each block's factor f; 0 for a block that is zero.

    Raises:
        OptionError: The dimensions do not fill whole bytes.
    """
    rows, blocks, dim = coordinates.shape
    if dim % 8:
        raise OptionError(f"--side: blocks of {dim} dimensions, expected a multiple of 8 for codes of {bits} bits")
    u = coordinates.float()
    codes = _codes(u, bits)
    c = levels(bits).to(u.device)[codes.long()]
    # In float64, so that factors do not depend on the order in which a machine sums.
    squares, product = u.double().square().sum(dim=2), (c.double() * u).sum(dim=2)
    factors = torch.where(product > 0, squares / product.clamp_min(_TINY), 0.0).float()
    return _pack(codes.reshape(rows, blocks * dim), bits), factors


def dequantize(
    codes: UInt8[Tensor, "rows bytes"], factors: Float32[Tensor, "rows blocks"], bits: Bits
) -> Float32[Tensor, "rows blocks dim"]:
    """f·c of each row: its inner products with queries are the estimates."""
    unpacked = _unpack(codes, bits)
    c = levels(bits).to(codes.device)[unpacked.long()]
    return c.reshape(len(codes), factors.shape[1], -1) * factors[:, :, None]


def _codes(u: Float32[Tensor, "rows blocks dim"], bits: Bits) -> UInt8[Tensor, "rows blocks dim"]:
    if bits == 1:
        return (u >= 0).to(torch.uint8)
    if bits == 8:
        largest = u.abs().amax(dim=2, keepdim=True).clamp_min(_TINY)
        return ((u * (127 / largest)).round() + 128).to(torch.uint8)
    scaled = u / u.square().mean(dim=2, keepdim=True).sqrt().clamp_min(_TINY)
    table = levels(bits).to(u.device)
    return torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)


def _pack(codes: UInt8[Tensor, "rows dimensions"], bits: Bits) -> UInt8[Tensor, "rows bytes"]:
    if bits == 8:
        return codes
    parts = codes.reshape(len(codes), -1, 8 // bits)
    packed = torch.zeros(parts.shape[:2], dtype=torch.uint8, device=codes.device)
    for place in range(8 // bits):
        packed |= parts[:, :, place] << (bits * place)
    return packed


def _unpack(packed: UInt8[Tensor, "rows bytes"], bits: Bits) -> UInt8[Tensor, "rows dimensions"]:
    if bits == 8:
        return packed
    parts = [(packed >> (bits * place)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(parts, dim=2).reshape(len(packed), -1)


def _normal_quantile(share: float) -> float:
    return float(torch.special.ndtri(torch.tensor(share, dtype=torch.float64)))
