"""The bytes of an index: as FORMAT.md specifies them, readable by other software, and stable."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from small_index import (
    SECOND_MOMENT,
    SIDE,
    index_bytes,
    small_content,
    small_manifest,
    small_projected_gradients,
    write_small_index,
)
from trackstar import store
from trackstar.choices import CodecName
from trackstar.errors import DamagedIndexError, StoreError
from trackstar.store import shard_files, tensor_file, tensor_reading

# A changed digest here is a changed format: it needs a new FORMAT_VERSION, and readers of the old one.
GOLDEN: dict[CodecName, str] = {
    "float32": "4f1dbc0edfaa3d2c7247a09c40a4d38e9f1cccf4056ac126e114ae1e2620c7e5",
    "bfloat16": "665f92cd6708cd12ce75c3f4621d539d073551b4ff1a881665993e9417e15c96",
    "float16": "07ef32d5de0a2f1e8aba0eb5da06349e329433658332ecd31b0b18f13aecd2fe",
    "int8": "a6184a6e16b95f5e6e37eae24dabe4980e9afc945129daf3c59d260173ea9cf1",
    "4-bit": "d6137ae783bd30fca35489fedd385d3322c6745a08d1760a9f5e0cf97a180ee8",
    "2-bit": "b02bd6c878738da16c7df9559c62a8dcc29e405c3f6ac232b7c4328c65abed4b",
    "1-bit": "2f6c20822749dd525a5f31a0e5d3af16dfd2a3878923d97f22c79e9c1b396ebe",
}


@pytest.mark.parametrize("codec", list(GOLDEN))
def test_the_format_is_the_one_that_was_released(tmp_path: Path, codec: CodecName) -> None:
    completion = write_small_index(tmp_path, small_manifest(codec)).completion
    assert completion is not None
    assert completion.shards[1].digest == GOLDEN[codec]


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    write_small_index(tmp_path / "one")
    write_small_index(tmp_path / "two")
    assert index_bytes(tmp_path / "one") == index_bytes(tmp_path / "two")
    assert set(index_bytes(tmp_path / "one")) == {
        "manifest.json",
        "second_moment.safetensors",
        "autocorrelation.safetensors",
        "shards/000000.safetensors",
        "shards/000001.safetensors",
        "shards/000002.safetensors",
    }


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "float16"])
def test_other_readers_of_safetensors_read_a_shard(tmp_path: Path, codec: CodecName) -> None:
    write_small_index(tmp_path, small_manifest(codec))
    file = tmp_path / "shards" / "000001.safetensors"
    tensors = load_file(file)
    values = tensors["codes"].float() * tensors["scales"][:, None]
    assert torch.equal(values, small_projected_gradients(range(3, 6)))
    assert tensors["tokens"].dtype is torch.int32
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "trackstar-shard-4"
    assert metadata["manifest_digest"] == small_manifest(codec).identity_digest()
    assert (metadata["number"], metadata["first_row"]) == ("1", "3")
    assert (metadata["next_record"], metadata["next_window"], metadata["skipped"]) == ("6", "0", "3")
    found = load_file(tmp_path / "second_moment.safetensors")
    assert all(torch.equal(found[name], SECOND_MOMENT[name]) for name in SECOND_MOMENT)


@pytest.mark.parametrize(
    ("codec", "bits", "levels"),
    [
        ("int8", 8, np.arange(-128, 128)),
        ("4-bit", 4, np.array([-126, -95, -74, -58, -43, -30, -18, -6, 6, 18, 30, 43, 58, 74, 95, 126]) / 46),
        ("2-bit", 2, np.array([-80, -24, 24, 80]) / 53),
        ("1-bit", 1, np.array([-1.0, 1.0])),
    ],
)
def test_low_bit_codes_follow_the_format(tmp_path: Path, codec: CodecName, bits: int, levels: np.ndarray) -> None:
    """Read from the bytes by FORMAT.md alone: lowest bits first, levels, factors ‖u‖²/⟨c, u⟩, norms."""
    write_small_index(tmp_path, small_manifest(codec))
    tensors = load_file(tmp_path / "shards" / "000001.safetensors")
    bytes_of = tensors["codes"].numpy()
    bit = np.unpackbits(bytes_of, axis=1, bitorder="little").reshape(3, 2, SIDE**2, bits)
    c = levels[(bit * 2 ** np.arange(bits)).sum(axis=3)]
    u = small_projected_gradients(range(3, 6), SIDE).double().numpy().reshape(3, 2, SIDE**2)
    factors = (u**2).sum(axis=2) / (c * u).sum(axis=2)
    np.testing.assert_allclose(tensors["scales"].numpy(), factors, rtol=1e-5)
    np.testing.assert_allclose(tensors["norms"].numpy(), np.sqrt((u**2).sum(axis=(1, 2))), rtol=1e-6)
    found = store.Index.open(tmp_path).shards[1].stored.decode().double().numpy()
    np.testing.assert_allclose(found, (c * factors[:, :, None]).reshape(3, -1), rtol=1e-5)


@pytest.mark.parametrize("codec", list(GOLDEN))
def test_codes_come_first_and_begin_at_a_page(tmp_path: Path, codec: CodecName) -> None:
    write_small_index(tmp_path, small_manifest(codec))
    for shard in store.Index.open(tmp_path).shards:
        name, place = next(iter(shard.file.tensors.items()))
        assert name == "codes"
        assert place.start % 4096 == 0
        assert shard.path.stat().st_size == shard.file.size


def test_an_independent_reader_of_the_format_computes_the_same_digest(tmp_path: Path) -> None:
    """As FORMAT.md specifies it: BLAKE2b-256 of the file with bytes 35 to 98 as "0"."""
    write_small_index(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        content = file.read_bytes()
        expected = hashlib.blake2b(content[:35] + b"0" * 64 + content[99:], digest_size=32).hexdigest()
        assert content[35:99].decode("ascii") == expected
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    digest = manifest.pop("digest")
    text = json.dumps(manifest, indent=1) + "\n"
    assert digest == hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def test_a_large_header_moves_the_data_by_whole_pages(tmp_path: Path) -> None:
    tensors = {f"{number:04d}": torch.tensor([float(number)]) for number in range(300)}
    tensor_file.write_tensor_file(tmp_path / "many", tensors, {})
    file = tensor_file.open_tensor_file(tmp_path / "many")
    assert file.tensors["0000"].start % 4096 == 0
    assert file.tensors["0000"].start > 4096
    assert tensor_reading.map_tensor(file, "0123").item() == 123.0
    tensor_reading.check_digest(file)


def test_tensors_of_every_shape_and_type_come_back(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {
        str(dtype): torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype) for dtype in tensor_file.DTYPE_NAMES
    }
    tensors |= {"none": torch.empty(0, 5), "scalar": torch.tensor(3.5), "part": torch.arange(12.0).view(3, 4).T[1:]}
    tensor_file.write_tensor_file(tmp_path / "all", tensors, {})
    file = tensor_file.open_tensor_file(tmp_path / "all")
    for name, tensor in tensors.items():
        found = tensor_reading.map_tensor(file, name)
        assert found.dtype is tensor.dtype
        assert torch.equal(found, tensor)


def test_format_md_names_every_field_tensor_and_file(tmp_path: Path) -> None:
    text = (Path(shard_files.__file__).parent / "FORMAT.md").read_text()
    write_small_index(tmp_path)
    write_small_index(tmp_path / "whitened", small_manifest("1-bit"))
    with store.IndexWriter.open(tmp_path / "unfinished", small_manifest()) as writer:
        writer.save_progress({"sums": torch.ones(1)})
    store.Index.open(tmp_path).save_derived("x", {"a": torch.ones(1)})
    names: set[str] = set()
    for file in tmp_path.rglob("*.safetensors"):
        opened = tensor_file.open_tensor_file(file)
        names |= set(opened.metadata) | {opened.metadata["format"]}
        names |= set(opened.tensors) if opened.metadata["format"] == shard_files.SHARD_FORMAT else set()
    for folder in (tmp_path, tmp_path / "whitened"):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["model"]["configuration"] = None  # its names are those of the model's own configuration
        names |= set(_keys(manifest))
    assert len(names) > 60
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def _keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(key for part in value.values() for key in _keys(part))]
    return [key for part in value for key in _keys(part)] if isinstance(value, list) else []


# Hostile headers: the replacement of a valid header, and the expected error.
GOOD: dict[str, Any] = {
    "__metadata__": {"digest": "0" * 64},
    "codes": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "scales": {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]},
}


def _with(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "scales": {**GOOD["scales"], **changes}}


HEADERS: dict[str, tuple[Any, str]] = {
    "negative offsets": (_with(data_offsets=[-8, 0]), r"scales.data_offsets is \[-8, 0\], expected \[16, 24\]"),
    "overlapping tensors": (_with(data_offsets=[8, 16]), r"scales.data_offsets is \[8, 16\], expected \[16, 24\]"),
    "a hole": (_with(data_offsets=[20, 28]), r"scales.data_offsets is \[20, 28\], expected \[16, 24\]"),
    "offsets past the end": (_with(shape=[2**40], data_offsets=[16, 16 + 2**42]), "4120 bytes, expected 4398046515216"),
    "a shape past all numbers": (_with(shape=[2**62, 2**62], data_offsets=[16, 24]), r"scales.shape is \[4611"),
    "offsets that are true": (
        {**GOOD, "codes": {"dtype": "U8", "shape": [1], "data_offsets": [False, True]}},
        r"codes.data_offsets is \[False, True\]",
    ),
    "an unknown dtype": (_with(dtype="F8_E4M3"), "scales.dtype is 'F8_E4M3', expected one of F64, F32"),
    "a dtype that is a list": (_with(dtype=["F32"]), r"scales.dtype is \['F32'\], expected one of F64, F32"),
    "a negative shape": (_with(shape=[-2]), r"scales.shape is \[-2\], expected a list of whole numbers"),
    "a shape with a fraction": (_with(shape=[2.0]), r"scales.shape is \[2.0\], expected a list of whole numbers"),
    "a shape that is a number": (_with(shape=2), "scales.shape is 2, expected a list of whole numbers"),
    "no shape": (
        {**GOOD, "scales": {"dtype": "F32"}},
        "scales is {'dtype': 'F32'}, expected dtype, shape and data_off",
    ),
    "a tensor that is a list": ({**GOOD, "scales": []}, r"scales is \[\], expected dtype, shape and data_offsets"),
    "metadata that is no string": (
        {**GOOD, "__metadata__": {"digest": "0" * 64, "number": 3}},
        "__metadata__.number is 3, expected a string",
    ),
    "a digest that is too short": (
        {**GOOD, "__metadata__": {"digest": "0"}},
        "__metadata__.digest is '0', expected 64",
    ),
    "a digest twice": (
        b'{"__metadata__":{"digest":"' + b"0" * 64 + b'","digest":"1"}}',
        "'digest' is repeated",
    ),
    "no metadata": ({"codes": GOOD["codes"]}, "the beginning is b'"),
    "no JSON": (b'{"__metadata__":{"digest":"', "the text is not JSON"),
    "not ASCII": (b'{"__metadata__":{"digest":"\xc3\xa4', "byte 27 is 195, expected ASCII"),
    "deep nesting": (b'{"__metadata__":{"digest":"","x":' + b"[" * 200_000, "nested too deeply"),
    "a name that is a path": (
        {**GOOD, "../../etc/passwd": {"dtype": "F64", "shape": [9], "data_offsets": [24, 96]}},
        "4120 bytes, expected 4192",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    header, expected = HEADERS[name]
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % 4096)
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    with pytest.raises(DamagedIndexError, match=expected) as caught:
        tensor_file.open_tensor_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "0 bytes, expected at least a header"),
        (b"1234567", "7 bytes, expected at least a header"),
        (b"\xff" * 9000, "a header of 18446744073709551615 bytes in a file of 9000"),
        ((2**40).to_bytes(8, "little") + bytes(5000), "a header of 1099511627776 bytes in a file of 5008"),
        ((4088).to_bytes(8, "little") + bytes(4087), "a header of 4088 bytes in a file of 4095"),
        ((4089).to_bytes(8, "little") + bytes(5000), "a header of 4089 bytes in a file of 5008"),
        (bytes(5000), "a header of 0 bytes in a file of 5000"),
    ],
)
def test_a_hostile_length_is_refused_without_reading_that_many_bytes(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedIndexError, match=expected):
        tensor_file.open_tensor_file(path)


def test_a_sparse_file_of_a_terabyte_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    with path.open("wb") as file:
        file.write((2**39 - 8).to_bytes(8, "little"))
        file.truncate(2**40)
    with pytest.raises(DamagedIndexError, match="a header of 549755813880 bytes"):
        tensor_file.open_tensor_file(path)


def test_a_big_endian_machine_is_refused_before_it_writes_other_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.IndexWriter.open(tmp_path, small_manifest()) as writer:
        monkeypatch.setattr(shard_files.sys, "byteorder", "big")
        with pytest.raises(StoreError, match="big-endian"):
            writer.write_shard(small_content(0, 3))
