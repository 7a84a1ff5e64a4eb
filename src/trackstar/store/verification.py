"""Checking every byte of an index."""

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
from trackstar.store.shard_folder import CORPUS_END, PART_FOLDER, PREPARING_LOCK
from trackstar.store.shards import ResumePoint, open_shard, shard_rows
from trackstar.store.tensor_file import TensorFile, check_digest, open_tensor_file

OWN_NAMES = {".lock", PREPARING_LOCK, "manifest.json", "shards", "derived"} | {
    f"{name}.safetensors" for name in (*NAMES, PROGRESS, CORPUS_END)
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """What `verify` found.

    Attributes:
        path: The index's folder.
        completed: Whether its manifest says that it is finished.
        good_shards: The numbers of the shards that are whole.
        rows: Number of examples in them.
        checked_bytes: Number of bytes that were read and compared with a digest.
        problems: One line for each thing that is wrong: which file, what was found, what to do.
        notes: One line for each thing that does no harm, such as a file that is not the index's.
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
        """Whether nothing is wrong; an unfinished index can be ok as far as it goes."""
        return not self.problems


def verify(path: str | Place, *, on_file: Callable[[Place], None] = lambda file: None) -> VerificationReport:
    """Read every file of an index and compare it with its digest, its manifest and its own sense.

    Whatever is wrong is told in the report; nothing is changed.

    Args:
        path: The index's folder.
        on_file: Called with each file before it is read.

    Raises:
        StoreError: There is no index.
    """
    folder = as_folder(path)
    if not exists(folder / "manifest.json") and not _is_folder(folder / "shards"):
        raise StoreError(f"{folder}: no index is there (no manifest.json); give the folder of `trackstar index --out`")
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
    """One pass over an index's files, and what has been found so far."""

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
        there = self._shard_numbers()
        if manifest.completion is None:
            count = max(there, default=-1) + 1
            numbers = there
            self.notes.append(
                f"{self._folder}: the index is not finished; run the command that began it again to finish it"
            )
            if missing := count - len(there):
                # Not by a set of all numbers: a file's name may give any.
                first = next(place for place, number in enumerate(there) if number != place)
                self.notes.append(f"{self._folder}: {missing} shards are not there yet, the first of them {first}")
        else:
            count = len(manifest.completion.shards)
            numbers = range(count)
        plan = ShardPlan.of(manifest)
        for number in numbers:
            with self._collecting():
                self._check_shard(manifest, plan, number)
        for number in there:
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
        """Without a manifest, each shard still says whether it is whole."""
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
                f"{folder}: {len(derived)} files, kept to answer sooner, that no digest of the manifest vouches for; "
                "remove the folder from an index that you have from others"
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
                continue  # what the index is made from
            if name.endswith(PARTIAL_SUFFIX):
                self.notes.append(f"{path}: left by an interrupted run, or being written now")
            elif name not in OWN_NAMES and re.fullmatch(r"(shards/[0-9]{6,}|derived/[^/]+)\.safetensors", name) is None:
                self.notes.append(f"{path}: not a file of the index")

    def _shard_path(self, number: int) -> Place:
        return self._folder / "shards" / shard_file_name(number)

    def _shard_numbers(self) -> list[int]:
        names = names_in(self._folder / "shards") if _is_folder(self._folder / "shards") else []
        return sorted({int(name[:-12]) for name in names if re.fullmatch(r"[0-9]{6,}\.safetensors", name)})


def _is_folder(path: Place) -> bool:
    """Whether a folder is there; on other file systems, whether anything is in it."""
    return path.is_dir() if isinstance(path, Path) else bool(names_in(path))
