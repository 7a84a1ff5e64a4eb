"""Damage is found in whatever is read, without a run of `verify`; indexes of the version before are still read."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shard_bytes import in_format_3, in_format_4, in_format_5, sealed
from small_index import small_manifest, write_small_index
from trackstar import store
from trackstar.choices import CodecName
from trackstar.errors import DamagedIndexError, IndexMismatchError, StoreError

SHARD = "shards/000001.safetensors"
READS: dict[str, Callable[[store.Index], object]] = {
    "a scan": lambda index: [chunk.stored.decode().sum() for chunk in index.iterate(2)],
    "some rows": lambda index: index.some_rows([3, 4, 5]).decode(),
    "all rows": lambda index: index.shards[1].stored.decode(),
    "examples": lambda index: list(index.examples()),
    "losses": lambda index: index.some_losses([3, 4, 5]),
    "norms": lambda index: index.norms(),
    "records and windows": lambda index: [(shard.records, shard.windows) for shard in index.shards],
    "target counts": lambda index: [shard.target_counts for shard in index.shards],
}
"""What reads which tensors is listed in `PARTS`."""
PARTS: dict[str, tuple[str, ...]] = {
    "codes": ("a scan", "some rows", "all rows"),
    "scales": ("a scan", "some rows", "all rows"),
    "norms": ("a scan", "some rows", "norms"),
    "losses": ("losses", "examples"),
    "records": ("examples", "records and windows"),
    "windows": ("examples", "records and windows"),
    "target_counts": ("target counts",),
    "tokens": ("examples",),
    "target_masks": ("examples",),
    "text": ("examples",),
    "ids": ("examples",),
    "parents": ("examples",),
    "token_offsets": ("examples",),
    "text_offsets": ("examples",),
    "id_offsets": ("examples",),
    "parent_offsets": ("examples",),
    "metadata_offsets": ("examples",),
    "metadata": ("examples",),
    "checksums": ("a scan", "examples"),
}


def flip(file: Path, position: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def test_every_tensor_of_a_shard_is_listed_above(tmp_path: Path) -> None:
    write_small_index(tmp_path)
    assert set(store.Index.open(tmp_path).shards[0].file.tensors) == set(PARTS)


@pytest.mark.parametrize("codec", ["float16", "1-bit"])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("part", list(PARTS))
def test_one_flipped_bit_is_found_by_every_read_of_its_tensor(
    tmp_path: Path, part: str, direct: bool, codec: CodecName
) -> None:
    write_small_index(tmp_path, small_manifest(codec))
    info = store.Index.open(tmp_path).shards[1].file.tensors[part]
    generator = random.Random(f"{part} {direct} {codec}")
    position = generator.randrange(info.start, info.stop)
    flip(tmp_path / SHARD, position, generator.randrange(8))
    for name in PARTS[part]:
        with pytest.raises(DamagedIndexError, match=rf"{SHARD}: bytes \d+ to \d+ \(.*\) are not those that") as caught:
            READS[name](store.Index.open(tmp_path, direct_reads=direct))
        block = re.search(r"bytes (\d+) to (\d+)", str(caught.value))
        assert block is not None
        assert int(block[1]) <= position < int(block[2])


@pytest.mark.parametrize("position", [40, 150, 4000], ids=["the digest", "the metadata", "the padding"])
def test_a_flipped_bit_of_the_header_is_found_when_the_shard_is_opened_or_read(tmp_path: Path, position: int) -> None:
    write_small_index(tmp_path)
    flip(tmp_path / SHARD, position, 0)
    with pytest.raises(StoreError, match=SHARD):
        READS["a scan"](store.Index.open(tmp_path))


def test_undamaged_shards_agree_with_checksums_that_are_computed_independently(tmp_path: Path) -> None:
    write_small_index(tmp_path)
    for file in (tmp_path / "shards").iterdir():
        assert sealed(file.read_bytes()) == file.read_bytes()


def test_large_codes_span_blocks_and_only_the_blocks_of_a_row_are_compared(tmp_path: Path) -> None:
    """A damaged row is found; rows in other blocks are still read, and a second pass compares nothing."""
    from trackstar.store import tensor_reading
    from trackstar.store.block_checksums import ComparedBlocks
    from trackstar.store.tensor_file import open_tensor_file, write_tensor_file

    values = torch.randn(100, 5000)  # rows of 20,000 bytes: several to a block, some across two
    file = tmp_path / "codes.safetensors"
    write_tensor_file(file, {"codes": values, "other": torch.arange(5000)}, {}, checksums=True)
    flip(file, 4096 + 50 * 20_000 + 7, 3)
    opened = open_tensor_file(file)
    assert opened.checksums is not None
    codes = tensor_reading.map_tensor(opened, "codes")
    compared = ComparedBlocks(opened.checksums.blocks)
    for row in (*range(45), *range(56, 100)):
        tensor_reading.compare_mapped(opened, codes, row, row + 1, compared)
    with pytest.raises(DamagedIndexError, match=r"bytes 987136 to 1052672 \(codes of rows 49 to 52\) are not those"):
        tensor_reading.compare_mapped(opened, codes, 50, 51, compared)
    flip(file, 4096 + 10 * 20_000, 0)
    tensor_reading.compare_mapped(opened, tensor_reading.map_tensor(opened, "codes"), 10, 11, compared)
    with pytest.raises(DamagedIndexError, match="codes of rows"):
        tensor_reading.compare_mapped(opened, tensor_reading.map_tensor(opened, "codes"), 10, 11, None)


@pytest.mark.parametrize("side", [4, 8])
@pytest.mark.parametrize("codec", ["float16", "1-bit"])
def test_an_index_of_format_version_5_is_read(tmp_path: Path, codec: CodecName, side: int) -> None:
    """Also one that stores R_train of fewer examples than a third of a block's dimensions, as that version does."""
    write_small_index(tmp_path / "index", small_manifest(codec, side=8 if codec == "1-bit" else side))
    old = store.Index.open(in_format_5(tmp_path / "index", tmp_path / "old"))
    assert (old.manifest.format_version, old.notes) == (5, ())
    index = store.Index.open(tmp_path / "index")
    for found, expected in zip(old.examples(), index.examples(), strict=True):
        assert found.example.text == expected.example.text
        assert found.metadata == expected.metadata
    assert torch.equal(old.shards[0].stored.codes, index.shards[0].stored.codes)
    assert store.verify(tmp_path / "old").ok
    name = "whitening" if codec == "1-bit" else "autocorrelation"
    assert old.tensors(name).keys()
    assert old.manifest.to_json() == (tmp_path / "old" / "manifest.json").read_text()


@pytest.mark.parametrize("codec", ["float16", "1-bit"])
def test_an_index_of_format_version_4_is_read_without_metadata(tmp_path: Path, codec: CodecName) -> None:
    write_small_index(tmp_path / "index", small_manifest(codec))
    old = store.Index.open(in_format_4(tmp_path / "index", tmp_path / "old"))
    assert (old.manifest.format_version, old.notes) == (4, ())
    assert old.manifest.corpora[0].metadata == ()
    index = store.Index.open(tmp_path / "index")
    for found, expected in zip(old.examples(), index.examples(), strict=True):
        assert (found.example.text, found.metadata) == (expected.example.text, {})
        assert found.example.token_ids.tolist() == expected.example.token_ids.tolist()
    assert [bool(stored.metadata) for stored in index.examples()] == [row % 3 > 0 for row in range(index.rows)]
    assert torch.equal(old.shards[0].stored.codes, index.shards[0].stored.codes)
    assert store.verify(tmp_path / "old").ok


@pytest.mark.parametrize("codec", ["float32", "float16", "1-bit"])
def test_an_index_of_format_version_3_is_read(tmp_path: Path, codec: CodecName) -> None:
    write_small_index(tmp_path / "new", small_manifest(codec))
    old = in_format_3(tmp_path / "new", tmp_path / "old")
    index, same = store.Index.open(old), store.Index.open(tmp_path / "new")
    assert index.manifest.format_version == 3
    assert (index.manifest.model.configuration, index.manifest.model.location) == (None, None)
    assert torch.equal(index.shards[1].stored.decode(), same.shards[1].stored.decode())
    assert [one.example.text for one in index.examples()] == [one.example.text for one in same.examples()]
    assert store.verify(old).ok
    assert index.manifest.to_json() == (old / "manifest.json").read_text()


# The digests that the version before wrote for this index, as its own test recorded them.
RELEASED: dict[CodecName, str] = {
    "float32": "997a1a27a985e58fb64440b93a02240bb96dc9ac7998adf5395b18c239b02dda",
    "float16": "34f09e2181a27b736cc431896b7ad2626a131bc780a208fe40d9b4a66cedff1e",
    "1-bit": "cac1accdfa51bf97a99e60eb14a342b5babb9324317bb4081ca54a529864eb31",
}


@pytest.mark.parametrize("codec", list(RELEASED))
def test_the_old_format_of_these_tests_is_the_one_that_was_released(tmp_path: Path, codec: CodecName) -> None:
    write_small_index(tmp_path / "new", small_manifest(codec, side=8))
    completion = store.Index.open(in_format_3(tmp_path / "new", tmp_path / "old")).manifest.completion
    assert completion is not None
    assert completion.shards[1].digest == RELEASED[codec]


def test_an_old_index_is_not_extended(tmp_path: Path) -> None:
    write_small_index(tmp_path / "new")
    old = in_format_3(tmp_path / "new", tmp_path / "old")
    with pytest.raises(IndexMismatchError, match="has format version 3, which is read but not extended; copy it"):
        store.IndexWriter.open(old, small_manifest())
