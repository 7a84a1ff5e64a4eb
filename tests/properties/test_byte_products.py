"""Products of bytes do not depend on parts and threads, and are left where a machine does not make them exactly."""

import pytest
import torch

from trackstar.choices import CodecName
from trackstar.retrieval import packed_products as byte_products
from trackstar.retrieval.packed_products import ByteQueries, byte_products_serve
from trackstar.store import Bits, encode

CODECS: list[tuple[CodecName, Bits]] = [("int8", 8), ("4-bit", 4), ("2-bit", 2), ("1-bit", 1)]


def normal(rows: int, dimensions: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, dimensions, generator=torch.Generator().manual_seed(seed))


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
