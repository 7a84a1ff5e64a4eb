"""Files that are there whole or not at all, whatever happens to the process or the machine while they are written.

On this machine a file is written beside its place, under its name with `.partial` at the end, brought to the disk
(fsync), renamed, and the rename brought to the disk as well. Readers see the old file or the new one, never a part.
`remote_files` does the same elsewhere, by other means.
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

# A full disk, a full quota, a file over the largest size allowed.
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def replacing(path: Place, *, partial_suffix: str = PARTIAL_SUFFIX) -> Iterator[int]:
    """A descriptor of a new file that takes the place of `path` when the block ends without an error.

    Args:
        path: The file to write.
        partial_suffix: What is put behind its name until it is whole; unique where several processes may write it.

    Raises:
        StoreError: The file cannot be written; nothing is left of it, and what was at `path` is still there.
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
        remove_if_there(partial)
        raise write_error(path, error) from error
    except BaseException:
        remove_if_there(partial)
        raise
    sync_folder(path.parent)


def write_all(descriptor: int, content: bytes | bytearray | memoryview) -> None:
    """Write every byte of `content`; a single write may take only a part of them."""
    remaining = memoryview(content)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining) :]


def write_text(path: Place, text: str) -> None:
    """Replace the file at `path` by `text` in UTF-8.

    Raises:
        StoreError: It cannot be written.
    """
    with replacing(path) as descriptor:
        write_all(descriptor, text.encode("utf-8"))


def make_folder(path: Place) -> None:
    """Make a folder and those above it, durably.

    Raises:
        StoreError: It cannot be made, or a file is in its place.
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
    """Bring a folder's list of files to the disk, so that a rename in it survives a power cut.

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


def remove_if_there(path: Place) -> bool:
    """Remove a file; False where it cannot be removed, and on this machine where there is none."""
    if not isinstance(path, Path):
        return remote_files.remove(path)
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def remove_folder(path: Place) -> None:
    """Remove a folder with all that is in it, as far as it can be removed; links are not followed."""
    if not isinstance(path, Path):
        remote_files.remove_folder(path)
        return
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            remove_if_there(Path(folder) / name)
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def exists(path: Place) -> bool:
    """Whether a file is there.

    Raises:
        StoreError: The file system that it is on cannot tell.
    """
    if isinstance(path, Path):
        return path.exists()
    try:
        remote_files.size_of(path)
    except FileNotFoundError:
        return False
    return True


def file_size(path: Place) -> int:
    """A file's length in bytes.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: The file system that it is on cannot tell.
    """
    return path.stat().st_size if isinstance(path, Path) else remote_files.size_of(path)


def read_bytes(path: Place) -> bytes:
    """All of a small file.

    Raises:
        OSError: It is not there, or on this machine, cannot be read.
        StoreError: The file system that it is on cannot give it.
    """
    return path.read_bytes() if isinstance(path, Path) else remote_files.read_whole(path)


def names_in(folder: Place) -> list[str]:
    """The names of what is in a folder, sorted; none where there is no such folder.

    Raises:
        StoreError: They cannot be told, or a file is in the folder's place.
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
    """Everything in a folder and those below it, as paths from the folder on; of other file systems, files alone.

    Raises:
        StoreError: The file system that it is on cannot tell.
    """
    if isinstance(folder, Path):
        return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
    return remote_files.files_below(folder)


def write_error(path: Path, error: OSError) -> StoreError:
    """The one-line error for a file that could not be written."""
    if error.errno in NO_SPACE:
        advice = "free some space and run the same command again: finished shards are kept"
    else:
        advice = "make the place writable, or choose another"
    return StoreError(f"{path}: cannot be written ({error.strerror or error}); {advice}")
