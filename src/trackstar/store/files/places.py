"""Locations of indexes: local folders, or URLs of file systems that fsspec supports (`s3://` ...).

A local folder is a `pathlib.Path`, read and written as usual. A URL becomes a `upath.UPath`; upath
and fsspec are only imported for URLs.
"""

# ruff: noqa: D102 - the class explains the protocol's attributes.
import os
import re
import warnings
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from trackstar.errors import StoreError
from trackstar.text import abridged, system_reason

# A word and "://": neither `C:x` nor a file name with a colon matches.
_URL = re.compile(r"([a-z0-9+]+)://")
_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")
_LOCAL_PROTOCOLS = ("", "file", "local")
_S3_PROTOCOLS = ("s3", "s3a")


@runtime_checkable
class RemotePath(Protocol):
    """A `upath.UPath` on another file system: the attributes that trackstar uses.

    Attributes:
        fs: The fsspec file system.
        path: Path on that file system.
        protocol: Protocol of the URL, such as `s3`.
        name: Last part of the path.
        parent: Folder that contains it.
    """

    @property
    def fs(self) -> Any: ...

    @property
    def path(self) -> str: ...

    @property
    def protocol(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def parent(self) -> "RemotePath": ...

    def with_name(self, name: str, /) -> "RemotePath":
        """The same path with another last part."""
        ...

    def __truediv__(self, name: str, /) -> "RemotePath": ...

    def stat(self) -> Any: ...

    def rglob(self, pattern: str, /) -> Any: ...

    def read_bytes(self) -> bytes: ...

    def write_bytes(self, data: Any, /) -> int: ...

    def unlink(self) -> None: ...


Place = Path | RemotePath
"""A file or folder on a local disk or another file system."""


def is_url(path: object) -> bool:
    """Whether this is a URL, not a local path."""
    return isinstance(path, str) and _URL.match(path) is not None


def as_folder(path: str | Place) -> Place:
    """The location of a path or URL; a URL of local files (`file://`) becomes a `Path`.

    Raises:
        StoreError: The URL cannot be used: a package is missing, or its protocol is unknown.
    """
    if isinstance(path, Path):
        return Path(str(path)) if hasattr(path, "protocol") else path
    if not isinstance(path, str) and not hasattr(path, "protocol"):
        raise StoreError(f"expected a path or a URL of an index, found {abridged(path)}")
    if isinstance(path, str):
        if "::" in path and "://" in path:
            raise StoreError(f"{path}: a URL within a URL, expected one file system; pass its URL alone")
        if not is_url(path):
            return Path(path)
        if _PASSWORD.search(path):
            shown = _PASSWORD.sub("://", path)
            raise StoreError(
                f"{shown}: the URL contains a password, which messages and manifests would show; set it in the "
                "environment or in fsspec's configuration (docs/how-to/remote-stores.md)"
            )
    place = _from_url(path) if isinstance(path, str) else path
    if place.protocol in _LOCAL_PROTOCOLS:
        return Path(place.path)
    try:
        place.fs  # noqa: B018 - the file system is made at first use
    except ImportError as error:
        raise _package_missing(str(path), place.protocol, error) from error
    except Exception as error:  # a file system raises any error of its client library
        raise StoreError(
            f"{path}: its file system cannot be reached ({system_reason(error)}); check the address and the connection"
        ) from error
    return cast("RemotePath", place)


def lies_in(path: str | Place, folder: str | Place) -> bool:
    """Whether a file or folder is this folder or lies below it."""
    inner, outer = as_folder(path), as_folder(folder)
    if isinstance(inner, Path) and isinstance(outer, Path):
        inner, outer = Path(os.path.realpath(inner)), Path(os.path.realpath(outer))  # `resolve` raises for circles
        return outer in (inner, *inner.parents)
    if isinstance(inner, Path) or isinstance(outer, Path) or inner.fs != outer.fs:
        return False
    inner_parts, outer_parts = _parts(inner), _parts(outer)
    return inner_parts[: len(outer_parts)] == outer_parts


def place_name(place: Place) -> str:
    """Last part of a folder's path."""
    return Path(os.path.realpath(place)).name if isinstance(place, Path) else place.name or str(place)


def _parts(path: RemotePath) -> list[str]:
    return [part for part in path.path.split("/") if part]


def _from_url(url: str) -> Any:
    protocol = url.partition("://")[0]
    try:
        from upath import UPath
    except ImportError as error:
        raise _package_missing(url, protocol, error) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about protocols without a class in UPath
            return UPath(url)
    except ImportError as error:
        raise _package_missing(url, protocol, error) from error
    except Exception as error:
        raise StoreError(
            f"{url}: not a URL of a folder ({system_reason(error)}); pass a folder, or a URL such as s3://bucket/index"
        ) from error


def _package_missing(url: str, protocol: str, error: ImportError) -> StoreError:
    if protocol in _S3_PROTOCOLS or error.name == "upath":
        advice = "pip install 'trackstar-tda[remote]'"
    else:
        advice = f"install it, and pip install 'trackstar-tda[remote]' ({system_reason(error)})"
    return StoreError(f"{url}: the package for {protocol}:// is missing; {advice}")
