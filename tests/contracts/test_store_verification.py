"""Verification reads every byte and finds what is changed, missing or implausible."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from small_index import EXAMPLES, index_bytes, small_content, small_example, small_manifest, write_small_index
from trackstar import store
from trackstar.corpus import TokenizedExample
from trackstar.errors import DamagedIndexError, StoreError
from trackstar.store.tensor_file import open_tensor_file
from trackstar.store.tensor_reading import check_digest


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "index"
    write_small_index(path)
    store.Index.open(path).save_derived("cache", {"a": torch.ones(3)})
    return path


@pytest.fixture
def index(tmp_path: Path, finished: Path) -> Path:
    """A finished index to damage."""
    shutil.copytree(finished, tmp_path / "index")
    return tmp_path / "index"


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def test_an_intact_index_has_no_problems(finished: Path) -> None:
    read: list[str] = []
    report = store.verify(finished, on_file=lambda file: read.append(file.name))
    assert report.ok
    assert report.completed
    assert (report.good_shards, report.rows, report.problems) == ((0, 1, 2), EXAMPLES, ())
    (note,) = report.notes
    assert "derived: 1 cached files, which the manifest has no digests of" in note
    files = [name for name in index_bytes(finished) if name != "manifest.json"]
    assert sorted(read) == sorted(Path(name).name for name in files)
    assert report.checked_bytes == sum((finished / name).stat().st_size for name in files)


def test_a_flipped_byte_anywhere_in_a_shard_is_noticed(index: Path) -> None:
    file = index / "shards" / "000002.safetensors"
    good = file.read_bytes()
    check_digest(open_tensor_file(file))
    for place in range(0, len(good), 19):
        flip(file, place)
        with pytest.raises(DamagedIndexError):
            check_digest(open_tensor_file(file))
        file.write_bytes(good)


def _places() -> list[tuple[str, str, int]]:
    """One byte in each part of every file: (file, part, place)."""
    places = [("manifest.json", "text", place) for place in (0, 400, -1)]
    tensors = ["codes", "records", "token_offsets", "scales", "losses", "target_counts", "windows", "tokens"]
    tensors += ["target_masks", "text", "ids", "parents", "text_offsets", "id_offsets", "parent_offsets"]
    for name in (
        "shards/000000",
        "shards/000001",
        "shards/000002",
        "second_moment",
        "autocorrelation",
        "derived/cache",
    ):
        file = f"{name}.safetensors"
        places += [(file, "length", 0), (file, "length", 7), (file, "digest", 40), (file, "header", 110)]
        places += [(file, "padding", 4090), (file, "first value", 4096), (file, "last value", -1)]
    return places + [("shards/000001.safetensors", name, 0) for name in tensors]


@pytest.mark.parametrize(("name", "part", "place"), _places())
def test_a_flipped_byte_in_any_part_of_any_file_is_a_problem_of_that_file(
    index: Path, name: str, part: str, place: int
) -> None:
    file = index / name
    if part in (places := open_tensor_file(file).tensors if name != "manifest.json" else {}):
        place = places[part].start
    flip(file, place)
    report = store.verify(index)
    assert not report.ok
    assert len(report.problems) == 1
    assert report.problems[0].startswith(f"{file}: ")
    assert "\n" not in report.problems[0]
    spoiled = [number for number in range(3) if name == f"shards/00000{number}.safetensors"]
    assert report.good_shards == tuple(number for number in range(3) if number not in spoiled)


@pytest.mark.parametrize("name", ["manifest.json", "shards/000001.safetensors", "autocorrelation.safetensors"])
def test_a_missing_or_shortened_file_is_a_problem(index: Path, name: str) -> None:
    content = (index / name).read_bytes()
    (index / name).write_bytes(content[:-1])
    assert len(store.verify(index).problems) == 1
    (index / name).unlink()
    report = store.verify(index)
    assert len(report.problems) == 1
    assert "missing" in report.problems[0]


def test_all_problems_are_reported_together(index: Path) -> None:
    flip(index / "shards" / "000000.safetensors", 4100)
    flip(index / "shards" / "000002.safetensors", 4100)
    (index / "second_moment.safetensors").unlink()
    report = store.verify(index)
    assert len(report.problems) == 3
    assert report.good_shards == (1,)
    assert report.rows == 3


def test_shards_are_verified_without_the_manifest(index: Path) -> None:
    (index / "manifest.json").write_bytes(b"")
    flip(index / "shards" / "000000.safetensors", 4100)
    shutil.copyfile(index / "second_moment.safetensors", index / "shards" / "000003.safetensors")
    report = store.verify(index)
    assert (report.completed, report.good_shards, report.rows) == (False, (1, 2), 5)
    assert len(report.problems) == 3


def test_an_additional_shard_is_a_problem_and_foreign_files_are_notes(index: Path) -> None:
    shutil.copyfile(index / "shards" / "000002.safetensors", index / "shards" / "000003.safetensors")
    (index / "shards" / "000009.safetensors.partial").write_bytes(b"half")
    (index / "notes.txt").write_text("mine")
    (index / "shards" / "readme").write_text("mine")
    report = store.verify(index)
    assert report.good_shards == (0, 1, 2)
    assert [problem.split(": ")[1] for problem in report.problems] == [
        "not among the 3 shards of the manifest; move it away"
    ]
    assert {Path(note.split(": ")[0]).name for note in report.notes} == {
        "000009.safetensors.partial",
        "notes.txt",
        "readme",
        "derived",
    }


def test_an_unfinished_index_is_ok_so_far(tmp_path: Path) -> None:
    with store.IndexWriter.open(tmp_path, small_manifest()) as writer:
        for first in (0, 3):
            writer.write_shard(small_content(first, first + 3))
            writer.save_progress({"sum": torch.ones(2)})
    report = store.verify(tmp_path)
    assert (report.ok, report.completed, report.good_shards, report.rows) == (True, False, (0, 1), 6)
    assert report.notes[0].endswith("make it again with the same settings to finish it")
    flip(tmp_path / "progress.safetensors", -1)
    (tmp_path / "shards" / "000000.safetensors").unlink()
    report = store.verify(tmp_path)
    assert [problem.split(": ")[0] for problem in report.problems] == [str(tmp_path / "progress.safetensors")]
    assert f"{tmp_path}: 1 shards are missing so far, the first of them 0" in report.notes


def test_verifying_changes_nothing(index: Path) -> None:
    flip(index / "shards" / "000001.safetensors", 4100)
    (index / "x.partial").write_bytes(b"half")
    before = index_bytes(index)
    store.verify(index)
    assert index_bytes(index) == before


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_an_index_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"not an index \(no manifest.json\)"):
        store.verify(tmp_path / name)


# Values that a digest cannot reveal, since their writer also wrote the digest.


def _changed(changes: Callable[[store.ShardContent], object]) -> store.ShardContent:
    content = small_content(0, 3)
    changes(content)
    return content


def _example(row: int, **changes: object) -> TokenizedExample:
    plain = small_example(row)
    fields = {name: getattr(plain, name) for name in TokenizedExample.__dataclass_fields__}
    return TokenizedExample(**{**fields, **changes})  # pyright: ignore[reportArgumentType]


IMPLAUSIBLE: dict[str, tuple[store.ShardContent, str]] = {
    "a code that is NaN": (
        _changed(lambda content: content.stored.codes[1].fill_(math.nan)),
        "row 1 has a code that is not finite",
    ),
    "a scale that is NaN": (
        _changed(lambda content: content.stored.scales[2:].fill_(math.nan)),
        "row 2 has scale nan, expected a positive power of two",
    ),
    "a loss that is infinite": (
        _changed(lambda content: content.losses[:1].fill_(math.inf)),
        "row 0 has a loss that is not finite",
    ),
    "no target": (
        small_content(0, 3, example=lambda row: _example(row, target_mask=np.zeros(2 + row % 3, np.bool_))),
        "row 0 has a target mask that does not fit its 0 targets",
    ),
    "a first token that is a target": (
        small_content(0, 3, example=lambda row: _example(row, target_mask=np.ones(2 + row % 3, np.bool_))),
        "row 0 has a target mask that does not fit its 2 targets",
    ),
    "a record after the shard's end": (
        small_content(0, 3, example=lambda row: _example(row, record=100 * row)),
        r"row 1 is of record and window \(100, 1\), expected \(0, 0\) to \(2, 1\)",
    ),
}


@pytest.mark.parametrize("name", IMPLAUSIBLE)
def test_implausible_content_is_a_problem(tmp_path: Path, name: str) -> None:
    content, expected = IMPLAUSIBLE[name]
    with store.IndexWriter.open(tmp_path, small_manifest()) as writer:
        writer.write_shard(content)
    report = store.verify(tmp_path)
    assert report.good_shards == ()
    assert len(report.problems) == 1
    with pytest.raises(DamagedIndexError, match=expected):
        raise DamagedIndexError(report.problems[0])
