"""Hostile bytes, made up and kept from fuzzing: every reader takes them, or refuses them in one printable line."""

import random
from collections.abc import Mapping
from pathlib import Path

import fsspec
import hypothesis
import pytest
from hypothesis import strategies

from fuzz import readers
from fuzz.readers import READERS, accepts, scratch
from trackstar.store.files.places import Place, as_folder

KEPT = sorted((Path(__file__).parent / "corpus").glob("*/*"))
CHANGES = strategies.lists(strategies.integers(0, 2**32 - 1), min_size=1, max_size=3)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_escaped_is_taken_or_refused(path: Path, tmp_path: Path) -> None:
    expected = {".taken": True, ".refused": False}[path.suffix]
    assert accepts(READERS[path.parent.name], path.read_bytes(), tmp_path) is expected


@pytest.mark.parametrize("name", READERS)
def test_a_reader_takes_good_files(name: str, tmp_path: Path) -> None:
    reader = READERS[name]
    taken = [accepts(reader, seed, tmp_path) for seed in reader.seeds()]
    assert taken.count(True) >= len(taken) / 2


@pytest.mark.parametrize("name", READERS)
def test_changed_files_are_taken_or_refused(name: str) -> None:
    reader = READERS[name]
    seeds = reader.seeds()
    with scratch() as folder:

        @hypothesis.settings(max_examples=40 if reader.longest < 10_000 else 15)
        @hypothesis.given(seed=strategies.sampled_from(seeds), changes=CHANGES)
        def check(seed: bytes, changes: list[int]) -> None:
            content = seed
            for change in changes:
                content = reader.mutate(content, random.Random(change))
            hypothesis.assume(len(content) <= 2 * reader.longest)
            accepts(reader, content, Path(folder))

        check()


@pytest.mark.parametrize("name", READERS)
def test_any_bytes_are_taken_or_refused(name: str) -> None:
    reader = READERS[name]
    beginnings = strategies.sampled_from([b"", *(seed[:16] for seed in reader.seeds())])
    with scratch() as folder:

        @hypothesis.settings(max_examples=15 if reader.longest < 10_000 else 5)
        @hypothesis.given(beginning=beginnings, rest=strategies.binary(max_size=300))
        def check(beginning: bytes, rest: bytes) -> None:
            accepts(reader, beginning + rest, Path(folder))

        check()


OF_INDEXES = ("manifest", "shard", "tensors")


@pytest.mark.parametrize("name", OF_INDEXES)
def test_on_another_file_system_the_same_files_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, memory = READERS[name], fsspec.filesystem("memory")
    kept = [path.read_bytes() for path in KEPT if path.parent.name == name]
    changed = [reader.mutate(seed, random.Random(change)) for change, seed in enumerate(reader.seeds())]
    contents = [*kept, *reader.seeds()[::4], *changed[::2]]
    with scratch() as folder:
        expected = [accepts(reader, content, Path(folder)) for content in contents]
    write = readers.write_index

    def write_elsewhere(folder: Path, files: Mapping[str, bytes]) -> Place:
        path = write(folder, files)
        memory.store.clear()
        for name, content in files.items():
            memory.pipe(f"/fuzzed/{path.name}/{name}", content)
        return as_folder("memory://fuzzed/index")

    monkeypatch.setattr(readers, "write_index", write_elsewhere)
    with scratch() as folder:
        assert [accepts(reader, content, Path(folder)) for content in contents] == expected
    memory.store.clear()
