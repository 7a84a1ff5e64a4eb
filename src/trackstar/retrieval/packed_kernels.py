"""Integer inner products of packed codes with one query's block, in the processor's vector instructions.

Numba's own loops leave most of a vector unused here: they widen codes to 32 bits, look levels up one
byte at a time, and never multiply bytes. So the inner loop is written in LLVM's vectors. Four rows are
read at a time, 32 bytes of each in a step, and later bytes of all four are prefetched: a single stream
of addresses stops at every page, and leaves the memory's bandwidth unused.

    x         32 bytes of a row: codes of 32, 64, 128 or 256 dimensions
    q         the query's rounded entries of these dimensions: 16-bit for int8 and 4-bit codes, else 8-bit
    8 bits    Σ x·q, x widened to 16 bits, products added in pairs
    4 bits    Σ level[low half of x]·q and Σ level[high half]·q: a table of 16 bytes is one instruction
    2 bits    Σ_k u[(x >> 2k) & 3]·q_k, u = 0, 7, 13, 20; levels are (u - 10)·8/53. |Σ_k| < 2^15
    1 bit     Σ_k ((x >> k) & 1)·q_k. |Σ_k| < 2^15

On x86 with AVX2 and on 64-bit Arm, instructions are named that LLVM does not always recognize. Elsewhere
the same integers follow from plain vector operations, which LLVM translates as it can.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, no_type_check

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from trackstar.store import Bits
from trackstar.store.quantization import whole_levels

# Rows read at a time, and bytes per row and step.
ROWS, STEP_BYTES = 4, 32
# Bytes of each row that are prefetched ahead of the step.
_AHEAD = 1024

_BYTE, _WORD, _INT, _LONG = (ir.IntType(width) for width in (8, 16, 32, 64))
# Builders and values of llvmlite have no useful types.
_Builder = Any
_Value = Any


@no_type_check
def compiled(kernel):
    """Compile a kernel at its first call. Machine code is cached beside the module, or for the user."""
    try:
        return numba.njit(nogil=True, cache=True)(kernel)
    except RuntimeError:  # neither folder is writable
        return numba.njit(nogil=True)(kernel)


def levels_from_zero(bits: Bits) -> tuple[list[int], int, int]:
    """u, s and a of 1-bit or 2-bit codes, in integers: numerator of level i = s·u[i] + a, u[0] = 0."""
    numerators = [int(level) for level in whole_levels(bits)[0]]
    step = int(np.gcd.reduce([level - numerators[0] for level in numerators]))
    return [(level - numerators[0]) // step for level in numerators], step, numerators[0]


Instructions = Literal["avx2", "neon", "plain"]
"""The instructions that kernels name: those of x86 with AVX2, those of 64-bit Arm, or none."""


def _instructions(context: Any) -> Instructions:
    """What the processor has that Numba compiles for."""
    triple, _, features = context.codegen().magic_tuple()
    if "+avx2" in features:
        return "avx2"
    return "neon" if triple.startswith(("aarch64", "arm64")) else "plain"


class Vectors:
    """The vector operations of one kernel.

    Args:
        builder: Receives the operations.
        instructions: Which of them may be instructions by name.
    """

    def __init__(self, builder: _Builder, instructions: Instructions) -> None:
        self._builder, self._instructions = builder, instructions

    def loaded(self, address: _Value, number: ir.IntType, count: int) -> _Value:
        """A vector at an address of any alignment."""
        vector = self._builder.load(self._builder.inttoptr(address, ir.VectorType(number, count).as_pointer()))
        vector.align = 1
        return vector

    def lookup(self, table: Sequence[int], places: _Value) -> _Value:
        """table[place] of each byte; places are below 16."""
        builder, repeated = self._builder, _constant(_BYTE, [table[place % len(table)] for place in range(32)])
        if self._instructions == "avx2":
            return self._call("llvm.x86.avx2.pshuf.b", places.type, repeated, places)
        if self._instructions == "neon":
            name, half = "llvm.aarch64.neon.tbl1.v16i8", self.halves(repeated)[0]
            return self._joined(*(self._call(name, part.type, half, part) for part in self.halves(places)))
        found = ir.Constant(places.type, ir.Undefined)
        for lane in range(STEP_BYTES):
            place = builder.zext(builder.extract_element(places, _INT(lane)), _INT)
            found = builder.insert_element(found, builder.extract_element(repeated, place), _INT(lane))
        return found

    def byte_products(self, codes: _Value, q: _Value) -> _Value:
        """codes·q of bytes, added in pairs, in 16 bits; codes are from 0 to 127."""
        if self._instructions == "avx2":
            return self._call("llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(_WORD, 16), codes, q)
        wide = ir.VectorType(_WORD, 32)
        return self._halves_added(self._builder.mul(self._builder.sext(codes, wide), self._builder.sext(q, wide)))

    def word_products(self, total: _Value, words: _Value, q: _Value) -> _Value:
        """total + words·q of 16-bit words, added in pairs, in 32 bits."""
        if self._instructions == "avx2":
            return self._builder.add(total, self._call("llvm.x86.avx2.pmadd.wd", total.type, words, q))
        wide = ir.VectorType(_INT, 16)
        products = self._builder.mul(self._builder.sext(words, wide), self._builder.sext(q, wide))
        return self._builder.add(total, self._halves_added(products))

    def halves(self, vector: _Value) -> tuple[_Value, _Value]:
        """The first half of a vector's lanes, and the second."""
        count = vector.type.count // 2
        return self._chosen(vector, range(count)), self._chosen(vector, range(count, 2 * count))

    def field(self, x: _Value, bits: int, number: int) -> _Value:
        """The number-th `bits` bits of each byte."""
        builder = self._builder
        shifted = builder.lshr(x, _constant(_BYTE, [bits * number] * STEP_BYTES)) if number else x
        return builder.and_(shifted, _constant(_BYTE, [2**bits - 1] * STEP_BYTES))

    def _joined(self, low: _Value, high: _Value) -> _Value:
        return self._builder.shuffle_vector(low, high, _constant(_INT, range(2 * low.type.count)))

    def _halves_added(self, vector: _Value) -> _Value:
        low, high = self.halves(vector)
        return self._builder.add(low, high)

    def _chosen(self, vector: _Value, lanes: range) -> _Value:
        undefined = ir.Constant(vector.type, ir.Undefined)
        return self._builder.shuffle_vector(vector, undefined, _constant(_INT, lanes))

    def _call(self, name: str, result: _Value, *arguments: _Value) -> _Value:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self._builder.call(cgutils.get_or_insert_function(self._builder.module, kind, name), arguments)


def _constant(number: ir.IntType, values: Sequence[int] | range) -> _Value:
    return ir.Constant(ir.VectorType(number, len(values)), [number(int(value)) for value in values])


Step = Callable[[_Builder, Vectors, _Value, _Value, _Value], _Value]
"""The total after 32 bytes of codes, from the builder, the vectors, the total before [8] i32, x [32] u8
and the address of the query's entries."""


def _int8_step(builder: _Builder, vectors: Vectors, total: _Value, x: _Value, query: _Value) -> _Value:
    for number, half in enumerate(vectors.halves(x)):
        q = vectors.loaded(builder.add(query, _LONG(32 * number)), _WORD, 16)
        total = vectors.word_products(total, builder.zext(half, q.type), q)
    return total


def _four_bit_step(builder: _Builder, vectors: Vectors, total: _Value, x: _Value, query: _Value) -> _Value:
    table = [int(level) for level in whole_levels(4)[0]]
    for place in range(2):
        for number, half in enumerate(vectors.halves(vectors.lookup(table, vectors.field(x, 4, place)))):
            q = vectors.loaded(builder.add(query, _LONG(64 * place + 32 * number)), _WORD, 16)
            total = vectors.word_products(total, builder.sext(half, q.type), q)
    return total


def _byte_step(bits: Bits) -> Step:
    table, _, _ = levels_from_zero(bits)

    def step(builder: _Builder, vectors: Vectors, total: _Value, x: _Value, query: _Value) -> _Value:
        words = None
        for place in range(8 // bits):
            q = vectors.loaded(builder.add(query, _LONG(32 * place)), _BYTE, 32)
            field = vectors.field(x, bits, place)
            products = vectors.byte_products(field if bits == 1 else vectors.lookup(table, field), q)
            words = products if words is None else builder.add(words, products)
        return vectors.word_products(total, words, _constant(_WORD, [1] * 16))

    return step


def step_of(bits: Bits) -> Step:
    """A codec's step."""
    return _int8_step if bits == 8 else _four_bit_step if bits == 4 else _byte_step(bits)


def block_products(bits: Bits, *, plain: bool = False) -> Any:
    """An intrinsic for Numba: the integer products of a query's block with one block of four rows.

    Its arguments are the addresses of the rows' blocks, their length in bytes, a multiple of 32, and
    the address of the query's entries in the order of `arranged`.

    Args:
        bits: Bits per dimension of the codes.
        plain: Whether no instruction is named, as on a processor without AVX2 or Neon.
    """
    step = step_of(bits)
    query_bytes = STEP_BYTES * (2 if bits >= 4 else 1) * (8 // bits)  # per step

    @intrinsic
    @no_type_check
    def products(typingctx, a, b, c, d, width, query):
        def generate(context, builder, signature, arguments):
            *rows, width, query = arguments
            vectors = Vectors(builder, "plain" if plain else _instructions(context))
            nothing = _constant(_INT, [0] * 8)
            totals = [cgutils.alloca_once_value(builder, nothing) for _ in rows]
            with cgutils.for_range_slice(builder, _LONG(0), width, _LONG(STEP_BYTES), _LONG) as (start, number):
                entries = builder.add(query, builder.mul(number, _LONG(query_bytes)))
                for row, total in zip(rows, totals, strict=True):
                    address = builder.add(row, start)
                    _prefetch(builder, builder.add(address, _LONG(_AHEAD)))
                    x = vectors.loaded(address, _BYTE, STEP_BYTES)
                    builder.store(step(builder, vectors, builder.load(total), x, entries), total)
            sums = [_lanes_added(builder, builder.load(total)) for total in totals]
            return cgutils.pack_array(builder, sums)

        return types.UniTuple(types.int32, ROWS)(*[types.int64] * (ROWS + 2)), generate

    return products


def _lanes_added(builder: _Builder, vector: _Value) -> _Value:
    total = builder.extract_element(vector, _INT(0))
    for lane in range(1, vector.type.count):
        total = builder.add(total, builder.extract_element(vector, _INT(lane)))
    return total


def _prefetch(builder: _Builder, address: _Value) -> None:
    """Prefetch the cache line at an address, which may be invalid."""
    pointer = _BYTE.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, _INT, _INT, _INT])
    function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
    read, keep, data = _INT(0), _INT(3), _INT(1)
    builder.call(function, [builder.inttoptr(address, pointer), read, keep, data])


_int8_block, _four_bit_block = block_products(8), block_products(4)
_two_bit_block, _one_bit_block = block_products(2), block_products(1)


@compiled
@no_type_check
def add_products(bits, codes, queries, offsets, units, factors, out):
    """out[row, query] += Σ_block factor·unit·(Σ code·q - offset), Σ code·q as at the top of this module.

    Shapes: codes [rows, blocks, bytes] u8, bytes a multiple of 32; queries [queries, blocks, entries]
    i16 or i8, in the order of `arranged`; offsets and units [queries, blocks]; factors [rows, blocks].
    """
    rows, blocks, width = codes.shape
    start, last = codes.ctypes.data, rows - 1
    for row in range(0, rows, 4):
        for block in range(blocks):
            a = start + (row * blocks + block) * width
            b = start + (min(row + 1, last) * blocks + block) * width
            c = start + (min(row + 2, last) * blocks + block) * width
            d = start + (min(row + 3, last) * blocks + block) * width
            for query in range(queries.shape[0]):
                q = queries[query, block].ctypes.data
                if bits == 8:
                    products = _int8_block(a, b, c, d, width, q)
                elif bits == 4:
                    products = _four_bit_block(a, b, c, d, width, q)
                elif bits == 2:
                    products = _two_bit_block(a, b, c, d, width, q)
                else:
                    products = _one_bit_block(a, b, c, d, width, q)
                offset, unit = offsets[query, block], units[query, block]
                for near in range(min(4, rows - row)):
                    out[row + near, query] += (products[near] - offset) * unit * factors[row + near, block]


def arranged(rounded: np.ndarray, bits: Bits) -> np.ndarray:
    """A query's entries in the order in which the kernels read them: per 32 bytes of codes, the
    entries of every byte's first code, then of its second. Zeros fill up the last 32 bytes.
    """
    queries, blocks, dim = rounded.shape
    per_byte = 8 // bits
    filled = np.pad(rounded, ((0, 0), (0, 0), (0, -dim % (STEP_BYTES * per_byte))))
    steps = filled.reshape(queries, blocks, -1, STEP_BYTES, per_byte)
    return np.ascontiguousarray(steps.swapaxes(3, 4)).reshape(queries, blocks, -1)
