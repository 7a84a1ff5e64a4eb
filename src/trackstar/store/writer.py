"""Writing an index: one process at a time, shard after shard, so that it can be killed at any moment and go on.

What is finished is on the disk and says so itself: a shard counts when its file is there under its own name and its
content has its digest. Nothing else needs to be remembered between two runs.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

import filelock
from torch import Tensor

from trackstar.errors import DamagedIndexError, IndexLockedError, IndexMismatchError, OptionError, StoreError
from trackstar.store.files.durable import (
    PARTIAL_SUFFIX,
    exists,
    file_size,
    make_folder,
    names_in,
    remove_folder,
    remove_if_there,
    write_text,
)
from trackstar.store.files.places import Place, as_folder
from trackstar.store.index_tensors import AUTOCORRELATION, PROGRESS, IndexTensors, needed_tensors
from trackstar.store.manifest import CompletionEntry, Manifest, ShardEntry, differences, load_manifest, shard_file_name
from trackstar.store.shard_content import ShardContent, ShardPlan
from trackstar.store.shard_folder import PART_FOLDER, PREPARING_LOCK, is_partial_of_task, remove_end
from trackstar.store.shards import ResumePoint, Shard, open_shard, write_shard_file
from trackstar.store.strict_json import FieldError
from trackstar.store.tensor_file import check_digest
from trackstar.text import abridged

LOCK_FILE = ".lock"
Note = Callable[[str], None]


@final
class IndexWriter:
    """The one process that writes an index. Made by `open`; a context manager that gives the index free at its end.

    A process that is killed, or fails, at any moment leaves at most the shard in flight unwritten. Opening again with
    the same manifest goes on after the last finished shard.
    """

    def __init__(
        self, path: Place, lock: filelock.BaseFileLock | None, manifest: Manifest, on_note: Note, *, whole: bool
    ) -> None:
        self._path = path
        self._lock = lock
        self._manifest = manifest
        self._whole = whole
        self._plan = ShardPlan.of(manifest)
        self._on_note = on_note
        self._shards: list[Shard] = []
        self._tensors = IndexTensors(path)

    @classmethod
    def open(
        cls, path: str | Place, manifest: Manifest, *, on_note: Note = lambda note: None, whole: bool = False
    ) -> "IndexWriter":
        """Begin an index at `path`, or go on with the one that is there.

        The shards of an unfinished index are read and compared with their digests, up to the first that is missing or
        damaged; a damaged one is removed. A finished index whose files are missing or cut off becomes unfinished again.

        Args:
            path: A folder, here or on another file system, that is empty, missing, or an index made with the same
                manifest.
            manifest: What the index is made with; its `completion` is None.
            on_note: Told, in one line each, whatever is found there and done about it.
            whole: Whether a finished index is read and compared with its digests as well, not only looked at.

        Raises:
            IndexLockedError: Another process is writing this index.
            IndexMismatchError: The index there was made with something else, or holds a shard of another index; the
                message names the first field that differs.
            DamagedIndexError: Its manifest cannot be read.
            OptionError: A value of the manifest cannot be that of an index.
            StoreError: The folder holds something else, or cannot be written.
        """
        assert manifest.completion is None, "an index begins unfinished"
        try:
            manifest.check()
        except FieldError as error:
            raise OptionError(f"{path}: no index can be made where {error}; choose another value") from error
        folder = as_folder(path)
        _refuse_foreign_folder(folder)
        make_folder(folder)
        writer = cls(folder, _locked(folder), manifest, on_note, whole=whole)
        try:
            writer._begin_or_resume()
        except BaseException:
            writer.close()
            raise
        return writer

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the index free for other writers; what is finished stays."""
        if self._lock is not None:
            self._lock.release()

    @property
    def manifest(self) -> Manifest:
        """The manifest on the disk; its descriptive fields are those of the run that began the index."""
        return self._manifest

    @property
    def completed(self) -> bool:
        """Whether the index is finished, and nothing is left to write."""
        return self._manifest.completion is not None

    @property
    def shards_done(self) -> tuple[Shard, ...]:
        """The finished shards, from the first without a gap."""
        return tuple(self._shards)

    @property
    def resume_point(self) -> ResumePoint:
        """Where the next shard begins."""
        return self._shards[-1].end if self._shards else ResumePoint(row=0, record=0, window=0, skipped=0)

    def write_shard(self, content: ShardContent) -> Shard:
        """Write the next shard, durably. Every shard but the last has exactly the manifest's `shard_examples` rows.

        Raises:
            StoreError: It cannot be written, such as where the disk is full; nothing is left of it, and finished shards
                are kept.
        """
        assert not self.completed, "the index is finished"
        before = self.resume_point
        assert before.row == len(self._shards) * self._manifest.shard_examples, "the last shard was written already"
        assert (before.record, before.window) < (content.next_record, content.next_window), content.next_record
        assert before.skipped <= content.skipped, content.skipped
        shard = write_shard_file(self._path / "shards", self._plan, len(self._shards), content)
        self._shards.append(shard)
        return shard

    def adopt_shard(self) -> Shard | None:
        """The next shard, where a good file of it is there already: one after a shard that had to be made again.

        It then counts among `shards_done`, and `resume_point` is where it ends; nothing needs to be computed for it.

        Returns:
            None where there is no such file, or it is damaged (which is said, and the file removed).
        """
        assert not self.completed, "the index is finished"
        if self.resume_point.row < len(self._shards) * self._manifest.shard_examples:
            return None  # the last shard was a short one, and none can come after it
        path = self._path / "shards" / shard_file_name(len(self._shards))
        shard = self._good_shard(path, len(self._shards)) if exists(path) else None
        if shard is not None:
            self._shards.append(shard)
        return shard

    def end_of(self, number: int) -> ResumePoint | None:
        """Where shard `number` ends, of those that are not among `shards_done`: None where no good file of it is there.

        A damaged file is said and removed.
        """
        path = self._path / "shards" / shard_file_name(number)
        shard = self._good_shard(path, number) if exists(path) else None
        return shard.end if shard is not None else None

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write `second_moment`, `autocorrelation` or `whitening`, durably, and give the digest that `tensors_digest`
        gives.

        Raises:
            StoreError: It cannot be written.
            IndexMismatchError: It is a second moment or whitening other than the manifest's.
        """
        return self._tensors.write(name, tensors, self._manifest)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """What `write_tensors` wrote, checked against its digest, memory-mapped.

        Raises:
            DamagedIndexError: It is missing or not what was written.
        """
        return self._tensors.read(name, self._manifest)

    def save_progress(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what was accumulated over the finished shards, so that a later run need not go over them again.

        Raises:
            StoreError: It cannot be written.
        """
        self._tensors.save_progress(tensors, self._shards)

    def load_progress(self) -> tuple[int, dict[str, Tensor]]:
        """What `save_progress` last kept, and over how many of `shards_done`, from the first.

        Returns:
            (0, {}) where nothing was kept, or not over shards that are still these.
        """
        count, tensors = self._tensors.load_progress(self._shards)
        if count == 0 and self._shards:
            self._on_note("what was accumulated over the finished shards was not kept and is computed from them again")
        return count, tensors

    def finish(self, *, records: int, skipped: int) -> Manifest:
        """Write the completed manifest: the index is finished from the moment that its file is renamed.

        What the manifest names (`second_moment`, `whitening`) and for projected coordinates `autocorrelation` must have
        been written.

        Args:
            records: Number of the corpus's records that were read.
            skipped: Number of those without a scorable token.

        Raises:
            StoreError: It cannot be written.
        """
        assert not self.completed, "the index is finished"
        assert self._shards, "an index has at least one shard"
        assert 0 <= self.resume_point.skipped <= skipped <= records, (records, skipped)
        digests = {name: self._tensors.open(name, self._manifest).digest for name in needed_tensors(self._manifest)}
        completion = CompletionEntry(
            rows=self.resume_point.row,
            tokens=sum(shard.tokens for shard in self._shards),
            targets=sum(shard.targets for shard in self._shards),
            records=records,
            skipped=skipped,
            shards=tuple(
                ShardEntry(file=shard.path.name, rows=shard.rows, digest=shard.digest) for shard in self._shards
            ),
            autocorrelation_digest=digests.get(AUTOCORRELATION),
        )
        self._replace_manifest(dataclasses.replace(self._manifest, completion=completion))
        self._remove_leftovers()
        return self._manifest

    def _begin_or_resume(self) -> None:
        found = load_manifest(self._path)
        if found is None:
            _refuse_foreign_folder(self._path)
            self._remove_leftovers()
            self._replace_manifest(self._manifest)
        else:
            self._adopt(found)
            self._remove_leftovers()
        make_folder(self._path / "shards")
        if self.completed:
            self._check_completed()
        if not self.completed:
            self._find_shards()

    def _adopt(self, found: Manifest) -> None:
        check_same(self._path, found, self._manifest)
        self._manifest = found

    def _check_completed(self) -> None:
        completion = self._manifest.completion
        assert completion is not None
        damage: list[DamagedIndexError] = []
        for number, entry in enumerate(completion.shards):
            path = self._path / "shards" / entry.file
            try:
                shard = open_shard(path, self._plan, number, entry)
                if self._whole:
                    check_digest(shard.file)
                self._shards.append(shard)
            except DamagedIndexError as error:
                _remove_damaged(path)
                damage.append(error)
        try:
            self._tensors.check(self._manifest, whole=self._whole)
        except DamagedIndexError as error:
            damage.append(error)
        for error in damage:
            self._on_note(f"the finished index is damaged and will be finished again: {error}")
        if damage:
            self._shards = []
            self._replace_manifest(dataclasses.replace(self._manifest, completion=None))

    def _find_shards(self) -> None:
        folder = self._path / "shards"
        numbers = _shard_numbers(folder)
        if numbers:
            size = sum(file_size(folder / shard_file_name(number)) for number in numbers)
            self._on_note(f"checking {len(numbers)} shard files ({size / 1e6:.1f} MB) of an earlier run")
        while self.adopt_shard() is not None:
            pass
        missing = len(self._shards)
        later = [number for number in numbers if number > missing]
        if later:
            self._on_note(f"shard {missing} is missing and will be made again; {len(later)} after it are there")

    def _good_shard(self, path: Place, number: int) -> Shard | None:
        try:
            shard = open_shard(path, self._plan, number)
            check_digest(shard.file)
        except DamagedIndexError as error:
            self._on_note(f"shard {number} is damaged and will be made again: {error}")
            _remove_damaged(path)
            return None
        return shard

    def _replace_manifest(self, manifest: Manifest) -> None:
        write_text(self._path / "manifest.json", manifest.to_json())
        self._manifest = manifest

    def _remove_leftovers(self) -> None:
        """Remove what killed runs left unfinished, and once the index is finished, its progress file."""
        for folder in (self._path, self._path / "shards", self._path / "derived"):
            for name in names_in(folder):
                # What is a task's of an array may be written now.
                left = name.endswith(PARTIAL_SUFFIX) and (self.completed or not is_partial_of_task(name))
                if left and remove_if_there(folder / name):
                    self._on_note(f"removed {name}, left unfinished by an interrupted run")
        if self.completed:
            remove_if_there(self._path / f"{PROGRESS}.safetensors")
            remove_end(self._path)
            if names_in(self._path / PART_FOLDER):
                remove_folder(self._path / PART_FOLDER)


def check_same(path: Place, found: Manifest, asked: Manifest) -> None:
    """See that an index that is there is the one that is asked for.

    Args:
        path: Its folder.
        found: Its manifest.
        asked: The manifest of what is asked for.

    Raises:
        IndexMismatchError: It is not; the message names the first field that differs.
    """
    different = differences(found, asked)
    if different:
        field, was, wanted = different[0]
        more = f" (and {len(different) - 1} more differ)" if len(different) > 1 else ""
        raise IndexMismatchError(
            f"{path}: the index was made with {field} {abridged(was)}, but {abridged(wanted)} is asked for now{more}; "
            "ask for the same, or choose another folder"
        )


def _refuse_foreign_folder(folder: Place) -> None:
    """An index begins in a folder that has nothing but what an interrupted beginning leaves."""
    names = set(names_in(folder))
    foreign = names - {LOCK_FILE, PREPARING_LOCK, PART_FOLDER, f"manifest.json{PARTIAL_SUFFIX}"}
    if foreign and "manifest.json" not in names:
        raise StoreError(
            f"{folder}: holds {abridged(min(foreign))} but no manifest.json, expected an index or an empty folder; "
            "choose another folder"
        )


def _remove_damaged(path: Place) -> None:
    remove_if_there(path)
    if exists(path):
        raise StoreError(f"{path}: damaged, and cannot be removed; make its folder writable")


def _shard_numbers(folder: Place) -> list[int]:
    return [int(name[:-12]) for name in names_in(folder) if re.fullmatch(r"[0-9]{6,}\.safetensors", name)]


def _locked(folder: Place) -> filelock.BaseFileLock | None:
    """The lock of the one writer; none on other file systems, where nothing can be locked."""
    if not isinstance(folder, Path):
        return None
    lock = filelock.FileLock(folder / LOCK_FILE, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise IndexLockedError(
            f"{folder}: another process is writing this index; wait until it ends, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise StoreError(f"{folder}: cannot be locked for writing ({error}); make the folder writable") from error
    return lock
