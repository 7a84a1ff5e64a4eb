"""Where an index is: a folder of this machine, or a URL of a file system that fsspec knows (`s3://`, `gs://` ...).

A folder of this machine is a `pathlib.Path`, and nothing here changes how it is read and written. A URL becomes a
`upath.UPath`; neither that nor fsspec is imported for anything else.
"""

# ruff: noqa: D102 - the protocol's attributes are explained by its class.
import re
import warnings
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from trackstar.errors import StoreError
from trackstar.text import one_line

# A word and "://", so that neither `C:x` nor a file's name with a colon is one.
_URL = re.compile(r"([a-z0-9+]+)://")
_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")
_LOCAL_PROTOCOLS = ("", "file", "local")
_S3_PROTOCOLS = ("s3", "s3a")


@runtime_checkable
class RemotePath(Protocol):
    """What is used of a `upath.UPath` of another file system than this machine's, and some that it shares with `Path`.

    Attributes:
        fs: Its fsspec file system.
        path: Its path there.
        protocol: The URL's beginning.
        name: Its last part.
        parent: What it is in.
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
        """Another name in the same place."""
        ...

    def __truediv__(self, name: str, /) -> "RemotePath": ...

    def stat(self) -> Any: ...

    def rglob(self, pattern: str, /) -> Any: ...

    def read_bytes(self) -> bytes: ...

    def write_bytes(self, data: Any, /) -> int: ...

    def unlink(self) -> None: ...


Place = Path | RemotePath
"""A file or folder, here or elsewhere."""


def is_url(path: object) -> bool:
    """Whether a text is a URL rather than a path of this machine."""
    return isinstance(path, str) and _URL.match(path) is not None


def as_folder(path: str | Place) -> Place:
    """The place that a path or URL names; a URL of this machine's files is a path as well.

    Raises:
        StoreError: It is a URL that cannot be used: a package is missing, or nothing knows its protocol.
    """
    if isinstance(path, Path):
        return Path(str(path)) if hasattr(path, "protocol") else path
    if isinstance(path, str):
        if "::" in path and "://" in path:
            raise StoreError(f"{path}: a URL within a URL, expected one file system; give its URL alone")
        if not is_url(path):
            return Path(path)
        if _PASSWORD.search(path):
            shown = _PASSWORD.sub("://", path)
            raise StoreError(
                f"{shown}: was given with a password, which would be told wherever the index is named; give it by the "
                "environment or fsspec's configuration (docs/how-to/remote-stores.md)"
            )
    place = _from_url(path) if isinstance(path, str) else path
    if place.protocol in _LOCAL_PROTOCOLS:
        return Path(place.path)
    try:
        place.fs  # noqa: B018 - is made at first use
    except ImportError as error:
        raise _package_missing(str(path), place.protocol, error) from error
    except Exception as error:  # a file system raises whatever its client library does
        raise StoreError(
            f"{path}: its file system cannot be reached ({one_line(error)}); check the address and the connection"
        ) from error
    return cast("RemotePath", place)


def lies_in(path: str | Place, folder: str | Place) -> bool:
    """Whether a place is a folder, or anywhere in it."""
    inner, outer = as_folder(path), as_folder(folder)
    if isinstance(inner, Path) and isinstance(outer, Path):
        inner, outer = inner.resolve(), outer.resolve()
        return outer in (inner, *inner.parents)
    if isinstance(inner, Path) or isinstance(outer, Path) or inner.fs != outer.fs:
        return False
    inner_parts, outer_parts = _parts(inner), _parts(outer)
    return inner_parts[: len(outer_parts)] == outer_parts


def place_name(place: Place) -> str:
    """A folder's own name, without those that it is in."""
    return place.resolve().name if isinstance(place, Path) else place.name or str(place)


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
            warnings.simplefilter("ignore", UserWarning)  # of protocols that UPath has no class of its own for
            return UPath(url)
    except ImportError as error:
        raise _package_missing(url, protocol, error) from error
    except Exception as error:
        raise StoreError(
            f"{url}: not a URL that an index can be at ({one_line(error)}); give a folder, or a URL such as "
            "s3://bucket/index"
        ) from error


def _package_missing(url: str, protocol: str, error: ImportError) -> StoreError:
    if protocol in _S3_PROTOCOLS or error.name == "upath":
        advice = "pip install 'trackstar-tda[remote]'"
    else:
        advice = f"install it beside pip install 'trackstar-tda[remote]' ({one_line(error)})"
    return StoreError(f"{url}: a package for {protocol}:// is missing; {advice}")
