"""The shards of an index that several processes make at the same time, none of which leads or waits for another.

`IndexWriter` is for the one process that writes an index alone, and finishes it. Here each shard stands for itself.
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

from trackstar.errors import DamagedIndexError
from trackstar.store.files.durable import PARTIAL_SUFFIX, exists, make_folder, remove_if_there
from trackstar.store.files.places import Place
from trackstar.store.index_tensors import AUTOCORRELATION, IndexTensors, needed_tensors
from trackstar.store.manifest import Manifest, load_manifest, shard_file_name
from trackstar.store.shard_content import ShardContent, ShardPlan
from trackstar.store.shards import ResumePoint, open_shard, write_shard_file
from trackstar.store.tensor_file import check_digest, checked_tensors, open_tensor_file, write_tensor_file

CORPUS_END = "corpus_end"
PART_FOLDER = "part"
"""Within an unfinished index: an index that it is made from, of a first pass's examples or of those to be added."""
PREPARING_LOCK = ".preparing.lock"
"""Locked while what is done once for an index is done."""
_END_FORMAT = "trackstar-corpus-end-1"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CorpusEnd:
    """What a process knows that has gone through the whole corpus.

    Attributes:
        shards: How many shards the index has.
        rows: How many examples.
        records: How many records the corpus has.
        skipped: How many of these have no scorable token.
    """

    shards: int
    rows: int
    records: int
    skipped: int


@final
class ShardFolder:
    """Shards of the index at `path`, made and looked at one by one.

    Args:
        path: The index's folder.
        manifest: What the index is made with.
        on_note: Told of damaged shards.
    """

    def __init__(self, path: Place, manifest: Manifest, *, on_note: Callable[[str], None] = lambda _note: None) -> None:
        self._path = path
        self._plan = ShardPlan.of(manifest)
        self._on_note = on_note

    def end_of(self, number: int, *, whole: bool) -> ResumePoint | None:
        """Where shard `number` ends; None where it is not there, or not good.

        Args:
            number: Its number.
            whole: Whether all of it is read and compared with its digest, or only its header.
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
                return None  # whoever found it damaged took it away
            self._on_note(f"shard {number} is damaged{' and will be made again' if whole else ''}: {error}")
            return None
        return shard.end

    def write(self, number: int, content: ShardContent) -> None:
        """Write shard `number`, durably. A good one that is there by now is left: an index may be finished with it.

        Where another process writes it at the same moment, the last one's is kept, all of it.

        Raises:
            StoreError: It cannot be written; nothing is left of it.
        """
        if self._is_good(number):
            return
        make_folder(self._path / "shards")
        write_shard_file(self._path / "shards", self._plan, number, content, partial_suffix=_own_suffix())

    def _is_good(self, number: int) -> bool:
        with contextlib.suppress(DamagedIndexError):
            if exists(self._file(number)):
                check_digest(open_shard(self._file(number), self._plan, number).file)
                return True
        return False

    def missing(self, count: int) -> list[int]:
        """Which of the first `count` shards have no file."""
        return [number for number in range(count) if not exists(self._file(number))]

    def write_end(self, end: CorpusEnd) -> None:
        """Keep where the corpus ends.

        Raises:
            StoreError: It cannot be written.
        """
        metadata = {"format": _END_FORMAT, "manifest_digest": self._plan.index}
        values = {"end": torch.tensor([end.shards, end.rows, end.records, end.skipped])}
        write_tensor_file(_end_file(self._path), values, metadata, partial_suffix=_own_suffix())

    def read_end(self) -> CorpusEnd | None:
        """What `write_end` kept; None where there is none of this index, or it is damaged."""
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


def is_begun(path: Place) -> bool:
    """Whether an index has been begun at `path` and all that its shards depend on is there, whole.

    Raises:
        DamagedIndexError: Its manifest cannot be read.
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


def is_partial_of_task(name: str) -> bool:
    """Whether a file of this name is, or was, being written by a `ShardFolder`."""
    return re.search(r"\.[0-9]+-[0-9a-f]{16}\.partial$", name) is not None


def _own_suffix() -> str:
    """Behind the name of a file that this process, and maybe another, is writing."""
    return f".{os.getpid()}-{secrets.token_hex(8)}{PARTIAL_SUFFIX}"


def remove_end(path: Place) -> None:
    """Remove what only unfinished indexes have of this."""
    remove_if_there(_end_file(path))
    if isinstance(path, Path):
        remove_if_there(path / PREPARING_LOCK)


def _end_file(path: Place) -> Place:
    return path / f"{CORPUS_END}.safetensors"
