"""Inner products of low-bit codes with many queries, as matrix products of bytes per layer block.

The levels of every codec are integers from -128 to 127 times one unit. A query's block is rounded
to a 15-bit integer q = 128·high + low, with high and low in the same range:

    Σ code·q = 128 · Σ code·high + Σ code·low

So a block's inner products are one matrix product of bytes with two columns per query, summed in 32
bits without rounding. Processors since 2019 have instructions for it (VNNI, AMX), which are several
times as fast as the float32 product.
"""

import functools
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8, Int32
from llvmlite import binding
from torch import Tensor

from trackstar.retrieval.packed_kernels import compiled
from trackstar.retrieval.packed_scan import byte_words, in_parts
from trackstar.store import Bits, StoredRows
from trackstar.store.quantization import whole_levels

# Largest absolute value of a rounded query.
_MOST = 2**14 - 1
_ROWS = 2048
# The product pads its columns to a multiple of this; fewer columns would be slower.
_COLUMNS = 32


class ByteQueries:
    """Query vectors, rounded per block, for products with many rows of codes.

    Args:
        vectors: One vector per query, in the index's coordinates.
        blocks: Number of layer blocks.
        bits: Bits per dimension of the codes.
    """

    def __init__(self, vectors: Float[Tensor, "queries dimensions"], blocks: int, bits: Bits) -> None:
        self._bits: Bits = bits
        self._count = len(vectors)
        q = vectors.detach().cpu().float().reshape(len(vectors), blocks, -1)
        largest = q.abs().amax(dim=2, keepdim=True).clamp_min(1e-37)
        rounded = (q * (_MOST / largest)).round().to(torch.int16)
        self._units = (largest[:, :, 0].double() / (_MOST * whole_levels(bits)[1])).float().numpy()
        columns = -(-2 * len(vectors) // _COLUMNS) * _COLUMNS
        self._columns = torch.zeros(blocks, q.shape[2], columns, dtype=torch.int8)
        self._columns[:, :, : len(vectors)] = (rounded >> 7).permute(1, 2, 0)
        self._columns[:, :, len(vectors) : 2 * len(vectors)] = (rounded & 127).permute(1, 2, 0)
        # One buffer for a block's levels: allocating memory would cost as much as the product.
        self._levels = torch.empty(_ROWS, q.shape[2], dtype=torch.int8)

    def scores(self, stored: StoredRows) -> Float32[Tensor, "rows queries"]:
        """Inner products with the decoded rows, but for the rounding of the queries."""
        out = np.zeros((len(stored), self._count), dtype=np.float32)
        factors = stored.scales.numpy()
        codes = stored.codes.numpy().reshape(*factors.shape, -1)
        for first in range(0, len(stored), _ROWS):
            rows = slice(first, first + _ROWS)
            self._add_products(codes[rows], factors[rows], out[rows])
        return torch.from_numpy(out)

    def _add_products(self, codes: np.ndarray, factors: np.ndarray, out: np.ndarray) -> None:
        table, levels = byte_words(self._bits), self._levels[: len(codes)]
        words = levels.numpy().view(table.dtype)
        turn = _flip if self._bits == 8 else _look_up
        for block, columns in enumerate(self._columns):
            in_parts(len(codes), lambda rows, block=block: turn(codes[rows, block], table, words[rows]))
            products = _multiply(levels, columns).numpy()
            in_parts(
                len(codes),
                lambda rows, block=block, products=products: _add_halves(
                    products[rows], self._units[:, block], factors[rows, block], out[rows]
                ),
            )


def _multiply(left: Int8[Tensor, "rows dim"], right: Int8[Tensor, "dim columns"]) -> Int32[Tensor, "rows columns"]:
    return torch.ops.aten._int_mm(left, right)


@functools.cache
def byte_products_serve() -> bool:
    """Whether this machine multiplies bytes fast, and without overflow in sums of two 16-bit products."""
    features = binding.get_host_cpu_features()
    if not any(features.get(name) for name in ("avx512vnni", "avxvnni", "amx-int8")):
        return False
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(0, 2, (64, 512), generator=generator) * 255 - 128
    right = torch.randint(0, 2, (512, _COLUMNS), generator=generator) * 255 - 128
    try:
        product = _multiply(left.to(torch.int8), right.to(torch.int8))
    except (AttributeError, RuntimeError):  # torch lacks this product, at least on this machine
        return False
    return torch.equal(product.long(), left @ right)


@compiled
@no_type_check
def _look_up(codes, table, out):
    """out[row, i] = table[byte i of the row], the byte's levels side by side."""
    rows, width = codes.shape
    for row in range(rows):
        for i in range(width):
            out[row, i] = table[codes[row, i]]


@compiled
@no_type_check
def _flip(codes, table, out):
    """`_look_up` for one level per byte, code - 128, without the table: many bytes per instruction."""
    rows, width = codes.shape
    for row in range(rows):
        for i in range(width):
            out[row, i] = codes[row, i] ^ np.uint8(128)


@compiled
@no_type_check
def _add_halves(products, units, factors, out):
    """out[row, query] += (128·high + low)·unit·factor.

    Columns of `products`: high of each query, then low of each query, then padding.
    """
    rows, queries = out.shape
    for row in range(rows):
        factor = factors[row]
        for query in range(queries):
            high, low = np.float32(products[row, query]), np.float32(products[row, queries + query])
            out[row, query] += (np.float32(128) * high + low) * (units[query] * factor)
