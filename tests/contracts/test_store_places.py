"""Valid and invalid folders of an index, permissions, and the cache of derived results."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from small_index import small_content, small_manifest, write_small_index
from trackstar import store
from trackstar.errors import StoreError
from trackstar.store.files import durable as durable_files

SHARD = "shards/000001.safetensors"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A finished index."""
    write_small_index(tmp_path / "index")
    return tmp_path / "index"


# Invalid folders


@pytest.mark.parametrize("name", ["notes.txt", "shards/mine", "second_moment.safetensors", ".git/HEAD"])
def test_a_folder_with_other_content_is_refused_and_not_changed(tmp_path: Path, name: str) -> None:
    content = tmp_path / name
    content.parent.mkdir(exist_ok=True)
    content.write_text("mine")
    name = content.relative_to(tmp_path).parts[0]
    with pytest.raises(
        StoreError, match=f"contains '{name}' but no manifest.json, expected an index or an empty folder"
    ):
        store.IndexWriter.open(tmp_path, small_manifest())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert content.read_text() == "mine"


def test_a_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("mine")
    for place in (tmp_path / "index", tmp_path / "index" / "below"):
        with pytest.raises(StoreError, match=r"cannot be written \((Not a directory|File exists)\); make its folder"):
            store.IndexWriter.open(place, small_manifest())
        with pytest.raises(StoreError, match="not an index"):
            store.Index.open(place)
    assert (tmp_path / "index").read_text() == "mine"


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_small_index(tmp_path / "a" / "b" / "c")
    assert store.Index.open(str(tmp_path / "a" / "b" / "c")).rows == 8


def test_files_that_the_user_put_beside_an_index_do_no_harm(index: Path) -> None:
    (index / "README.txt").write_text("what this is")
    (index / "shards" / ".DS_Store").write_bytes(b"\0")
    assert store.Index.open(index).rows == 8
    with store.IndexWriter.open(index, small_manifest()) as writer:
        assert writer.completed


@contextlib.contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder owned by this process, without the superuser's permission to write anywhere."""
    superuser = os.geteuid() == 0
    folder = Path(tempfile.mkdtemp(dir=Path(tempfile.gettempdir()).resolve()))
    folder.chmod(0o755)
    if superuser:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if superuser:
            os.seteuid(0)
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)


def test_a_read_only_folder_can_be_read_but_stores_no_derived_results() -> None:
    with unprivileged() as folder:
        write_small_index(folder / "index")
        for path in (folder / "index" / "shards", folder / "index"):
            path.chmod(0o555)
        index = store.Index.open(folder / "index")
        assert index.example(5).row == 5
        assert index.save_derived("whitening", {"w": torch.ones(3)}) is False
        assert index.load_derived("whitening") is None
        with pytest.raises(StoreError, match=r"cannot be written \(Permission denied\); make its folder writable"):
            store.IndexWriter.open(folder / "index" / "new", small_manifest())
        assert store.verify(folder / "index").ok


def test_an_unreadable_file_is_named() -> None:
    with unprivileged() as folder:
        write_small_index(folder / "index")
        (folder / "index" / SHARD).chmod(0)
        with pytest.raises(
            StoreError, match=f"{SHARD}: cannot be read \\(Permission denied\\); make the file readable"
        ):
            store.Index.open(folder / "index")
        (folder / "index" / "manifest.json").chmod(0)
        with pytest.raises(StoreError, match=r"manifest.json: cannot be read \(Permission denied\)"):
            store.Index.open(folder / "index")


# Derived caches


def test_derived_tensors_come_back_until_they_are_damaged_or_the_index_changes(index: Path, tmp_path: Path) -> None:
    tensors = {"whitening": torch.arange(6.0).view(2, 3), "ids": torch.arange(3)}
    opened = store.Index.open(index)
    assert opened.load_derived("whitened-train") is None
    assert opened.save_derived("whitened-train", tensors) is True
    found = opened.load_derived("whitened-train")
    assert found is not None
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert store.Index.open(index).load_derived("whitened-train") is not None
    assert opened.load_derived("another") is None
    file = "derived/whitened-train.safetensors"
    shutil.copyfile(index / file, index / "derived" / "renamed.safetensors")
    assert opened.load_derived("renamed") is None
    content = (index / file).read_bytes()
    (index / file).write_bytes(content[:-1] + b"\xff")
    assert opened.load_derived("whitened-train") is None
    assert opened.save_derived("whitened-train", tensors) is True
    assert opened.load_derived("whitened-train") is not None
    write_small_index(tmp_path / "larger", examples=9)
    shutil.copytree(index / "derived", tmp_path / "larger" / "derived")
    assert store.Index.open(tmp_path / "larger").load_derived("whitened-train") is None


def test_no_derived_results_are_stored_for_an_unfinished_index(tmp_path: Path) -> None:
    with store.IndexWriter.open(tmp_path, small_manifest()) as writer:
        writer.write_shard(small_content(0, 3))
    index = store.Index.open(tmp_path, allow_incomplete=True)
    assert index.save_derived("x", {"a": torch.ones(1)}) is False
    assert index.load_derived("x") is None


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_a_derived_cache_that_cannot_be_written_is_no_error(
    index: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    opened = store.Index.open(index)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(durable_files.os, step, refuse)
        assert opened.save_derived("x", {"a": torch.ones(1)}) is False
    assert list((index / "derived").glob("*")) == []
