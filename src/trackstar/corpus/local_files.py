"""Local files: regular ones only, found at any depth, and unchanged while they are read.

Opening a pipe, a socket or a device may wait for ever, and reading it may never end. So every reader
checks the path first.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from trackstar.errors import CorpusError, TrackstarError

_SPECIAL = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class FileState(NamedTuple):
    """What changes if a file is written or replaced: its inode, size and time of modification."""

    device: int
    inode: int
    size: int
    modified_ns: int


def file_state(path: str | os.PathLike[str]) -> FileState | None:
    """The state of a file; None if nothing is there."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def special_kind(path: str | os.PathLike[str]) -> str | None:
    """`a pipe`, `a socket` or `a device`; None for anything else, and if nothing is there."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    return next((kind for is_kind, kind in _SPECIAL if is_kind(mode)), None)


def check_not_special(path: str | os.PathLike[str], error: type[TrackstarError] = CorpusError) -> None:
    """Raise if a path is a pipe, a socket or a device.

    Raises:
        TrackstarError: It is one; the error is of the class `error`.
    """
    kind = special_kind(path)
    if kind is not None:
        raise error(f"{os.fspath(path)}: is {kind}; expected a regular file; copy its content into one first")


def check_no_special_inside(folder: str | os.PathLike[str], error: type[TrackstarError] = CorpusError) -> None:
    """Raise if a folder directly holds a pipe, a socket or a device; a missing folder is not checked.

    Raises:
        TrackstarError: It holds one; the error is of the class `error`.
    """
    try:
        names = sorted(os.listdir(folder))
    except (OSError, ValueError):
        return
    for name in names:
        check_not_special(os.path.join(folder, name), error)


def files_below(folder: str) -> list[str]:
    """Paths of all files in a folder at any depth, sorted; names that begin with `.` or `_` are left out.

    Links to files and folders are followed.

    Raises:
        CorpusError: A folder cannot be read, a link leads to nothing or to a folder that contains
            it, or a file is a pipe, a socket or a device.
    """
    return sorted(_below(folder, (folder,)))


def _below(folder: str, parents: tuple[str, ...]) -> Iterator[str]:
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise CorpusError(
            f"{folder}: the folder cannot be read ({error.strerror}); make it readable, or move it away"
        ) from error
    for name in sorted(names):
        if name[0] in "._":
            continue
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            if any(os.path.samefile(path, parent) for parent in parents):
                raise CorpusError(f"{path}: is a link to a folder that contains it; remove the link")
            yield from _below(path, (*parents, path))
        elif os.path.islink(path) and not os.path.exists(path):
            raise CorpusError(f"{path}: is a link to nothing ({os.readlink(path)}); remove it, or restore its target")
        else:
            check_not_special(path)
            yield path


def files_matching(pattern: str) -> list[str]:
    """Paths of the files that a pattern with `**` matches, sorted, searched for with `files_below`.

    Raises:
        CorpusError: See `files_below`.
    """
    from fsspec.utils import glob_translate

    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    folder = str(Path(fixed if fixed.endswith("/") else os.path.dirname(fixed)))
    matches = re.compile(glob_translate(pattern)).match
    return [path for path in files_below(folder) if matches(path)] if os.path.isdir(folder) else []
