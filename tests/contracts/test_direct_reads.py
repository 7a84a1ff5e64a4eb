"""Rows read without the page cache equal those of the mapped files, and damage is reported."""

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch

from small_index import EXAMPLES, small_manifest, write_small_index
from trackstar import store
from trackstar.choices import CODECS, CodecName
from trackstar.errors import DamagedIndexError
from trackstar.store import direct_reads, tensor_file


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_rows_are_those_of_the_mapped_files(codec: CodecName, rows: int, tmp_path: Path):
    write_small_index(tmp_path, small_manifest(codec))
    found = []
    for direct in (True, False):
        index = store.Index.open(tmp_path, direct_reads=direct)
        chunks = [(c.first_row, c.stored.decode(), c.stored.norms.clone()) for c in index.iterate(rows)]
        assert [first for first, _, _ in chunks] == [first for first, _, _ in found] or not found
        found = found or chunks
        for mine, theirs in zip(chunks, found, strict=True):
            assert torch.equal(mine[1], theirs[1])
            assert torch.equal(mine[2], theirs[2])
    assert sum(len(values) for _, values, _ in found) == EXAMPLES


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
def test_parts_of_any_size_hold_the_right_rows(rows: int, tmp_path: Path):
    """Rows that begin and end within pages, in two alternating buffers."""
    path = tmp_path / "file.safetensors"
    values = torch.arange(64 * 1000, dtype=torch.int32).view(64, 1000)
    tensor_file.write_tensor_file(path, {"odd": torch.ones(3, dtype=torch.uint8), "codes": values}, {})
    file = tensor_file.open_tensor_file(path)
    parts = [part.clone() for part in direct_reads.direct_rows(file, "codes", rows)]
    assert [len(part) for part in parts] == [min(rows, 64 - first) for first in range(0, 64, rows)]
    assert torch.equal(torch.cat(parts), values)


def test_a_file_system_without_direct_reads_is_read_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_small_index(tmp_path)
    original = os.open

    def refusing(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(path, flags, *rest)

    expected = [chunk.stored.decode() for chunk in store.Index.open(tmp_path).iterate(2)]
    monkeypatch.setattr(os, "open", refusing)
    found = [chunk.stored.decode() for chunk in store.Index.open(tmp_path, direct_reads=True).iterate(2)]
    assert all(map(torch.equal, found, expected))


def test_a_file_system_that_refuses_direct_reads_after_opening_is_read_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_small_index(tmp_path)
    original, refused = os.preadv, []

    def refusing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(descriptor, buffers, offset)

    expected = [chunk.stored.decode() for chunk in store.Index.open(tmp_path).iterate(2)]
    index = store.Index.open(tmp_path, direct_reads=True)
    monkeypatch.setattr(direct_reads.os, "preadv", refusing)
    found = [chunk.stored.decode() for chunk in index.iterate(2)]
    assert all(map(torch.equal, found, expected))
    assert refused


def test_a_missing_or_shortened_file_is_damage(tmp_path: Path):
    write_small_index(tmp_path)
    index = store.Index.open(tmp_path, direct_reads=True)
    shard = tmp_path / "shards" / "000001.safetensors"
    os.truncate(shard, 4100)
    with pytest.raises(DamagedIndexError, match=r"000001.safetensors: ends at byte \d+, expected \d+ bytes"):
        list(index.iterate(2))
    shard.unlink()
    with pytest.raises(DamagedIndexError, match=r"000001.safetensors: missing"):
        list(index.iterate(2))


def test_only_a_store_larger_than_memory_is_read_directly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_small_index(tmp_path)
    assert not store.Index.open(tmp_path)._direct
    from trackstar.store import reader

    class Full:
        available = 100

    monkeypatch.setattr(reader.psutil, "virtual_memory", Full)
    assert store.Index.open(tmp_path)._direct
