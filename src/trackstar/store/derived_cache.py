"""Results of later computations kept beside an index; they may be deleted at any time and are then computed again."""

import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from typing import final

from torch import Tensor

from trackstar.errors import StoreError
from trackstar.store.files.durable import PARTIAL_SUFFIX, exists, make_folder
from trackstar.store.files.places import Place
from trackstar.store.index_tensors import in_order
from trackstar.store.manifest import Manifest
from trackstar.store.tensor_file import checked_tensors, open_tensor_file, write_tensor_file

DERIVED_FORMAT = "trackstar-derived-1"


@final
class DerivedCache:
    """The files under derived/ that were computed from the index with this manifest."""

    def __init__(self, folder: Place, manifest: Manifest) -> None:
        self._folder = folder
        self._finished = manifest.completion is not None
        self._index = hashlib.blake2b(manifest.to_json().encode("ascii"), digest_size=32).hexdigest()

    def load(self, key: str) -> dict[str, Tensor] | None:
        """What is kept under `key`; None where nothing is, or it is damaged or of another index."""
        path = self._place(key)
        try:
            if not self._finished or not exists(path):
                return None
            file = open_tensor_file(path)
            return checked_tensors(file) if file.metadata == self._metadata(key) else None
        except StoreError:
            return None

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Keep `tensors` under `key`; False where that cannot be done."""
        path = self._place(key)
        if not self._finished:
            return False
        # Several readers may compute the same at once: each writes a file of its own, and the last rename stays.
        suffix = f".{os.getpid()}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}"
        try:
            make_folder(self._folder)
            write_tensor_file(path, in_order(tensors), self._metadata(key), partial_suffix=suffix)
        except StoreError:
            return False
        return True

    def _place(self, key: str) -> Place:
        assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,150}", key), key
        return self._folder / f"{key}.safetensors"

    def _metadata(self, key: str) -> dict[str, str]:
        return {"format": DERIVED_FORMAT, "index": self._index, "key": key}
