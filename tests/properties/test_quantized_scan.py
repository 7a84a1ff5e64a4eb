"""Scores from packed bytes, few queries or many, are those of the decoded rows, but for the rounding of the query."""

from typing import Any

import hypothesis
import numba
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from trackstar.choices import CodecName
from trackstar.retrieval import packed_kernels
from trackstar.retrieval.packed_kernels import compiled, levels_from_zero
from trackstar.retrieval.packed_products import ByteQueries
from trackstar.retrieval.packed_scan import QuantizedQueries, decode_into
from trackstar.store import Bits, encode
from trackstar.store.quantization import levels, whole_levels

CODECS: list[tuple[CodecName, Bits]] = [("int8", 8), ("4-bit", 4), ("2-bit", 2), ("1-bit", 1)]
Kind = type[QuantizedQueries] | type[ByteQueries]
KINDS: list[Kind] = [QuantizedQueries, ByteQueries]
# Of a query's norm times a row's: 12 bits or so and 8 for a few queries, 15 for many.
ROUNDING = {8: 2e-3, 4: 2e-3, 2: 1.5e-2, 1: 1.5e-2}
MANY_ROUNDING = 3e-4


def normal(rows: int, dimensions: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, dimensions, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("codec", "bits"), CODECS)
@hypothesis.given(
    rows=st.integers(1, 80), blocks=st.integers(1, 3), words=st.integers(1, 4), queries=st.integers(1, 40),
    magnitude=st.integers(-30, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_scores_are_those_of_decoded_rows(
    kind: Kind,
    codec: CodecName,
    bits: Bits,
    rows: int,
    blocks: int,
    words: int,
    queries: int,
    magnitude: int,
    seed: int,
):
    dimensions = blocks * words * 64
    stored = encode(normal(rows, dimensions, seed) * 2.0**magnitude, codec, blocks)
    asked = normal(queries, dimensions, seed + 1) * 2.0**-magnitude
    found = kind(asked, blocks, bits).scores(stored)
    decoded = stored.decode()
    error = found.double() - decoded.double() @ asked.double().T
    bound = (
        (ROUNDING[bits] if kind is QuantizedQueries else MANY_ROUNDING)
        * decoded.norm(dim=1)[:, None]
        * asked.norm(dim=1)
    )
    assert found.shape == (rows, queries)
    assert bool((error.abs() <= bound).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("codec", "bits"), CODECS)
def test_a_row_of_the_largest_codes_does_not_overflow(kind: Kind, codec: CodecName, bits: Bits):
    """Every product has the same sign and the largest size that there is, over the paper's 4,096 dimensions a block."""
    signs = normal(1, 4096, 0).sign()
    found = kind(signs * 7, 1, bits).scores(encode(signs.repeat(40, 1) * 3, codec, 1))
    torch.testing.assert_close(found, torch.full((40, 1), 4096.0 * 21), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("codec", "bits"), CODECS)
def test_zero_rows_and_zero_queries_score_zero(kind: Kind, codec: CodecName, bits: Bits):
    rows = torch.cat([torch.zeros(1, 128), normal(1, 128, 0)])
    found = kind(torch.cat([normal(1, 128, 1), torch.zeros(1, 128)]), 2, bits).scores(encode(rows, codec, 2))
    assert found[0].tolist() == [0, 0]
    assert found[1, 1] == 0
    assert found[1, 0] != 0


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("codec", "bits"), CODECS)
def test_threads_and_parts_change_nothing(codec: CodecName, bits: Bits, threads: int):
    stored = encode(normal(150, 256, 0), codec, 2)
    asked = normal(2, 256, 1)
    before = torch.get_num_threads()
    expected = torch.cat([QuantizedQueries(asked, 2, bits).scores(stored[row : row + 1]) for row in range(150)])
    decoded = torch.empty(150, 256)
    torch.set_num_threads(threads)
    try:
        found = QuantizedQueries(asked, 2, bits).scores(stored)
        decode_into(stored, decoded)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)
    assert torch.equal(decoded, stored.decode())


@pytest.mark.parametrize("width", [32, 96])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_sums_of_a_block_are_exact_by_named_instructions_and_by_plain_ones(bits: Bits, plain: bool, width: int):
    """Every byte occurs, and entries of the largest size: no sum overflows, with AVX2 and on other processors."""
    per_byte, kind = 8 // bits, np.int16 if bits >= 4 else np.int8
    generator = np.random.default_rng(width)
    rows = generator.integers(0, 256, (packed_kernels.ROWS, width), dtype=np.uint8)
    rows[0], rows[1, :32] = 255, np.arange(0, 256, 8)
    for most in (127, 2055 if bits >= 4 else 127):
        entries = generator.integers(-most, most + 1, (1, 1, width * per_byte)).astype(kind)
        if most != 127:
            entries[:] = most
        fields = (rows[:, :, None] >> (bits * np.arange(per_byte))) & (2**bits - 1)
        expected = multiplied_by_kernel(bits)[fields.reshape(len(rows), -1)] @ entries[0, 0].astype(np.int64)
        block = packed_kernels.block_products(bits, plain=plain)
        order = packed_kernels.arranged(entries, bits)
        found = compiled_sums(block)(*(row.ctypes.data for row in rows), width, order.ctypes.data)
        assert list(found) == expected.tolist()


def multiplied_by_kernel(bits: Bits) -> np.ndarray:
    """What the kernels multiply for each code: the code of 8 bits, the level's numerator of 4, u of 2 and 1."""
    if bits == 8:
        return np.arange(256)
    return whole_levels(4)[0].numpy().astype(np.int64) if bits == 4 else np.array(levels_from_zero(bits)[0])


def compiled_sums(block: Any) -> Any:
    @numba.njit
    def sums(a: int, b: int, c: int, d: int, width: int, query: int) -> Any:
        return block(a, b, c, d, width, query)

    return sums


@pytest.mark.parametrize("bits", [2, 1])
def test_levels_from_zero_are_the_levels(bits: Bits):
    table, step, lowest = levels_from_zero(bits)
    numerators, unit = whole_levels(bits)
    assert [step * u + lowest for u in table] == numerators.tolist()
    assert max(table) * 127 * 2 * (8 // bits) < 2**15, "the sum of a byte's codes fits into 16 bits"
    assert torch.equal(numerators / unit, levels(bits))


def test_kernels_work_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch):
    njit = numba.njit

    def unwritable(**options: Any):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", unwritable)
    assert compiled(lambda number: number + 1)(2) == 3
