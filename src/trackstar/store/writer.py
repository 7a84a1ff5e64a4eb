"""Write an index: one process, shard by shard, so that a run that is killed at any moment can be resumed.

A shard is finished if its file exists under its final name and its content agrees with its digest.
Nothing else records the progress of a run.
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
    remove_file,
    remove_folder,
    write_text,
)
from trackstar.store.files.places import Place, as_folder
from trackstar.store.index_tensors import AUTOCORRELATION, PROGRESS, IndexTensors, needed_tensors
from trackstar.store.manifest import Manifest, differences, load_manifest, shard_file_name
from trackstar.store.manifest_entries import CompletionEntry, ShardEntry
from trackstar.store.shard_content import ShardContent, ShardPlan
from trackstar.store.shard_files import open_shard, write_shard_file
from trackstar.store.shard_folder import PART_FOLDER, PREPARING_LOCK, is_partial_of_task, remove_end
from trackstar.store.shards import ResumePoint, Shard
from trackstar.store.strict_json import FieldError
from trackstar.store.tensor_reading import check_digest
from trackstar.text import abridged

LOCK_FILE = ".lock"
# Names that a writer gives to files until they are complete; other files in the folder are not ours.
_UNFINISHED = re.compile(
    r"(manifest\.json|[A-Za-z0-9._-]+\.safetensors)(\.[0-9]+-[0-9a-f]+)?" + re.escape(PARTIAL_SUFFIX)
)
_OPTIONS = {
    **{f"corpora.{name}": name for name in ("limit", "train_on", "join", "chat_template", "metadata")},
    "windows.tokens": "window_tokens",
    **{f"windows.{name}": name for name in ("overlap", "truncate", "pack")},
    "projection.side": "side",
    "projection.seed": "seed",
    "projection.kind": "projection",
    "model.parameters": "parameters",
    **{name: name for name in ("output", "coordinates", "codec", "shard_examples")},
}
"""The options that fields of a manifest are set by, but for those that are found in the data."""
_FOUND_IN_DATA = re.compile(r"^corpora\[[0-9]+\]\.(digest|text_field|id_field|format)$")

Note = Callable[[str], None]


@final
class IndexWriter:
    """The one process that writes an index; a context manager that unlocks it. `open` makes one.

    A process that fails or is killed loses at most the shard that it is writing. Opening the index
    again with the same manifest resumes after the last finished shard.
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
        """Begin an index at `path`, or resume an existing one.

        The shards of an unfinished index are compared with their digests, up to the first that is
        missing or damaged; a damaged one is removed. A finished index whose files are missing or
        cut off becomes unfinished again.

        Args:
            path: A folder that is missing or empty, or an index with the same manifest; a path or
                URL.
            manifest: The index's manifest, with `completion` None.
            on_note: Callback that receives notes of one line about the existing files and the
                repairs.
            whole: Whether to compare all bytes of a finished index with their digests, not only
                sizes and headers.

        Raises:
            IndexLockedError: Another process is writing this index.
            IndexMismatchError: The existing index has other settings, or contains a shard of
                another index; the message names the first field that differs.
            DamagedIndexError: The existing manifest is damaged.
            OptionError: A value of `manifest` is impossible for an index.
            StoreError: The folder contains something else, or is not writable.
        """
        assert manifest.completion is None, "an index begins unfinished"
        try:
            manifest.check()
        except FieldError as error:
            raise OptionError(f"{path}: an index cannot have these settings: {error}; choose another value") from error
        folder = as_folder(path)
        refuse_foreign_folder(folder)
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
        """Unlock the index for other writers; finished shards remain."""
        if self._lock is not None:
            self._lock.release()

    @property
    def path(self) -> Place:
        """Folder of the index."""
        return self._path

    @property
    def manifest(self) -> Manifest:
        """The manifest on the disk; its descriptive fields come from the run that began the index."""
        return self._manifest

    @property
    def completed(self) -> bool:
        """Whether the index is finished."""
        return self._manifest.completion is not None

    @property
    def shards_done(self) -> tuple[Shard, ...]:
        """The finished shards from the first one, without a gap."""
        return tuple(self._shards)

    @property
    def resume_point(self) -> ResumePoint:
        """The position at which the next shard begins."""
        return self._shards[-1].end if self._shards else ResumePoint(row=0, record=0, window=0, skipped=0)

    def write_shard(self, content: ShardContent) -> Shard:
        """Write the next shard, durably; every shard but the last has `shard_examples` rows.

        Raises:
            StoreError: The shard cannot be written, for example because the disk is full; nothing
                of it remains. Finished shards are kept.
        """
        assert not self.completed, "the index is finished"
        before = self.resume_point
        assert before.row == len(self._shards) * self._manifest.shard_examples, "a short shard must be the last one"
        assert (before.record, before.window) < (content.next_record, content.next_window), content.next_record
        assert before.skipped <= content.skipped, content.skipped
        shard = write_shard_file(self._path / "shards", self._plan, len(self._shards), content)
        self._shards.append(shard)
        return shard

    def adopt_shard(self) -> Shard | None:
        """Add the next shard to `shards_done` if an intact file of it exists.

        Returns:
            The shard; None if there is no file, or if it is damaged. A damaged file is noted and
            removed.
        """
        assert not self.completed, "the index is finished"
        if self.resume_point.row < len(self._shards) * self._manifest.shard_examples:
            return None  # the last shard is a short one, after which there are no others
        path = self._path / "shards" / shard_file_name(len(self._shards))
        shard = self._intact_shard(path, len(self._shards)) if exists(path) else None
        if shard is not None:
            self._shards.append(shard)
        return shard

    def end_of(self, number: int) -> ResumePoint | None:
        """End of shard `number`, which is not among `shards_done`; None if it has no intact file.

        A damaged file is noted and removed.
        """
        path = self._path / "shards" / shard_file_name(number)
        shard = self._intact_shard(path, number) if exists(path) else None
        return shard.end if shard is not None else None

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write `second_moment`, `autocorrelation` or `whitening`, durably.

        Returns:
            The tensors' digest, equal to that of `tensors_digest`.

        Raises:
            StoreError: The file cannot be written.
            IndexMismatchError: The second moment or whitening is not the manifest's.
        """
        return self._tensors.write(name, tensors, self._manifest)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors that `write_tensors` wrote, memory-mapped and compared with their digest.

        Raises:
            DamagedIndexError: The file is missing or damaged.
        """
        return self._tensors.read(name, self._manifest)

    def save_progress(self, tensors: Mapping[str, Tensor]) -> None:
        """Save sums over the finished shards, so that a later run does not compute them again.

        Raises:
            StoreError: They cannot be written.
        """
        self._tensors.save_progress(tensors, self._shards)

    def load_progress(self) -> tuple[int, dict[str, Tensor]]:
        """The sums that `save_progress` saved last, and the number of leading `shards_done` that they cover.

        Returns:
            The number of shards and the sums; (0, {}) if there are none, or if the shards have
            changed since.
        """
        count, tensors = self._tensors.load_progress(self._shards)
        if count == 0 and self._shards:
            self._on_note("the sums over the finished shards were not saved and are computed again")
        return count, tensors

    def finish(self, *, records: int, skipped: int) -> Manifest:
        """Write the manifest with its `completion`: the index is finished once this file is renamed.

        The tensors that the manifest needs (`second_moment`; `autocorrelation` or `whitening`) must
        have been written.

        Args:
            records: Number of records that were read from the corpus.
            skipped: Number of these records without a target token.

        Raises:
            StoreError: The manifest cannot be written.
        """
        assert not self.completed, "the index is finished"
        assert self._shards, "an index has at least one shard"
        assert 0 <= self.resume_point.skipped <= skipped <= records, (records, skipped)
        digests = {
            name: self._tensors.open(name, self._manifest).digest
            for name in needed_tensors(self._manifest, self.resume_point.row)
        }
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
        existing = load_manifest(self._path)
        if existing is None:
            refuse_foreign_folder(self._path)
            self._remove_leftovers()
            self._replace_manifest(self._manifest)
        else:
            check_same(self._path, existing, self._manifest)
            self._manifest = existing
            self._plan = ShardPlan.of(existing)
            self._remove_leftovers()
        make_folder(self._path / "shards")
        if self.completed:
            self._check_completed()
        if not self.completed:
            self._find_shards()

    def _check_completed(self) -> None:
        """Open the files of a finished index; if one is damaged, the index becomes unfinished again."""
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
            self._on_note(f"the finished index is damaged and will be repaired: {error}")
        if damage:
            self._shards = []
            self._replace_manifest(dataclasses.replace(self._manifest, completion=None))

    def _find_shards(self) -> None:
        """Find the finished shards of an unfinished index."""
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
            self._on_note(f"shard {missing} is missing and will be written again; {len(later)} later shards exist")

    def _intact_shard(self, path: Place, number: int) -> Shard | None:
        try:
            shard = open_shard(path, self._plan, number)
            check_digest(shard.file)
        except DamagedIndexError as error:
            self._on_note(f"shard {number} is damaged and will be written again: {error}")
            _remove_damaged(path)
            return None
        return shard

    def _replace_manifest(self, manifest: Manifest) -> None:
        write_text(self._path / "manifest.json", manifest.to_json())
        self._manifest = manifest

    def _remove_leftovers(self) -> None:
        """Remove unfinished files and, once the index is finished, what only an unfinished one has."""
        for folder in (self._path, self._path / "shards", self._path / "derived"):
            for name in names_in(folder):
                # A file of an array task may be written by it right now.
                unfinished = _UNFINISHED.fullmatch(name) and (self.completed or not is_partial_of_task(name))
                if unfinished and remove_file(folder / name):
                    self._on_note(f"removed {name}, which an interrupted run left unfinished")
        if self.completed:
            remove_file(self._path / f"{PROGRESS}.safetensors")
            remove_end(self._path)
            if names_in(self._path / PART_FOLDER):
                remove_folder(self._path / PART_FOLDER)


def check_same(path: Place, existing: Manifest, requested: Manifest) -> None:
    """Raise if an existing index has other settings than the requested one.

    Args:
        path: Folder of the existing index.
        existing: Its manifest.
        requested: Manifest of the requested index.

    Raises:
        IndexMismatchError: The manifests differ; the message names the first field that does.
    """
    if existing.format_version < requested.format_version:
        advice = (
            "copy it into the current format with `convert_index` and its own `codec`; if it is damaged, build it in "
            "another folder"
        )
        if existing.completion is None:
            advice = f"finish it with trackstar {existing.trackstar_version}, which began it, or choose another folder"
        raise IndexMismatchError(
            f"{path}: the existing index has format version {existing.format_version}, which is read but not extended; "
            f"{advice}"
        )
    different = differences(existing, requested)
    if different:
        # Another option for the same corpus is another content, too.
        field, old, new = next((each for each in different if not _FOUND_IN_DATA.search(each[0])), different[0])
        if _option(field) in ("metadata", "chat_template"):
            raise IndexMismatchError(
                f"{path}: the existing index was made with another `{_option(field)}` than requested; use the same, or "
                "choose another folder"
            )
        named = f"`{_option(field)}`" if _option(field) else field
        others = {_option(name) or re.split(r"[.\[]", name)[0] for name, _, _ in different} - {_option(field) or field}
        more = f" (and {len(others)} more differ)" if others else ""
        raise IndexMismatchError(
            f"{path}: the existing index has {named} {abridged(old)}, but {abridged(new)} was requested{more}; use the "
            "same settings, or choose another folder"
        )


def _option(field: str) -> str | None:
    """The option that a manifest's field is set by; None if it follows from what was read."""
    return _OPTIONS.get(re.sub(r"\[[0-9]+\]|\.length$", "", field))


def refuse_foreign_folder(folder: Place) -> None:
    """Raise if a folder without a manifest contains more than the files of an interrupted beginning."""
    names = set(names_in(folder))
    if "manifest.json" in names:
        return
    foreign = names - {LOCK_FILE, PREPARING_LOCK, PART_FOLDER, f"manifest.json{PARTIAL_SUFFIX}"}
    if foreign == {"shards"} and not names_in(folder / "shards"):
        return  # all that an interrupted removal has left
    if foreign:
        raise StoreError(
            f"{folder}: contains {abridged(min(foreign))} but no manifest.json, expected an index or an empty folder; "
            "choose another folder"
        )


def _remove_damaged(path: Place) -> None:
    remove_file(path)
    if exists(path):
        raise StoreError(f"{path}: damaged, and cannot be removed; make its folder writable")


def _shard_numbers(folder: Place) -> list[int]:
    return [int(name[:-12]) for name in names_in(folder) if re.fullmatch(r"[0-9]{6,}\.safetensors", name)]


def _locked(folder: Place) -> filelock.BaseFileLock | None:
    """Lock the index for this writer; on other file systems there are no locks."""
    if not isinstance(folder, Path):
        return None
    lock = filelock.FileLock(folder / LOCK_FILE, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise IndexLockedError(
            f"{folder}: another process is writing this index; wait for its end, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise StoreError(f"{folder}: cannot be locked for writing ({error}); make the folder writable") from error
    return lock
