"""Inner products of low-bit codes with a few queries, in integers, straight from the packed bytes.

A query's block is rounded to integers q (about 12 bits for int8 and 4-bit codes, 8 bits for 2-bit
and 1-bit codes). A row's block then costs integer instructions over the stored bytes, and no copy
of it is decoded. The levels of a codec are linear in small integers u from 0 on, or are looked up:

* int8: a level is code - 128, so Σ level·q = Σ code·q - 128·Σ q.
* 4-bit: the levels are integers times a unit.
* 2-bit and 1-bit: numerator of a level = s·u + a, so Σ level·q = s·(Σ u·q + a/s·Σ q) over the unit.

The relative rounding error of the query is small beside that of the codes: 10⁻³ against 10⁻² (int8)
and 10⁻¹ (4-bit), and 10⁻² against one third or more (2-bit, 1-bit). The kernels are in
`packed_kernels.py`. They release the interpreter's lock, and run on as many threads as torch has.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from trackstar.retrieval.packed_kernels import STEP_BYTES, add_products, arranged, compiled, levels_from_zero
from trackstar.store import Bits, StoredRows, quantized_bits
from trackstar.store.quantization import levels, whole_levels

_INT32_MAX = 2**31 - 1


@compiled
@no_type_check
def _decode(codes, table, factors, out):
    """out[row, block, byte, place] = table[code byte, place]·factor; codes [rows, blocks, bytes] u8."""
    rows, blocks, width = codes.shape
    for row in range(rows):
        for block in range(blocks):
            factor = factors[row, block]
            for i in range(width):
                values = table[codes[row, block, i]]
                for place in range(table.shape[1]):
                    out[row, block, i, place] = values[place] * factor


def decode_into(stored: StoredRows, out: Float32[Tensor, "rows dim"]) -> None:
    """Decode low-bit rows into existing memory, on as many threads as torch has."""
    bits = quantized_bits(stored.codec)
    assert bits is not None, stored.codec
    blocks = stored.scales.shape[1]
    codes, factors = stored.codes.numpy(), stored.scales.numpy()
    parts = codes.reshape(len(codes), blocks, -1)
    places = out.numpy().reshape(*parts.shape, 8 // bits)
    in_parts(len(codes), lambda rows: _decode(parts[rows], _byte_levels(bits), factors[rows], places[rows]))


class QuantizedQueries:
    """Query vectors, rounded per block, for products with a few rows of codes.

    Args:
        vectors: One vector per query, in the index's coordinates.
        blocks: Number of layer blocks.
        bits: Bits per dimension of the codes.
    """

    def __init__(self, vectors: Float[Tensor, "queries dimensions"], blocks: int, bits: Bits) -> None:
        self._bits = bits
        q = vectors.detach().cpu().double().numpy().reshape(len(vectors), blocks, -1)
        dim = q.shape[2]
        largest = np.maximum(np.abs(q).max(axis=2, keepdims=True), 1e-300)
        most = min(2**15 - 1, _INT32_MAX // (255 * dim)) if bits >= 4 else 2**7 - 1
        rounded = np.rint(q / largest * most).astype(np.int16 if bits >= 4 else np.int8)
        # units: value of 1 in the integer product; offsets: the integer product of a row of zero
        # codes, negated.
        self._units = largest[:, :, 0] / most
        self._offsets = np.zeros(self._units.shape)
        sums = rounded.sum(axis=2, dtype=np.int64)
        if bits == 8:
            self._offsets = 128.0 * sums
        elif bits == 4:
            self._units /= whole_levels(4)[1]
        else:
            _, step, lowest = levels_from_zero(bits)
            self._units *= step / whole_levels(bits)[1]
            self._offsets = -lowest / step * sums
        self._queries = arranged(rounded, bits)

    def scores(self, stored: StoredRows) -> Float32[Tensor, "rows queries"]:
        """Inner products with the decoded rows, but for the rounding of the queries."""
        out = np.zeros((len(stored), len(self._units)), dtype=np.float32)
        factors = stored.scales.numpy()
        codes = stored.codes.numpy().reshape(*factors.shape, -1)
        unfilled = -codes.shape[2] % STEP_BYTES
        if unfilled:  # a block of 64 or 576 dimensions may end within a step
            codes = np.pad(codes, ((0, 0), (0, 0), (0, unfilled)))
        in_parts(len(stored), lambda rows: self._add_products(codes[rows], factors[rows], out[rows]))
        return torch.from_numpy(out)

    def _add_products(self, codes: np.ndarray, factors: np.ndarray, out: np.ndarray) -> None:
        add_products(self._bits, codes, self._queries, self._offsets, self._units, factors, out)


@functools.cache
def byte_words(bits: Bits) -> np.ndarray:
    """Integer levels of the codes in each byte, low bits first, as one word of 8/bits bytes."""
    table, places = whole_levels(bits)[0].numpy(), np.arange(8 // bits)
    unpacked = table[(np.arange(256)[:, None] >> (bits * places)) & (2**bits - 1)]
    return np.ascontiguousarray(unpacked).view(f"u{8 // bits}")[:, 0]


@functools.cache
def _byte_levels(bits: Bits) -> np.ndarray:
    """Levels of the codes in each byte, low bits first."""
    table, steps = levels(bits).numpy(), np.arange(8 // bits)
    return table[(np.arange(256)[:, None] >> (bits * steps)) & (2**bits - 1)]


def in_parts(rows: int, run: Callable[[slice], None]) -> None:
    """Run a function over consecutive rows, in as many parts as torch has threads."""
    threads = max(1, min(torch.get_num_threads(), rows // 32))
    if threads == 1:
        run(slice(0, rows))
        return
    edges = [rows * thread // threads for thread in range(threads + 1)]
    list(_pool(threads).map(run, [slice(edges[thread], edges[thread + 1]) for thread in range(threads)]))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="scan")
