"""The tensors that an index keeps beside its shards: V, R_train or W_train, and what an interrupted run had summed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard, final

from torch import Tensor

from trackstar.errors import DamagedIndexError, IndexMismatchError
from trackstar.store.files.durable import exists
from trackstar.store.files.places import Place
from trackstar.store.manifest import Manifest
from trackstar.store.shards import Shard
from trackstar.store.tensor_file import (
    TensorFile,
    checked_tensors,
    damaged,
    digest_of,
    open_tensor_file,
    write_tensor_file,
)
from trackstar.text import cut

SECOND_MOMENT = "second_moment"
AUTOCORRELATION = "autocorrelation"
WHITENING = "whitening"
NAMES = (SECOND_MOMENT, AUTOCORRELATION, WHITENING)
PROGRESS = "progress"
TENSORS_METADATA = {"format": "trackstar-tensors-1"}
PROGRESS_FORMAT = "trackstar-progress-1"


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """BLAKE2b-256, in hexadecimal, of the file that an index keeps these tensors in.

    It depends on names, dtypes, shapes and values, not on the mapping's order; a manifest's `second_moment.digest`.
    """
    return digest_of(in_order(tensors), TENSORS_METADATA)


def in_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by decreasing item size, so that each lies at a multiple of its item size, then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def have_shapes(tensors: Mapping[str, Tensor] | None, **shapes: tuple[int, ...]) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether these are tensors of the names and shapes: a file with a good digest may still hold others."""
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
        """Write `second_moment`, `autocorrelation` or `whitening`; gives its digest."""
        path = self._place(name)
        if name != AUTOCORRELATION:
            found, expected = tensors_digest(tensors), _known_digest(name, manifest)
            if found != expected:
                raise IndexMismatchError(
                    f"{path}: the index was made with {name}.digest {expected!r}, but {found!r} is given now; "
                    "use what the index was begun with, or choose another folder"
                )
        return write_tensor_file(path, in_order(tensors), TENSORS_METADATA)

    def read(self, name: str, manifest: Manifest) -> dict[str, Tensor]:
        """What `write` wrote, checked; where the manifest knows the digest, against that."""
        file = self.open(name, manifest)
        if isinstance(file.path, Path):
            return checked_tensors(file)
        key = (name, file.digest)
        if key not in self._copies:
            self._copies[key] = checked_tensors(file)
        return dict(self._copies[key])

    def open(self, name: str, manifest: Manifest) -> TensorFile:
        """The file of one of them: its header, against the manifest, not its data."""
        file = open_tensor_file(self._place(name))
        known = _known_digest(name, manifest)
        if known is not None and file.digest != known:
            raise damaged(file.path, f"digest {file.digest}, expected {cut(known)} as the manifest says")
        return file

    def check(self, manifest: Manifest, *, whole: bool) -> None:
        """Check that the files which the manifest needs are there.

        Args:
            manifest: The index's.
            whole: Whether all of them is compared with their digests; otherwise their data are not read.

        Raises:
            DamagedIndexError: One is missing, cut off, damaged, or not the manifest's.
        """
        for name in needed_tensors(manifest):
            if whole:
                self.read(name, manifest)
            else:
                self.open(name, manifest)

    def save_progress(self, tensors: Mapping[str, Tensor], shards: Sequence[Shard]) -> None:
        """Keep what was accumulated over `shards`."""
        last = shards[-1].digest if shards else ""
        metadata = {"format": PROGRESS_FORMAT, "shards": str(len(shards)), "last_shard": last}
        write_tensor_file(self._path / f"{PROGRESS}.safetensors", in_order(tensors), metadata)

    def load_progress(self, shards: Sequence[Shard]) -> tuple[int, dict[str, Tensor]]:
        """What was kept over the first of `shards`, and over how many; (0, {}) where that is not so."""
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

    def _place(self, name: str) -> Place:
        assert name in NAMES, name
        return self._path / f"{name}.safetensors"


def needed_tensors(manifest: Manifest) -> tuple[str, ...]:
    """Which of the files a finished index has."""
    kept = () if manifest.second_moment.digest is None else (SECOND_MOMENT,)
    return (*kept, AUTOCORRELATION if manifest.whitening is None else WHITENING)


def _known_digest(name: str, manifest: Manifest) -> str | None:
    """What the manifest says of a file's digest, if anything."""
    if name == SECOND_MOMENT:
        return manifest.second_moment.digest
    if name == WHITENING:
        return manifest.whitening.digest if manifest.whitening is not None else None
    return manifest.completion.autocorrelation_digest if manifest.completion is not None else None
