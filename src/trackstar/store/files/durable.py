"""Files that are complete or absent, even if the process or the machine fails while they are written.

A local file is written under its name with `.partial` appended, synced to the disk (fsync) and
renamed, and its folder is synced. Readers see the old file or the new one, never a part.
`remote.py` does the same on other file systems.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from trackstar.errors import StoreError
from trackstar.store.files import remote as remote_files
from trackstar.store.files.places import Place

PARTIAL_SUFFIX = ".partial"

# A full disk, a full quota, a file larger than the limit.
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def replacing(path: Place, *, partial_suffix: str = PARTIAL_SUFFIX) -> Iterator[int]:
    """Context manager that yields the descriptor of a new file, which replaces `path` on success.

    Args:
        path: The file to write.
        partial_suffix: Suffix of the file's name until it is complete; unique if several processes
            may write the file.

    Raises:
        StoreError: The file cannot be written; nothing of it remains, and an earlier file at `path`
            is unchanged.
    """
    if not isinstance(path, Path):
        with remote_files.replacing(path, partial_suffix=partial_suffix) as descriptor:
            yield descriptor
        return
    partial = path.with_name(path.name + partial_suffix)
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(partial, path)
    except OSError as error:
        remove_file(partial)
        raise write_error(path, error) from error
    except BaseException:
        remove_file(partial)
        raise
    sync_folder(path.parent)


def write_all(descriptor: int, content: bytes | bytearray | memoryview) -> None:
    """Write all of `content`, although a single `write` may write only part of it."""
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining) :]


def write_text(path: Place, text: str) -> None:
    """Replace the file at `path` by `text` in UTF-8, durably.

    Raises:
        StoreError: The file cannot be written.
    """
    with replacing(path) as descriptor:
        write_all(descriptor, text.encode("utf-8"))


def make_folder(path: Place) -> None:
    """Make a folder and its missing parents, durably.

    Raises:
        StoreError: The folder cannot be made, or a file has its name.
    """
    if not isinstance(path, Path):
        remote_files.make_folder(path)
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    for folder in missing:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Sync a folder's list of files to the disk, so that a rename survives a power failure.

    Raises:
        StoreError: The folder cannot be opened or synced.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise write_error(path, error) from error


def remove_file(path: Place) -> bool:
    """Remove a file; False if it cannot be removed or, on a local disk, does not exist."""
    if not isinstance(path, Path):
        return remote_files.remove(path)
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def remove_folder(path: Place) -> None:
    """Remove a folder and its content as far as possible; links are not followed."""
    if not isinstance(path, Path):
        remote_files.remove_folder(path)
        return
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            remove_file(Path(folder) / name)
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def exists(path: Place) -> bool:
    """Whether a file exists.

    Raises:
        StoreError: Its file system does not answer.
    """
    if isinstance(path, Path):
        return path.exists()
    try:
        remote_files.size_of(path)
    except FileNotFoundError:
        return False
    return True


def file_size(path: Place) -> int:
    """Length of a file in bytes.

    Raises:
        FileNotFoundError: The file does not exist.
        StoreError: Its file system does not answer.
    """
    return path.stat().st_size if isinstance(path, Path) else remote_files.size_of(path)


def read_bytes(path: Place) -> bytes:
    """Content of a small file.

    Raises:
        OSError: The file does not exist or, on a local disk, cannot be read.
        StoreError: The file cannot be read from its file system.
    """
    return path.read_bytes() if isinstance(path, Path) else remote_files.read_whole(path)


def names_in(folder: Place) -> list[str]:
    """Names of the files and folders in a folder, sorted; none if the folder does not exist.

    Raises:
        StoreError: The folder cannot be listed, or is a file.
    """
    if not isinstance(folder, Path):
        return remote_files.names_in(folder)
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise write_error(folder, error) from error


def files_below(folder: Place) -> list[str]:
    """Relative paths of everything below a folder, sorted; from other file systems, of files only.

    Raises:
        StoreError: The folder cannot be listed.
    """
    if isinstance(folder, Path):
        return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
    return remote_files.files_below(folder)


def write_error(path: Path, error: OSError) -> StoreError:
    """The error for a file that could not be written."""
    if error.errno in NO_SPACE:
        advice = "free some space and try again: finished shards are kept"
    else:
        advice = "make its folder writable, or choose another folder"
    return StoreError(f"{path}: cannot be written ({error.strerror or error}); {advice}")
