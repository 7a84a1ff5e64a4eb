"""The shards of an index that several processes write at the same time, without a coordinator.

`IndexWriter` is for the one process that writes an index alone, or finishes it. Here each shard is
independent.
"""

import contextlib
import dataclasses
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import final

import torch

from trackstar.errors import DamagedIndexError, IncompleteIndexError, StoreError
from trackstar.store.files.durable import PARTIAL_SUFFIX, exists, make_folder, names_in, remove_file, remove_folder
from trackstar.store.files.places import Place
from trackstar.store.index_tensors import AUTOCORRELATION, IndexTensors, needed_tensors
from trackstar.store.manifest import Manifest, load_manifest, shard_file_name
from trackstar.store.shard_content import ShardContent, ShardPlan
from trackstar.store.shard_files import open_shard, write_shard_file
from trackstar.store.shards import ResumePoint
from trackstar.store.tensor_file import open_tensor_file, write_tensor_file
from trackstar.store.tensor_reading import check_digest, checked_tensors

CORPUS_END = "corpus_end"
PART_FOLDER = "part"
"""Folder within an unfinished index: an index of the first pass's examples, or of the examples to add."""
PREPARING_LOCK = ".preparing.lock"
"""File that is locked while one task does the work that all shards depend on."""
_END_FORMAT = "trackstar-corpus-end-1"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorpusEnd:
    """Totals that are known once a process has read the whole corpus.

    Attributes:
        shards: Number of shards of the index.
        rows: Number of examples.
        records: Number of records of the corpus.
        skipped: Number of these records without a target token.
    """

    shards: int
    rows: int
    records: int
    skipped: int


@final
class ShardFolder:
    """The shards of the index at `path`, written and checked one by one.

    Args:
        path: Folder of the index.
        manifest: The index's manifest.
        on_note: Callback that receives a note of one line for each damaged shard.
    """

    def __init__(self, path: Place, manifest: Manifest, *, on_note: Callable[[str], None] = lambda _note: None) -> None:
        self._path = path
        self._plan = ShardPlan.of(manifest)
        self._on_note = on_note

    def end_of(self, number: int, *, whole: bool) -> ResumePoint | None:
        """End of shard `number`; None if the shard is missing or damaged.

        Args:
            number: Number of the shard.
            whole: Whether to compare all bytes with the digest; otherwise only the header is read.
        """
        path = self._file(number)
        if not exists(path):
            return None
        try:
            shard = open_shard(path, self._plan, number)
            if whole:
                check_digest(shard.file)
        except DamagedIndexError as error:
            if not exists(path):
                return None  # another process has noticed the damage and removed the file
            self._on_note(f"shard {number} is damaged{' and will be written again' if whole else ''}: {error}")
            return None
        return shard.end

    def write(self, number: int, content: ShardContent) -> None:
        """Write shard `number`, durably.

        An intact file is left as it is, since a finished index may contain it.         If several
        processes write the shard at the same time, the complete file of the last one remains.

        Raises:
            StoreError: The shard cannot be written; nothing of it remains.
        """
        if self._is_intact(number):
            return
        make_folder(self._path / "shards")
        write_shard_file(self._path / "shards", self._plan, number, content, partial_suffix=_unique_suffix())

    def _is_intact(self, number: int) -> bool:
        with contextlib.suppress(DamagedIndexError):
            if exists(self._file(number)):
                check_digest(open_shard(self._file(number), self._plan, number).file)
                return True
        return False

    def missing(self, count: int) -> list[int]:
        """Numbers of those of the first `count` shards that have no file."""
        return [number for number in range(count) if not exists(self._file(number))]

    def write_end(self, end: CorpusEnd) -> None:
        """Save the totals of the corpus.

        Raises:
            StoreError: They cannot be written.
        """
        metadata = {"format": _END_FORMAT, "manifest_digest": self._plan.index}
        values = {"end": torch.tensor([end.shards, end.rows, end.records, end.skipped])}
        write_tensor_file(_end_file(self._path), values, metadata, partial_suffix=_unique_suffix())

    def read_end(self) -> CorpusEnd | None:
        """The totals that `write_end` saved; None if there are none of this index, or if they are damaged."""
        path = _end_file(self._path)
        if not exists(path):
            return None
        try:
            file = open_tensor_file(path)
            if file.metadata != {"format": _END_FORMAT, "manifest_digest": self._plan.index}:
                return None
            values = checked_tensors(file)["end"].tolist()
            shards, rows, records, skipped = values
        except (DamagedIndexError, KeyError, TypeError, ValueError):
            return None
        return CorpusEnd(shards=shards, rows=rows, records=records, skipped=skipped)

    def _file(self, number: int) -> Place:
        return self._path / "shards" / shard_file_name(number)


def part_folder(path: Place) -> Place:
    """The folder of the index that the index at `path` is made from, without the remains of a removed one.

    A finished index removes the folder, its manifest first. If that is interrupted, and the index has to be
    repaired, what is left is no index and would be in the way of a new one.

    Raises:
        DamagedIndexError: The manifest there is damaged.
    """
    part = path / PART_FOLDER
    if load_manifest(part) is None and names_in(part):
        remove_folder(part)
    return part


def is_begun(path: Place) -> bool:
    """Whether `path` holds an index with everything that its shards depend on, intact.

    Raises:
        DamagedIndexError: The manifest is damaged.
    """
    manifest = load_manifest(path)
    if manifest is None:
        return False
    tensors = IndexTensors(path)
    try:
        for name in needed_tensors(manifest):
            if name != AUTOCORRELATION:
                tensors.read(name, manifest)
    except DamagedIndexError:
        return False
    return True


def no_index(folder: Place) -> StoreError:
    """The error for a folder without a manifest: an index in its first pass, or no index."""
    names: list[str] = []
    with contextlib.suppress(StoreError):  # a file, or a folder that cannot be listed
        names = names_in(folder)
    if {PART_FOLDER, PREPARING_LOCK} & set(names):
        return IncompleteIndexError(
            f"{folder}: the index is being made and has no example yet (its first pass over the corpus is not "
            "finished); wait for the run that makes it, or, if it was interrupted, call `build_index` with the same "
            "settings again to resume it"
        )
    return StoreError(f"{folder}: not an index (no manifest.json); pass the folder that `build_index` wrote as `out`")


def is_partial_of_task(name: str) -> bool:
    """Whether this is the name of an unfinished file of a `ShardFolder`, which may be written right now."""
    return re.search(r"\.[0-9]+-[0-9a-f]{16}\.partial$", name) is not None


def _unique_suffix() -> str:
    """Suffix of an unfinished file that other processes may be writing, too."""
    return f".{os.getpid()}-{secrets.token_hex(8)}{PARTIAL_SUFFIX}"


def remove_end(path: Place) -> None:
    """Remove the files of array tasks that only an unfinished index has."""
    remove_file(_end_file(path))
    if isinstance(path, Path):
        remove_file(path / PREPARING_LOCK)


def _end_file(path: Place) -> Place:
    return path / f"{CORPUS_END}.safetensors"
