"""Faults of an index on the disk: opening reports each in one line, and resuming repairs what it can."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shard_bytes import DIGEST, sealed, sealed_manifest
from small_index import index_bytes, small_content, small_manifest, write_small_index
from trackstar import store
from trackstar.errors import DamagedIndexError, IncompleteIndexError, IndexMismatchError, StoreError
from trackstar.store.shard_content import ShardPlan
from trackstar.store.shard_files import write_shard_file

SHARD = "shards/000001.safetensors"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "index"
    write_small_index(path)
    return path


@pytest.fixture
def index(tmp_path: Path, finished: Path) -> Path:
    """A finished index to damage."""
    shutil.copytree(finished, tmp_path / "index")
    return tmp_path / "index"


def cut(name: str, length: int) -> Callable[[Path], None]:
    """Keep only the first `length` bytes of a file; a negative length removes that many from the end."""

    def change(path: Path) -> None:
        size = (path / name).stat().st_size
        os.truncate(path / name, length if length >= 0 else size + length)

    return change


def overwrite(name: str, place: int, content: bytes) -> Callable[[Path], None]:
    """Write `content` at byte `place` of a file; a negative place counts from the end."""

    def change(path: Path) -> None:
        old = (path / name).read_bytes()
        place_from_start = place if place >= 0 else len(old) + place
        new = old[:place_from_start] + content + old[place_from_start + len(content) :]
        (path / name).write_bytes(new)

    return change


def seal(index: Path, name: str) -> None:
    """Give a shard the checksums and digests that it has, so that only its values can show the damage."""
    file = index / name
    file.write_bytes(sealed(file.read_bytes()))
    manifest = json.loads((index / "manifest.json").read_text())
    for entry in manifest["completion"]["shards"]:
        if entry["file"] == file.name:
            entry["digest"] = file.read_bytes()[DIGEST].decode("ascii")
    (index / "manifest.json").write_text(sealed_manifest(manifest))


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def replace_by(name: str, other: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        shutil.copyfile(path / other, path / name)

    return change


def shard_of_another_index(path: Path) -> None:
    write_shard_file(path / "shards", ShardPlan.of(small_manifest(seed=8)), 1, small_content(3, 6))


def shard_with_other_content(path: Path) -> None:
    """An intact shard of this index, but not the one in the manifest."""
    write_shard_file(path / "shards", ShardPlan.of(small_manifest()), 1, small_content(0, 3))


def tensors_of_another_run(path: Path) -> None:
    other = path.parent / "other"
    with store.IndexWriter.open(other, small_manifest()) as writer:
        writer.write_tensors("autocorrelation", {"blocks": torch.zeros(2)})
    shutil.copyfile(other / "autocorrelation.safetensors", path / "autocorrelation.safetensors")


# Each: damage to a finished index, and the error that opening it raises.
FAULTS: dict[str, tuple[Callable[[Path], object], type[StoreError], str]] = {
    "no manifest": (remove("manifest.json"), StoreError, r"not an index \(no manifest.json\); pass the folder that"),
    "an empty manifest": (cut("manifest.json", 0), DamagedIndexError, "manifest.json: the text is not JSON"),
    "half a manifest": (cut("manifest.json", 700), DamagedIndexError, "manifest.json: the text is not JSON"),
    "a manifest of zeros": (
        overwrite("manifest.json", 0, bytes(3000)),
        DamagedIndexError,
        "manifest.json: the text is not JSON",
    ),
    "an edited manifest": (
        overwrite("manifest.json", 21, b"9"),
        DamagedIndexError,
        "manifest.json: format_version is 9, expected at most 6",
    ),
    "a missing shard": (remove(SHARD), DamagedIndexError, f"{SHARD}: missing; restore"),
    "an empty shard": (cut(SHARD, 0), DamagedIndexError, f"{SHARD}: 0 bytes, expected at least a header"),
    "a shard cut in its header": (cut(SHARD, 1000), DamagedIndexError, f"{SHARD}: a header of 4088 bytes in a file of"),
    "a shard cut in its data": (cut(SHARD, -1), DamagedIndexError, rf"{SHARD}: \d+ bytes, expected \d+"),
    "a shard with a byte more": (
        lambda path: (path / SHARD).write_bytes((path / SHARD).read_bytes() + b"x"),
        DamagedIndexError,
        rf"{SHARD}: \d+ bytes, expected \d+",
    ),
    "a shard of zeros": (
        overwrite(SHARD, 0, bytes(4600)),
        DamagedIndexError,
        f"{SHARD}: a header of 0 bytes in a file of",
    ),
    "another number of tensors": (
        overwrite(SHARD, 500, b'"codez"'),
        DamagedIndexError,
        f"{SHARD}: ",
    ),
    "two shards exchanged": (
        replace_by(SHARD, "shards/000000.safetensors"),
        DamagedIndexError,
        f"{SHARD}: number is 0, expected 1",
    ),
    "a shard of another index": (
        shard_of_another_index,
        IndexMismatchError,
        f"{SHARD}: belongs to the index with manifest digest '[0-9a-f]+', expected '[0-9a-f]+'; move the file back",
    ),
    "another shard in its place": (
        shard_with_other_content,
        DamagedIndexError,
        f"{SHARD}: digest is '[0-9a-f]+', expected [0-9a-f]+, the manifest's",
    ),
    "tensors that are no shard": (
        replace_by(SHARD, "second_moment.safetensors"),
        DamagedIndexError,
        f"{SHARD}: format 'trackstar-tensors-1', expected 'trackstar-shard-4'",
    ),
    "no second moment": (remove("second_moment.safetensors"), DamagedIndexError, "second_moment.safetensors: missing"),
    "no autocorrelation": (
        remove("autocorrelation.safetensors"),
        DamagedIndexError,
        "autocorrelation.safetensors: mis",
    ),
    "another autocorrelation": (
        tensors_of_another_run,
        DamagedIndexError,
        "autocorrelation.safetensors: digest [0-9a-f]+, expected [0-9a-f]+, the manifest's",
    ),
    "half an autocorrelation": (
        cut("autocorrelation.safetensors", 5000),
        DamagedIndexError,
        "autocorrelation.safetensors: 5000 bytes, expected 6144",
    ),
    "a folder in a shard's place": (
        lambda path: ((path / SHARD).unlink(), (path / SHARD).mkdir()),
        StoreError,
        f"{SHARD}: cannot be read \\(Is a directory\\)",
    ),
    "a folder in the manifest's place": (
        lambda path: ((path / "manifest.json").unlink(), (path / "manifest.json").mkdir()),
        StoreError,
        r"manifest.json: cannot be read \(Is a directory\)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_opening_a_damaged_index_names_the_fault_in_one_line(index: Path, name: str) -> None:
    spoil, kind, expected = FAULTS[name]
    spoil(index)
    before = index_bytes(index)
    with pytest.raises(kind, match=expected) as caught:
        store.Index.open(index)
    message = str(caught.value)
    assert message.startswith(str(index))
    assert "\n" not in message
    assert "; " in message  # and what to do
    assert type(caught.value) is kind
    assert index_bytes(index) == before


MENDED = [name for name in FAULTS if "manifest" not in name and "folder" not in name and "another index" not in name]


@pytest.mark.parametrize("name", MENDED)
def test_resuming_repairs_a_damaged_index_byte_for_byte(index: Path, finished: Path, name: str) -> None:
    spoil, _, _ = FAULTS[name]
    spoil(index)
    notes: list[str] = []
    write_small_index(index, on_note=notes.append)
    assert notes[0].startswith("the finished index is damaged and will be repaired: ")
    assert all("\n" not in note for note in notes)
    assert index_bytes(index) == index_bytes(finished)


def test_resuming_never_removes_a_shard_of_another_index(index: Path) -> None:
    shard_of_another_index(index)
    before = index_bytes(index)
    with pytest.raises(IndexMismatchError, match=f"{SHARD}: belongs to the index with"):
        write_small_index(index)
    assert index_bytes(index) == before


def unfinished(path: Path) -> None:
    """An unfinished index of two full shards."""
    with store.IndexWriter.open(path, small_manifest()) as writer:
        writer.write_tensors("second_moment", {"rows/a": torch.arange(5.0) + 1, "columns/a": torch.arange(3.0) + 2})
        for first in (0, 3):
            writer.write_shard(small_content(first, first + 3))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("place", [10, 50, 300, 3000, 4100, -1])
def test_a_damaged_shard_of_an_unfinished_index_is_noted_and_written_again(
    tmp_path: Path, finished: Path, number: int, place: int
) -> None:
    unfinished(tmp_path)
    file = tmp_path / "shards" / f"00000{number}.safetensors"
    overwrite(str(file), place, b"\xa5")(tmp_path)
    notes: list[str] = []
    with store.IndexWriter.open(tmp_path, small_manifest(), on_note=notes.append) as writer:
        assert len(writer.shards_done) == number
        assert writer.resume_point.row == 3 * number
        assert not file.exists()
    assert notes[0].startswith("checking 2 shard files (0.0 MB) of an earlier run")
    assert notes[1].startswith(f"shard {number} is damaged and will be written again: {file}: ")
    write_small_index(tmp_path)
    assert index_bytes(tmp_path) == index_bytes(finished)


def test_a_shard_after_a_missing_one_is_noted_and_adopted_once_the_gap_is_filled(tmp_path: Path) -> None:
    unfinished(tmp_path)
    before = index_bytes(tmp_path)
    inode = (tmp_path / SHARD).stat().st_ino
    (tmp_path / "shards" / "000000.safetensors").unlink()
    notes: list[str] = []
    with store.IndexWriter.open(tmp_path, small_manifest(), on_note=notes.append) as writer:
        assert notes[-1] == "shard 0 is missing and will be written again; 1 later shards exist"
        assert writer.resume_point == store.ResumePoint(row=0, record=0, window=0, skipped=0)
        assert writer.adopt_shard() is None
        writer.write_shard(small_content(0, 3))
        adopted = writer.adopt_shard()
        assert adopted is not None
        assert (adopted.number, writer.resume_point.row) == (1, 6)
        assert writer.adopt_shard() is None
    assert index_bytes(tmp_path) == before
    assert (tmp_path / SHARD).stat().st_ino == inode


def test_a_damaged_shard_is_not_adopted(tmp_path: Path) -> None:
    unfinished(tmp_path)
    (tmp_path / "shards" / "000000.safetensors").unlink()
    overwrite(SHARD, 4100, b"\xa5")(tmp_path)
    notes: list[str] = []
    with store.IndexWriter.open(tmp_path, small_manifest(), on_note=notes.append) as writer:
        writer.write_shard(small_content(0, 3))
        assert writer.adopt_shard() is None
        assert notes[-1].startswith("shard 1 is damaged and will be written again: ")
        assert not (tmp_path / SHARD).exists()


def test_shards_after_a_missing_one_can_be_written_again(tmp_path: Path, finished: Path) -> None:
    unfinished(tmp_path)
    (tmp_path / "shards" / "000000.safetensors").unlink()
    write_small_index(tmp_path)
    assert index_bytes(tmp_path) == index_bytes(finished)


def test_the_resume_point_is_the_end_of_the_last_shard(tmp_path: Path) -> None:
    unfinished(tmp_path)
    with store.IndexWriter.open(tmp_path, small_manifest()) as writer:
        assert not writer.completed
        assert [shard.first_row for shard in writer.shards_done] == [0, 3]
        assert writer.resume_point == store.ResumePoint(row=6, record=6, window=0, skipped=3)


def test_an_unfinished_index_reports_its_progress_and_how_to_finish_it(tmp_path: Path) -> None:
    unfinished(tmp_path)
    expected = r"not finished \(2 shards with 6 examples so far\); make it again with the same settings to finish it"
    with pytest.raises(IncompleteIndexError, match=expected):
        store.Index.open(tmp_path)
    index = store.Index.open(tmp_path, allow_incomplete=True)
    assert (index.rows, len(index.shards)) == (6, 2)
    assert index.tensors("second_moment").keys() == {"rows/a", "columns/a"}


def test_leftover_partial_files_are_removed_and_noted(tmp_path: Path, finished: Path) -> None:
    unfinished(tmp_path)
    (tmp_path / "derived").mkdir()
    leftovers = ["manifest.json.partial", "shards/000002.safetensors.partial", "derived/x.safetensors.1-a.partial"]
    for name in leftovers:
        (tmp_path / name).write_bytes(b"half a file")
    somebodys = tmp_path / "thesis.partial"
    somebodys.write_bytes(b"not ours")
    notes: list[str] = []
    write_small_index(tmp_path, on_note=notes.append)
    assert somebodys.read_bytes() == b"not ours"
    somebodys.unlink()
    assert notes[:3] == [f"removed {Path(name).name}, which an interrupted run left unfinished" for name in leftovers]
    assert index_bytes(tmp_path) == index_bytes(finished)


def test_a_finished_index_is_not_changed(index: Path) -> None:
    times = {file: file.stat().st_mtime_ns for file in index.rglob("*.*") if file.name != ".lock"}
    notes: list[str] = []
    with store.IndexWriter.open(index, small_manifest(), on_note=notes.append) as writer:
        assert writer.completed
        assert len(writer.shards_done) == 3
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert notes == []


def test_a_shard_that_shrinks_while_it_is_open_is_damage_not_a_crash(index: Path) -> None:
    opened = store.Index.open(index)
    os.truncate(index / SHARD, 4200)
    with pytest.raises(DamagedIndexError, match=rf"{SHARD}: 4200 bytes, expected \d+"):
        _ = opened.shards[1].stored
    with pytest.raises(DamagedIndexError, match=rf"{SHARD}: ends at byte \d+, expected \d+ bytes"):
        opened.example(4)
    (index / SHARD).unlink()
    for read in (lambda: opened.shards[1].stored, lambda: opened.example(4)):
        with pytest.raises(DamagedIndexError, match=f"{SHARD}: missing"):
            read()


@pytest.mark.parametrize("kind", ["token", "text", "id", "parent"])
@pytest.mark.parametrize("offset", [-1, 10**12])
def test_invalid_offsets_are_damage_when_an_example_is_read(index: Path, kind: str, offset: int) -> None:
    place = store.Index.open(index).shards[1].file.tensors[f"{kind}_offsets"]
    overwrite(SHARD, place.start + 8, offset.to_bytes(8, "little", signed=True))(index)
    seal(index, SHARD)
    opened = store.Index.open(index)
    with pytest.raises(DamagedIndexError, match=rf"{SHARD}: {kind}_offsets of rows 0 to 1 do not rise from 0 to \d+"):
        opened.example(3)
    assert opened.example(5).row == 5


def test_text_that_is_not_utf_8_is_damage_and_names_its_row(index: Path) -> None:
    place = store.Index.open(index).shards[1].file.tensors["text"]
    overwrite(SHARD, place.stop - 1, b"\xff")(index)
    seal(index, SHARD)
    with pytest.raises(DamagedIndexError, match=f"{SHARD}: the text of row 2 is not UTF-8 at byte"):
        store.Index.open(index).example(5)


def test_a_second_moment_other_than_the_manifests_is_refused(tmp_path: Path) -> None:
    with store.IndexWriter.open(tmp_path, small_manifest()) as writer:
        with pytest.raises(
            IndexMismatchError,
            match=r"second_moment.digest is '[0-9a-f]+', but the index was begun with '[0-9a-f]+'; use",
        ):
            writer.write_tensors("second_moment", {"rows/a": torch.ones(5)})
        assert not (tmp_path / "second_moment.safetensors").exists()


@pytest.mark.parametrize("name", ["second_moment", "autocorrelation"])
def test_tensors_are_checked_byte_by_byte_when_they_are_read(index: Path, name: str) -> None:
    overwrite(f"{name}.safetensors", -1, b"\xa5")(index)
    opened = store.Index.open(index)
    with pytest.raises(DamagedIndexError, match=rf"{name}.safetensors: its content has digest [0-9a-f]+, expected"):
        opened.tensors(name)
