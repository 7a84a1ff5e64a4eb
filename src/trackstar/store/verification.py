"""Verify every byte of an index."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from trackstar.errors import StoreError
from trackstar.store.files.durable import PARTIAL_SUFFIX, exists, files_below, names_in
from trackstar.store.files.places import Place, as_folder
from trackstar.store.index_tensors import NAMES, PROGRESS, IndexTensors, needed_tensors
from trackstar.store.manifest import Manifest, load_manifest, shard_file_name
from trackstar.store.shard_check import check_content
from trackstar.store.shard_content import ShardPlan
from trackstar.store.shard_files import open_shard, shard_rows
from trackstar.store.shard_folder import CORPUS_END, PART_FOLDER, PREPARING_LOCK, no_index
from trackstar.store.shards import ResumePoint
from trackstar.store.tensor_file import TensorFile, open_tensor_file
from trackstar.store.tensor_reading import check_digest

INDEX_NAMES = {".lock", PREPARING_LOCK, "manifest.json", "shards", "derived"} | {
    f"{name}.safetensors" for name in (*NAMES, PROGRESS, CORPUS_END)
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """Result of `verify`.

    Attributes:
        path: Folder of the index.
        completed: Whether the index is finished, according to its manifest.
        good_shards: Numbers of the intact shards.
        rows: Number of examples in the intact shards.
        checked_bytes: Number of bytes that were read and compared with a digest.
        problems: One line per problem: the file, what was found, what to do.
        notes: One line per harmless observation, such as a file that does not belong to the index.
    """

    path: Place
    completed: bool
    good_shards: tuple[int, ...]
    rows: int
    checked_bytes: int
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether there are no problems; an unfinished index can be ok so far."""
        return not self.problems


def verify(path: str | Place, *, on_file: Callable[[Place], None] = lambda file: None) -> VerificationReport:
    """Compare every file of an index with its digest and the manifest, and check its values.

    The report lists all problems. Nothing is changed.

    Args:
        path: Folder of the index: a path or URL.
        on_file: Callback that receives each file before it is read.

    Raises:
        StoreError: There is no index at `path`.
    """
    folder = as_folder(path)
    if not exists(folder / "manifest.json") and not _is_folder(folder / "shards"):
        raise no_index(folder)
    verification = _Verification(folder, on_file)
    verification.run()
    manifest = verification.manifest
    return VerificationReport(
        path=folder,
        completed=manifest is not None and manifest.completion is not None,
        good_shards=tuple(verification.good),
        rows=sum(verification.good.values()),
        checked_bytes=verification.checked_bytes,
        problems=tuple(verification.problems),
        notes=tuple(verification.notes),
    )


class _Verification:
    """One pass over the files of an index, with its findings so far."""

    def __init__(self, folder: Place, on_file: Callable[[Place], None]) -> None:
        self._folder = folder
        self._on_file = on_file
        self._end = ResumePoint(row=0, record=0, window=0, skipped=0)
        self.manifest: Manifest | None = None
        self.good: dict[int, int] = {}  # number of a shard to its rows
        self.checked_bytes = 0
        self.problems: list[str] = []
        self.notes: list[str] = []

    def run(self) -> None:
        with self._collecting():
            self.manifest = load_manifest(self._folder)
            if self.manifest is None:
                raise StoreError(f"{self._folder}: manifest.json is missing; restore it from a copy")
        if self.manifest is None:
            self._check_shards_alone()
        else:
            self._check_shards(self.manifest)
            self._check_tensors(self.manifest)
        self._check_caches()
        self._note_other_files()

    @contextlib.contextmanager
    def _collecting(self) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            self.problems.append(str(error))

    def _check_bytes(self, file: TensorFile) -> None:
        check_digest(file)
        self.checked_bytes += file.size

    def _check_shards(self, manifest: Manifest) -> None:
        existing = self._shard_numbers()
        if manifest.completion is None:
            count = max(existing, default=-1) + 1
            numbers = existing
            self.notes.append(
                f"{self._folder}: the index is not finished; make it again with the same settings to finish it"
            )
            if missing := count - len(existing):
                # No set of all numbers is made: a file's name may contain any number.
                first = next(expected for expected, number in enumerate(existing) if number != expected)
                self.notes.append(f"{self._folder}: {missing} shards are missing so far, the first of them {first}")
        else:
            count = len(manifest.completion.shards)
            numbers = range(count)
        plan = ShardPlan.of(manifest)
        for number in numbers:
            with self._collecting():
                self._check_shard(manifest, plan, number)
        for number in existing:
            if number >= count:
                path = self._shard_path(number)
                self.problems.append(f"{path}: not among the {count} shards of the manifest; move it away")

    def _check_shard(self, manifest: Manifest, plan: ShardPlan, number: int) -> None:
        path = self._shard_path(number)
        entry = manifest.completion.shards[number] if manifest.completion is not None else None
        self._on_file(path)
        shard = open_shard(path, plan, number, entry)
        self._check_bytes(shard.file)
        check_content(shard, begin=self._end)
        self._end = shard.end
        self.good[number] = shard.rows

    def _check_shards_alone(self) -> None:
        """Check the shards of an index without a manifest by their digests."""
        for number in self._shard_numbers():
            path = self._shard_path(number)
            with self._collecting():
                self._on_file(path)
                file = open_tensor_file(path)
                self._check_bytes(file)
                self.good[number] = shard_rows(file)

    def _check_tensors(self, manifest: Manifest) -> None:
        tensors = IndexTensors(self._folder)
        for name in NAMES:
            path = self._folder / f"{name}.safetensors"
            needed = name in needed_tensors(manifest) and manifest.completion is not None
            if needed or exists(path):
                with self._collecting():
                    self._on_file(path)
                    self._check_bytes(tensors.open(name, manifest))

    def _check_caches(self) -> None:
        folder = self._folder / "derived"
        names = names_in(folder) if _is_folder(folder) else []
        derived = [folder / name for name in names if name.endswith(".safetensors")]
        if derived:
            self.notes.append(
                f"{folder}: {len(derived)} cached files, which the manifest has no digests of; delete the folder if "
                "someone else built the index"
            )
        for path in [*(self._folder / f"{name}.safetensors" for name in (PROGRESS, CORPUS_END)), *derived]:
            if exists(path):
                with self._collecting():
                    self._on_file(path)
                    self._check_bytes(open_tensor_file(path))

    def _note_other_files(self) -> None:
        for name in files_below(self._folder):
            path = self._folder / name
            if name.split("/")[0] == PART_FOLDER and (self.manifest is None or self.manifest.completion is None):
                continue  # an index that this one is made from
            if name.endswith(PARTIAL_SUFFIX):
                self.notes.append(f"{path}: unfinished, left by an interrupted run or being written now")
            elif (
                name not in INDEX_NAMES and re.fullmatch(r"(shards/[0-9]{6,}|derived/[^/]+)\.safetensors", name) is None
            ):
                self.notes.append(f"{path}: does not belong to the index")

    def _shard_path(self, number: int) -> Place:
        return self._folder / "shards" / shard_file_name(number)

    def _shard_numbers(self) -> list[int]:
        names = names_in(self._folder / "shards") if _is_folder(self._folder / "shards") else []
        return sorted({int(name[:-12]) for name in names if re.fullmatch(r"[0-9]{6,}\.safetensors", name)})


def _is_folder(path: Place) -> bool:
    """Whether a folder exists; on other file systems, whether it contains a file."""
    return path.is_dir() if isinstance(path, Path) else bool(names_in(path))
