"""Cached results of computations with an index, stored in its folder; they can be deleted at any time."""

import os
import re
import secrets
from collections.abc import Mapping
from typing import final

from torch import Tensor

from trackstar.corpus.digests import digest_of_bytes
from trackstar.errors import StoreError
from trackstar.store.files.durable import PARTIAL_SUFFIX, exists, make_folder
from trackstar.store.files.places import Place
from trackstar.store.manifest import Manifest
from trackstar.store.tensor_file import open_tensor_file, sorted_tensors, write_tensor_file
from trackstar.store.tensor_reading import checked_tensors

DERIVED_FORMAT = "trackstar-derived-1"


@final
class DerivedCache:
    """The files in derived/ that were computed from the index with this manifest."""

    def __init__(self, folder: Place, manifest: Manifest) -> None:
        self._folder = folder
        self._finished = manifest.completion is not None
        self._index = digest_of_bytes(manifest.to_json().encode("ascii"), bits=256)

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors saved under `key` for this index; None if there are none, or if they are damaged."""
        path = self._file(key)
        try:
            if not self._finished or not exists(path):
                return None
            file = open_tensor_file(path)
            return checked_tensors(file) if file.metadata == self._metadata(key) else None
        except StoreError:
            return None

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Save `tensors` under `key`; False if they cannot be saved."""
        path = self._file(key)
        if not self._finished:
            return False
        # Several processes may save the same result at once: each writes its own file, and the last
        # rename wins.
        suffix = f".{os.getpid()}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}"
        try:
            make_folder(self._folder)
            write_tensor_file(path, sorted_tensors(tensors), self._metadata(key), partial_suffix=suffix)
        except StoreError:
            return False
        return True

    def _file(self, key: str) -> Place:
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,150}", key), key
        return self._folder / f"{key}.safetensors"

    def _metadata(self, key: str) -> dict[str, str]:
        return {"format": DERIVED_FORMAT, "index": self._index, "key": key}
