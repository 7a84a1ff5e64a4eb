"""Scores of many queries by products of bytes are those of the decoded rows, but for the rounding of the query."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from trackstar import byte_products
from trackstar.byte_products import ByteQueries, byte_products_serve
from trackstar.store import Bits, CodecName, encode

CODECS: list[tuple[CodecName, Bits]] = [("int8", 8), ("4-bit", 4), ("2-bit", 2), ("1-bit", 1)]


def normal(rows: int, dimensions: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, dimensions, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("codec", "bits"), CODECS)
@hypothesis.given(
    rows=st.integers(1, 80), blocks=st.integers(1, 3), words=st.integers(1, 4), queries=st.integers(1, 40),
    magnitude=st.integers(-30, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_scores_are_those_of_decoded_rows(
    codec: CodecName, bits: Bits, rows: int, blocks: int, words: int, queries: int, magnitude: int, seed: int
):
    dimensions = blocks * words * 64
    stored = encode(normal(rows, dimensions, seed) * 2.0**magnitude, codec, blocks)
    asked = normal(queries, dimensions, seed + 1) * 2.0**-magnitude
    found = ByteQueries(asked, blocks, bits).scores(stored)
    decoded = stored.decode()
    error = found.double() - decoded.double() @ asked.double().T
    bound = 3e-4 * decoded.norm(dim=1)[:, None] * asked.norm(dim=1)
    assert found.shape == (rows, queries)
    assert bool((error.abs() <= bound).all())


@pytest.mark.parametrize(("codec", "bits"), CODECS)
def test_the_largest_codes_do_not_overflow(codec: CodecName, bits: Bits):
    signs = normal(1, 4096, 0).sign()
    found = ByteQueries(signs * 7, 1, bits).scores(encode(signs.repeat(40, 1) * 3, codec, 1))
    torch.testing.assert_close(found, torch.full((40, 1), 4096.0 * 21), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("codec", "bits"), CODECS)
def test_zero_rows_and_zero_queries_score_zero(codec: CodecName, bits: Bits):
    rows = torch.cat([torch.zeros(1, 128), normal(1, 128, 0)])
    asked = torch.cat([normal(1, 128, 1), torch.zeros(1, 128)])
    found = ByteQueries(asked, 2, bits).scores(encode(rows, codec, 2))
    assert found[0].tolist() == [0, 0]
    assert found[1, 1] == 0
    assert found[1, 0] != 0


@pytest.mark.parametrize(("codec", "bits"), CODECS)
def test_parts_and_threads_change_nothing(codec: CodecName, bits: Bits, monkeypatch: pytest.MonkeyPatch):
    stored, asked = encode(normal(150, 256, 0), codec, 2), normal(7, 256, 1)
    expected = ByteQueries(asked, 2, bits).scores(stored)
    monkeypatch.setattr(byte_products, "_ROWS", 32)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(ByteQueries(asked, 2, bits).scores(stored), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("failure", ["absent", "wrong"])
def test_a_machine_whose_products_are_not_exact_goes_without(failure: str, monkeypatch: pytest.MonkeyPatch):
    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if failure == "absent":
            raise RuntimeError("not on this machine")
        return (left.int() @ right.int()).clamp(-(2**15), 2**15 - 1)

    monkeypatch.setattr(byte_products.binding, "get_host_cpu_features", lambda: {"avx512vnni": True})
    monkeypatch.setattr(byte_products, "_multiply", product)
    byte_products_serve.cache_clear()
    try:
        assert not byte_products_serve()
    finally:
        byte_products_serve.cache_clear()


def test_a_machine_without_the_instructions_goes_without(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(byte_products.binding, "get_host_cpu_features", dict)
    byte_products_serve.cache_clear()
    try:
        assert not byte_products_serve()
    finally:
        byte_products_serve.cache_clear()
