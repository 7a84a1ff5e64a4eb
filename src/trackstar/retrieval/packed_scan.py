"""Inner products of low-bit codes with a few queries, in integers, straight from the packed bytes.

A query's block is rounded to integers q (about 12 bits for int8 and 4-bit codes, 7 bits for 2-bit
and 1-bit codes). A row's block then costs integer instructions over the stored bytes, and no copy
of it is decoded:

* int8: a level is code - 128, so Σ level·q = Σ code·q - 128·Σ q, with codes widened to 16 bits.
* 4-bit: a table converts each byte to its two levels, which are integers times a unit.
* 2-bit and 1-bit: a level is linear in the code's bits. For the 2-bit levels -b, -a, a, b it is
  -b + (a+b)·high + (b-a)·low. With the places of q + 64 = Σ_p 2^p·q_p,
  Σ_i bit_i·q_i = Σ_p 2^p · popcount(code bits AND bits q_p) - 64 · popcount(code bits).

The relative rounding error of the query is small beside that of the codes: 10⁻³ against 10⁻² (int8)
and 10⁻¹ (4-bit), and 2·10⁻² against one third or more (2-bit, 1-bit). Numba compiles the kernels.
They release the interpreter's lock, and run on as many threads as torch has.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Float32
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from trackstar.store import Bits, StoredRows, quantized_bits
from trackstar.store.quantization import levels, whole_levels

# Most queries for which a scan of the bytes is faster than decoding them and a matrix product.
MOST_QUERIES: dict[Bits, int] = {8: 2, 4: 2, 2: 3, 1: 6}
# Binary places of a rounded query for 2-bit and 1-bit codes.
_PLANES = 7
_INT32_MAX = 2**31 - 1


@no_type_check
def compiled(kernel):
    """Compile a kernel at its first call. Machine code is cached beside the module, or for the user."""
    try:
        return numba.njit(nogil=True, cache=True)(kernel)
    except RuntimeError:  # neither folder is writable
        return numba.njit(nogil=True)(kernel)


@intrinsic
@no_type_check
def _popcount(typingctx, word):
    """Number of set bits of a 64-bit word, in one instruction that LLVM can vectorize."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


def _multiply_add(signed: bool):
    """total + code·q in 32 bits; Numba's own addition would widen integers to 64 bits."""

    @intrinsic
    @no_type_check
    def step(typingctx, total, code, q):
        def generate(context, builder, signature, arguments):
            total, code, q = arguments
            word = total.type
            wide = builder.sext(code, word) if signed else builder.zext(code, word)
            return builder.add(total, builder.mul(wide, builder.sext(q, word)))

        return types.int32(types.int32, types.int8 if signed else types.uint8, types.int16), generate

    return step


_add_unsigned, _add_signed = _multiply_add(False), _multiply_add(True)


@intrinsic
@no_type_check
def _prefetch(typingctx, address):
    """Prefetch the cache line at an address, which may be invalid."""

    def generate(context, builder, signature, arguments):
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        read, keep, data = (ir.Constant(number, value) for value in (0, 3, 1))
        builder.call(function, [builder.inttoptr(arguments[0], pointer), read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@compiled
@no_type_check
def _int8_products(codes, queries, offsets, units, factors, out):
    """out[row, query] += Σ_block factor·unit·(Σ code·q - offset), offset = 128·Σ q.

    Shapes: codes [rows, blocks, dim] u8, queries [queries, blocks, dim] i16, offsets and units
    [queries, blocks], factors [rows, blocks]. Eight rows are multiplied at a time, and the next
    block of each is prefetched: a single stream of addresses, which stops at every page, uses half
    of the memory's bandwidth.
    """
    rows, blocks, dim = codes.shape
    start = codes.ctypes.data
    whole = rows // 8 * 8
    for row in range(0, whole, 8):
        for block in range(blocks):
            for near in range(8):
                for line in range(8):
                    _prefetch(start + ((row + near) * blocks + block + 1) * dim + 64 * line)
            p0, p1, p2, p3 = codes[row, block], codes[row + 1, block], codes[row + 2, block], codes[row + 3, block]
            p4, p5, p6, p7 = codes[row + 4, block], codes[row + 5, block], codes[row + 6, block], codes[row + 7, block]
            for query in range(queries.shape[0]):
                q = queries[query, block]
                t0 = t1 = t2 = t3 = t4 = t5 = t6 = t7 = np.int32(0)
                for i in range(dim):
                    t0 = _add_unsigned(t0, p0[i], q[i])
                    t1 = _add_unsigned(t1, p1[i], q[i])
                    t2 = _add_unsigned(t2, p2[i], q[i])
                    t3 = _add_unsigned(t3, p3[i], q[i])
                    t4 = _add_unsigned(t4, p4[i], q[i])
                    t5 = _add_unsigned(t5, p5[i], q[i])
                    t6 = _add_unsigned(t6, p6[i], q[i])
                    t7 = _add_unsigned(t7, p7[i], q[i])
                offset, unit = offsets[query, block], units[query, block]
                for near, total in enumerate((t0, t1, t2, t3, t4, t5, t6, t7)):
                    out[row + near, query] += (total - offset) * unit * factors[row + near, block]
    for row in range(whole, rows):
        for block in range(blocks):
            part = codes[row, block]
            for query in range(queries.shape[0]):
                q = queries[query, block]
                total = np.int32(0)
                for i in range(dim):
                    total = _add_unsigned(total, part[i], q[i])
                out[row, query] += (total - offsets[query, block]) * units[query, block] * factors[row, block]


@compiled
@no_type_check
def _table_products(codes, table, queries, units, factors, out):
    """`_int8_products` for 4-bit codes [rows, blocks, dim/2].

    `table` maps a byte to its two levels, as one 16-bit word.
    """
    rows, blocks, width = codes.shape
    words = np.empty(width, np.uint16)
    decoded = words.view(np.int8)
    for row in range(rows):
        for block in range(blocks):
            for i in range(width):
                words[i] = table[codes[row, block, i]]
            for query in range(queries.shape[0]):
                q = queries[query, block]
                total = np.int32(0)
                for i in range(2 * width):
                    total = _add_signed(total, decoded[i], q[i])
                out[row, query] += total * units[query, block] * factors[row, block]


@compiled
@no_type_check
def _plane_products(codes, planes, ones, steps, offsets, units, factors, out):
    """out[row, query] += Σ_block factor·unit·(Σ_bit step·(Σ_i bit_i·q_i) - offset).

    Σ_i bit_i·q_i = Σ_p 2^p·popcount(bits AND plane_p) - 64·popcount(bits), over the seven binary
    places p of q + 64.

    Shapes: codes [rows, blocks, words] u64; planes [queries, blocks, bits, 7, words] u64; ones
    [bits] u64, the places of each code bit in a word. Two rows are multiplied at a time, since the
    planes do not fit into the smallest cache.
    """
    rows, blocks, width = codes.shape
    s1, s2, s3, s4, s5, s6 = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4), np.uint64(5), np.uint64(6)
    for first in range(0, rows, 2):
        second = min(first + 1, rows - 1)
        for block in range(blocks):
            a, b = codes[first, block], codes[second, block]
            for query in range(planes.shape[0]):
                product_a = product_b = -offsets[query, block]
                for bit in range(planes.shape[2]):
                    plane = planes[query, block, bit]
                    mask = ones[bit]
                    a0 = a1 = a2 = a3 = a4 = a5 = a6 = set_a = np.uint64(0)
                    b0 = b1 = b2 = b3 = b4 = b5 = b6 = set_b = np.uint64(0)
                    for i in range(width):
                        p0, p1, p2, p3 = plane[0, i], plane[1, i], plane[2, i], plane[3, i]
                        p4, p5, p6 = plane[4, i], plane[5, i], plane[6, i]
                        x, y = a[i], b[i]
                        set_a, set_b = set_a + _popcount(x & mask), set_b + _popcount(y & mask)
                        a0, b0 = a0 + _popcount(x & p0), b0 + _popcount(y & p0)
                        a1, b1 = a1 + _popcount(x & p1), b1 + _popcount(y & p1)
                        a2, b2 = a2 + _popcount(x & p2), b2 + _popcount(y & p2)
                        a3, b3 = a3 + _popcount(x & p3), b3 + _popcount(y & p3)
                        a4, b4 = a4 + _popcount(x & p4), b4 + _popcount(y & p4)
                        a5, b5 = a5 + _popcount(x & p5), b5 + _popcount(y & p5)
                        a6, b6 = a6 + _popcount(x & p6), b6 + _popcount(y & p6)
                    total_a = a0 + (a1 << s1) + (a2 << s2) + (a3 << s3) + (a4 << s4) + (a5 << s5) + (a6 << s6)
                    total_b = b0 + (b1 << s1) + (b2 << s2) + (b3 << s3) + (b4 << s4) + (b5 << s5) + (b6 << s6)
                    product_a += steps[bit] * (np.int64(total_a) - np.int64(set_a << s6))
                    product_b += steps[bit] * (np.int64(total_b) - np.int64(set_b << s6))
                out[first, query] += product_a * units[query, block] * factors[first, block]
                if second > first:
                    out[second, query] += product_b * units[query, block] * factors[second, block]


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
        most = min(2**15 - 1, _INT32_MAX // (255 * dim)) if bits >= 4 else 2 ** (_PLANES - 1) - 1
        rounded = np.rint(q / largest * most).astype(np.int16)
        # units: value of 1 in the integer product; offsets: the integer product of a row of zero
        # codes, negated.
        self._units = largest[:, :, 0] / most
        sums = rounded.sum(axis=2, dtype=np.int64)
        self._queries = np.ascontiguousarray(rounded)
        if bits == 8:
            self._offsets = 128 * sums
        elif bits == 4:
            self._units /= whole_levels(4)[1]
        else:
            self._offsets = -float(levels(bits)[0]) * sums
            self._planes = _planes(rounded, bits)

    def scores(self, stored: StoredRows) -> Float32[Tensor, "rows queries"]:
        """Inner products with the decoded rows, but for the rounding of the queries."""
        out = np.zeros((len(stored), len(self._units)), dtype=np.float32)
        factors = stored.scales.numpy()
        codes = stored.codes.numpy().reshape(*factors.shape, -1)
        in_parts(len(stored), lambda rows: self._add_products(codes[rows], factors[rows], out[rows]))
        return torch.from_numpy(out)

    def _add_products(self, codes: np.ndarray, factors: np.ndarray, out: np.ndarray) -> None:
        if self._bits == 8:
            _int8_products(codes, self._queries, self._offsets, self._units, factors, out)
        elif self._bits == 4:
            _table_products(codes, byte_words(4), self._queries, self._units, factors, out)
        else:
            places, steps = _bit_places(self._bits), _steps(self._bits)
            words = codes.view(np.uint64)
            _plane_products(words, self._planes, places, steps, self._offsets, self._units, factors, out)


def _planes(rounded: np.ndarray, bits: Bits) -> np.ndarray:
    """Binary places of q + 64 as masks over the packed codes: [queries, blocks, bits, 7, words]."""
    queries, blocks, dim = rounded.shape
    shifted = (rounded + 2 ** (_PLANES - 1)).astype(np.uint8)
    spread = np.zeros((queries, blocks, bits, _PLANES, dim, bits), dtype=np.uint8)
    for bit in range(bits):
        for place in range(_PLANES):
            spread[:, :, bit, place, :, bit] = (shifted >> place) & 1
    packed = np.packbits(spread.reshape(queries, blocks, bits, _PLANES, -1), axis=4, bitorder="little")
    return np.ascontiguousarray(packed).view(np.uint64)


@functools.cache
def _bit_places(bits: Bits) -> np.ndarray:
    """The places of each code bit in a 64-bit word."""
    whole, every = 2**64 - 1, sum(1 << place for place in range(0, 64, bits))
    return np.array([(every << bit) & whole for bit in range(bits)], dtype=np.uint64)


@functools.cache
def _steps(bits: Bits) -> np.ndarray:
    """The amount that each code bit adds to the level: 2 for 1-bit codes; b - a and a + b for 2-bit codes."""
    table = levels(bits).numpy()
    return np.array([table[1 << bit] - table[0] for bit in range(bits)], dtype=np.float64)


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
