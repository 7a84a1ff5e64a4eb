"""Reading an index gives what was written, for every codec, magnitude and character."""

import math
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from small_index import (
    AUTOCORRELATION,
    EXAMPLES,
    SECOND_MOMENT,
    SHARD_EXAMPLES,
    small_content,
    small_example,
    small_manifest,
    small_projected_gradients,
    write_small_index,
)
from trackstar import choices, store
from trackstar.choices import CodecName
from trackstar.corpus import TokenizedExample
from trackstar.errors import DamagedIndexError, OptionError, check_choice
from trackstar.store import tensor_file, tensor_reading
from trackstar.store.shard_content import ShardPlan, shard_tensors

CODECS: list[CodecName] = ["float32", "bfloat16", "float16"]
RELATIVE_ERROR = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "index"
    write_small_index(path)
    return path


def same_example(found: TokenizedExample, expected: TokenizedExample) -> bool:
    names = ("example_id", "parent_id", "record", "window", "text")
    return (
        all(getattr(found, name) == getattr(expected, name) for name in names)
        and found.token_ids.dtype == np.int32
        and found.target_mask.dtype == np.bool_
        and np.array_equal(found.token_ids, expected.token_ids)
        and np.array_equal(found.target_mask, expected.target_mask)
    )


@pytest.mark.parametrize("codec", CODECS)
def test_reading_gives_what_was_written(tmp_path: Path, codec: CodecName) -> None:
    write_small_index(tmp_path, small_manifest(codec))
    index = store.Index.open(tmp_path)
    assert (index.rows, index.dimensions, len(index.shards)) == (EXAMPLES, 32, 3)
    for row in range(EXAMPLES):
        stored = index.example(row)
        assert same_example(stored.example, small_example(row))
        assert (stored.row, stored.loss) == (row, 1.5 * (row + 1))
    assert [stored.row for stored in index.examples()] == list(range(EXAMPLES))
    for shard in index.shards:
        rows = range(shard.first_row, shard.first_row + shard.rows)
        assert shard.stored.codes.dtype is getattr(torch, codec)
        assert torch.equal(shard.stored.decode(), small_projected_gradients(rows))
        assert shard.losses.tolist() == [1.5 * (row + 1) for row in rows]
        assert shard.target_counts.tolist() == [1 + row % 3 for row in rows]
        assert shard.records.tolist() == [2 * (row // 2) for row in rows]
        assert shard.windows.tolist() == [row % 2 for row in rows]


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3, 100])
def test_chunks_of_any_size_hold_the_same_rows(finished: Path, rows_per_chunk: int) -> None:
    next_row = 0
    for chunk in store.Index.open(finished).iterate(rows_per_chunk):
        rows = range(chunk.first_row, chunk.first_row + len(chunk.stored.codes))
        assert chunk.first_row == next_row
        assert 1 <= len(rows) <= rows_per_chunk
        assert torch.equal(chunk.stored.decode(), small_projected_gradients(rows))
        next_row = rows.stop
    assert next_row == EXAMPLES


def test_the_completion_counts_what_was_written(finished: Path) -> None:
    completion = store.Index.open(finished).manifest.completion
    assert completion is not None
    examples = [small_example(row) for row in range(EXAMPLES)]
    assert completion.rows == EXAMPLES
    assert completion.tokens == sum(len(example.token_ids) for example in examples)
    assert completion.targets == sum(int(example.target_mask.sum()) for example in examples)
    assert (completion.records, completion.skipped) == (10, 5)
    assert [shard.rows for shard in completion.shards] == [3, 3, 2]


def test_tensors_come_back_with_their_digest(finished: Path) -> None:
    index = store.Index.open(finished)
    for name, written in (("second_moment", SECOND_MOMENT), ("autocorrelation", AUTOCORRELATION)):
        found = index.tensors(name)
        assert found.keys() == written.keys()
        assert all(torch.equal(found[key], written[key]) for key in written)
    completion = index.manifest.completion
    assert completion is not None
    assert completion.autocorrelation_digest == store.tensors_digest(AUTOCORRELATION)


def test_tensors_digest_depends_on_names_and_values_but_not_on_their_order() -> None:
    digest = store.tensors_digest(SECOND_MOMENT)
    assert store.tensors_digest(dict(reversed(SECOND_MOMENT.items()))) == digest
    assert store.tensors_digest({**SECOND_MOMENT, "rows/a": SECOND_MOMENT["rows/a"] + 1}) != digest
    assert store.tensors_digest({f"{name}x": tensor for name, tensor in SECOND_MOMENT.items()}) != digest
    assert store.tensors_digest({name: tensor.double() for name, tensor in SECOND_MOMENT.items()}) != digest
    assert store.tensors_digest({name: tensor[None] for name, tensor in SECOND_MOMENT.items()}) != digest


# Codecs

magnitudes = st.floats(min_value=-148, max_value=127)


@given(exponent=magnitudes, seed=st.integers(0, 2**31))
def test_float32_is_lossless_at_every_magnitude(exponent: float, seed: int) -> None:
    values = _row(exponent, seed)
    assert torch.equal(store.encode(values, "float32").decode(), values)


@pytest.mark.parametrize("codec", ["bfloat16", "float16"])
@given(exponent=magnitudes, seed=st.integers(0, 2**31))
def test_16_bit_codecs_err_by_their_rounding_at_every_magnitude(codec: CodecName, exponent: float, seed: int) -> None:
    values = _row(exponent, seed)
    stored = store.encode(values, codec)
    found = stored.decode().double()
    root_mean_square = values.double().square().mean(dim=1, keepdim=True).sqrt()
    bound = RELATIVE_ERROR[codec] * values.double().abs() + 2.0**-24 * root_mean_square + 2.0**-149
    assert torch.isfinite(stored.codes.float()).all()
    assert ((found - values.double()).abs() <= bound).all()


@pytest.mark.parametrize("codec", ["bfloat16", "float16"])
def test_a_scale_is_the_power_of_two_nearest_to_the_root_mean_square(codec: CodecName) -> None:
    for root_mean_square in (1.0, 1.4, 1.42, 3e-20, 5e30, 2.0**-126, 2.0**126):
        stored = store.encode(torch.full((1, 16), root_mean_square), codec)
        assert stored.scales.tolist() == [2.0 ** round(math.log2(root_mean_square))]


@pytest.mark.parametrize("codec", CODECS)
def test_a_row_of_zeros_has_scale_one(codec: CodecName) -> None:
    stored = store.encode(torch.zeros(2, 8), codec)
    assert stored.scales.tolist() == [1.0, 1.0]
    assert not stored.codes.float().any()
    assert not stored.norms.any()


def test_one_large_dimension_among_65536_fits_into_float16() -> None:
    values = torch.zeros(1, 65_536)
    values[0, 5] = 3e38
    assert store.encode(values, "float16").decode()[0, 5].item() == pytest.approx(3e38, rel=2**-10)


def test_an_unknown_codec_is_refused_with_the_list_of_codecs() -> None:
    with pytest.raises(OptionError, match=r"^`codec`: expected one of float32, bfloat16, float16, int8, 4-bit"):
        check_choice("codec", "int4", choices.CODECS)


def _row(exponent: float, seed: int) -> Tensor:
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed)).double() * 2.0**exponent
    return values.clamp(-3.38e38, 3.38e38).float()  # the largest bfloat16 is 3.39e38


# Texts and names

any_text = st.text(st.characters(exclude_categories=()), max_size=12)


@given(texts=st.lists(st.tuples(any_text, any_text, any_text), min_size=1, max_size=SHARD_EXAMPLES))
def test_any_text_and_name_comes_back_unchanged(
    texts: list[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    def example(row: int) -> TokenizedExample:
        text, example_id, parent_id = texts[row]
        tokens = np.array([1, 2, 3], dtype=np.int32)
        return TokenizedExample(
            example_id=example_id,
            parent_id=parent_id,
            record=row,
            window=0,
            text=text,
            token_ids=tokens,
            target_mask=tokens > 1,
        )

    path = tmp_path_factory.mktemp("texts")
    with store.IndexWriter.open(path, small_manifest()) as writer:
        content = small_content(0, len(texts), example=example)
        shard = writer.write_shard(content)
        for row in range(len(texts)):
            assert same_example(shard.example(row).example, example(row))


@pytest.mark.parametrize(
    "text", ["", "\0", "\ud83d\ude00", "\udcff", "\U0001f600", "e\u0301", "a" * 1_000_000, "\r\n\u2028\ufeff"]
)
def test_odd_text_comes_back_unchanged(tmp_path: Path, text: str) -> None:
    def example(row: int) -> TokenizedExample:
        plain = small_example(row)
        return TokenizedExample(
            example_id=f"{text[:20]}{row}",
            parent_id=text[:20],
            record=plain.record,
            window=plain.window,
            text=text,
            token_ids=plain.token_ids,
            target_mask=plain.target_mask,
        )

    with store.IndexWriter.open(tmp_path, small_manifest()) as writer:
        shard = writer.write_shard(small_content(0, 3, example=example))
        assert [same_example(shard.example(row).example, example(row)) for row in range(3)] == [True] * 3


# Reading only the requested bytes


def test_an_example_is_read_without_the_rest_of_its_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def long_example(row: int) -> TokenizedExample:
        plain = small_example(row)
        return TokenizedExample(
            example_id=plain.example_id,
            parent_id=plain.parent_id,
            record=plain.record,
            window=plain.window,
            text=plain.text if row == 1 else "x" * 100_000,
            token_ids=plain.token_ids,
            target_mask=plain.target_mask,
        )

    with store.IndexWriter.open(tmp_path, small_manifest()) as writer:
        shard = writer.write_shard(small_content(0, 3, example=long_example))
    read = []
    preadv = tensor_reading.os.preadv

    def counted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(preadv(descriptor, buffers, offset))
        return read[-1]

    monkeypatch.setattr(tensor_reading.os, "preadv", counted)
    monkeypatch.setattr(Path, "open", None)  # nothing else opens the file
    assert same_example(shard.example(1).example, small_example(1))
    assert 0 < sum(read) < 40_000  # of 200,000: blocks of 4 KiB around the example's bytes, and their checksums


def test_codes_are_mapped_not_read_and_writing_to_them_does_not_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "codes.safetensors"
    rows, dim = 4096, 4096  # 64 MiB
    tensor_file.write_tensor_file(path, {"codes": torch.ones(rows, dim)}, {})
    file = tensor_file.open_tensor_file(path)
    before = psutil.Process().memory_info().rss
    codes = tensor_reading.map_tensor(file, "codes")
    assert psutil.Process().memory_info().rss - before < 2**22
    codes[5, 5] = 7.0
    assert tensor_reading.map_tensor(file, "codes")[5, 5] == 1.0
    tensor_reading.check_digest(file)


def test_codes_are_written_from_the_buffer_that_holds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = small_content(0, 3)
    first, length = content.stored.codes.data_ptr(), content.stored.codes.numel() * 4
    monkeypatch.setattr(tensor_file, "CHUNK", 100)
    inside = []

    def noted(descriptor: int, chunk: bytes | memoryview) -> None:
        address = np.frombuffer(chunk, np.uint8).ctypes.data
        inside.append(first <= address and address + len(chunk) <= first + length)
        assert len(chunk) <= 100 or isinstance(chunk, bytes)

    monkeypatch.setattr(tensor_file, "write_all", noted)
    tensor_file.write_tensor_file(tmp_path / "shard", shard_tensors(content, ShardPlan.of(small_manifest())), {})
    assert inside.count(True) == -(-length // 100)


def test_a_negative_zero_or_nan_scale_is_damage_and_names_its_row(tmp_path: Path) -> None:
    for wrong in (math.nan, math.inf, 0.0, -1.0, 3.0):
        content = small_content(0, 3)
        content.stored.scales[1] = wrong
        with store.IndexWriter.open(tmp_path / str(wrong), small_manifest()) as writer:
            shard = writer.write_shard(content)
            with pytest.raises(DamagedIndexError, match=f"row 1 has scale {wrong}, expected a positive power of two"):
                _ = shard.scales


def test_the_public_names_of_the_store_are_complete() -> None:
    assert store.__all__ == sorted(store.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert all(hasattr(store, name) for name in store.__all__)
    values = {name: value for name, value in vars(store).items() if not name.startswith("_")}
    assert {name for name, value in values.items() if not isinstance(value, types.ModuleType)} == set(store.__all__)
    assert set(choices.CODECS) > set(CODECS)
