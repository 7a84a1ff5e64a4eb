"""The tensors of an index beside its shards: V, R_train or W_train, and the sums of an interrupted run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard, final

import torch
from torch import Tensor

from trackstar.errors import DamagedIndexError, IndexMismatchError
from trackstar.store.derived_cache import DerivedCache
from trackstar.store.files.durable import exists
from trackstar.store.files.places import Place
from trackstar.store.manifest import Manifest, stores_autocorrelation
from trackstar.store.shards import Shard
from trackstar.store.tensor_file import (
    TensorFile,
    damaged,
    open_tensor_file,
    sorted_tensors,
    tensor_file_digest,
    write_tensor_file,
)
from trackstar.store.tensor_reading import checked_tensors, file_state, mapped_tensors
from trackstar.text import cut

SECOND_MOMENT = "second_moment"
AUTOCORRELATION = "autocorrelation"
WHITENING = "whitening"
NAMES = (SECOND_MOMENT, AUTOCORRELATION, WHITENING)
PROGRESS = "progress"
TENSORS_METADATA = {"format": "trackstar-tensors-1"}
PROGRESS_FORMAT = "trackstar-progress-1"
# A file from this size on is compared with its digest once, and again when it changes.
_CHECKED_ONCE = 16 << 20


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of the file that an index stores these tensors in, such as a manifest's `second_moment.digest`.

    It depends on names, dtypes, shapes and values, not on the mapping's order.
    """
    return tensor_file_digest(sorted_tensors(tensors), TENSORS_METADATA)


def have_shapes(tensors: Mapping[str, Tensor] | None, **shapes: tuple[int, ...]) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether the tensors have these names and shapes, which a valid digest does not guarantee."""
    return tensors is not None and all(
        name in tensors and tuple(tensors[name].shape) == shape for name, shape in shapes.items()
    )


@final
class IndexTensors:
    """The tensor files of the index at `path`."""

    def __init__(self, path: Place) -> None:
        self._path = path
        self._copies: dict[tuple[str, str], dict[str, Tensor]] = {}  # by name and digest

    def write(self, name: str, tensors: Mapping[str, Tensor], manifest: Manifest) -> str:
        """Write `second_moment`, `autocorrelation` or `whitening` and return the file's digest."""
        path = self._file(name)
        if name != AUTOCORRELATION:
            found, expected = tensors_digest(tensors), _manifest_digest(name, manifest)
            if found != expected:
                raise IndexMismatchError(
                    f"{path}: {name}.digest is {found!r}, but the index was begun with {expected!r}; use the settings "
                    "that the index was begun with, or choose another folder"
                )
        return write_tensor_file(path, sorted_tensors(tensors), TENSORS_METADATA)

    def read(self, name: str, manifest: Manifest, checks: DerivedCache | None = None) -> dict[str, Tensor]:
        """The tensors that `write` wrote, after a comparison with the digests of file and manifest.

        Args:
            name: `second_moment`, `autocorrelation` or `whitening`.
            manifest: The index's manifest.
            checks: Keeps the state of a large local file whose content was compared; it is compared again
                only if its state has changed. None compares it always.
        """
        file = self.open(name, manifest)
        if isinstance(file.path, Path):
            return _checked_once(file, file.path, f"checked-{name}", checks)
        key = (name, file.digest)
        if key not in self._copies:
            self._copies[key] = checked_tensors(file)
        return dict(self._copies[key])

    def open(self, name: str, manifest: Manifest) -> TensorFile:
        """Open a file of tensors and compare its header with the manifest; the data are not read."""
        file = open_tensor_file(self._file(name))
        expected = _manifest_digest(name, manifest)
        if expected is not None and file.digest != expected:
            raise damaged(file.path, f"digest {file.digest}, expected {cut(expected)}, the manifest's")
        return file

    def check(self, manifest: Manifest, *, whole: bool) -> None:
        """Check that the files of the tensors that the manifest needs are intact.

        Args:
            manifest: The index's manifest.
            whole: Whether to compare all bytes with the digests; otherwise the data are not read.

        Raises:
            DamagedIndexError: A file is missing, cut off, damaged or not the manifest's.
        """
        for name in needed_tensors(manifest):
            if whole:
                self.read(name, manifest)
            else:
                self.open(name, manifest)

    def save_progress(self, tensors: Mapping[str, Tensor], shards: Sequence[Shard]) -> None:
        """Save sums over `shards`."""
        last = shards[-1].digest if shards else ""
        metadata = {"format": PROGRESS_FORMAT, "shards": str(len(shards)), "last_shard": last}
        write_tensor_file(self._path / f"{PROGRESS}.safetensors", sorted_tensors(tensors), metadata)

    def load_progress(self, shards: Sequence[Shard]) -> tuple[int, dict[str, Tensor]]:
        """Number of leading `shards` that the saved sums cover, and the sums; (0, {}) if none do."""
        path = self._path / f"{PROGRESS}.safetensors"
        if not exists(path):
            return 0, {}
        try:
            file = open_tensor_file(path)
            tensors = checked_tensors(file)
        except DamagedIndexError:
            return 0, {}
        for count, shard in enumerate(shards, start=1):
            if file.metadata.get("shards") == str(count) and file.metadata.get("last_shard") == shard.digest:
                return count, tensors
        return 0, {}

    def _file(self, name: str) -> Place:
        assert name in NAMES, name
        return self._path / f"{name}.safetensors"


def needed_tensors(manifest: Manifest, rows: int = 0) -> tuple[str, ...]:
    """Names of the tensors that a finished index with this manifest has.

    Args:
        manifest: The manifest, finished or not.
        rows: Number of examples that an unfinished index will have; `stores_autocorrelation` depends on it.
    """
    second_moment = () if manifest.second_moment.digest is None else (SECOND_MOMENT,)
    if manifest.whitening is not None:
        return (*second_moment, WHITENING)
    if manifest.completion is not None:
        stored = manifest.completion.autocorrelation_digest is not None
    else:
        stored = stores_autocorrelation(rows, manifest.projection.side)
    return (*second_moment, AUTOCORRELATION) if stored else second_moment


def _checked_once(file: TensorFile, path: Path, key: str, checks: DerivedCache | None) -> dict[str, Tensor]:
    if checks is None or file.size < _CHECKED_ONCE:
        return checked_tensors(file)
    state = file_state(path)
    kept = (checks.load(key) or {}).get("state")
    if kept is not None and torch.equal(kept, state):
        return mapped_tensors(file)
    tensors = checked_tensors(file)
    if torch.equal(file_state(path), state):
        checks.save(key, {"state": state})
    return tensors


def _manifest_digest(name: str, manifest: Manifest) -> str | None:
    """The digest of a file of tensors according to the manifest, if it has one."""
    if name == SECOND_MOMENT:
        return manifest.second_moment.digest
    if name == WHITENING:
        return manifest.whitening.digest if manifest.whitening is not None else None
    return manifest.completion.autocorrelation_digest if manifest.completion is not None else None
