"""The rule for outputs: a run replaces only files that it wrote itself, and nothing that it reads.

* An output that is, or lies in, an input of the run is refused, also through links (symbolic or
  hard): files are compared by device and inode. So is an output that lies in an index.
* An existing file is replaced only if it is empty, or an earlier output of the same kind for the same
  file name; any other file needs `force=True`, which never covers inputs.
* A symbolic link is followed: its target is replaced and the link stays. Pipes, devices and other
  files without content of their own are refused.
* A file appears whole or not at all. Until then it has a name that no other file has
  (`.trackstar-*.partial` in the same folder).
"""

import contextlib
import dataclasses
import errno
import fnmatch
import glob
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trackstar.corpus.local_files import special_kind
from trackstar.errors import OptionError, StoreError
from trackstar.store.files.places import Place, is_url, lies_in
from trackstar.text import system_reason

FileId = tuple[int, int]
"""Device and inode."""

_MOST_LINKS = 40


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """Something that a run reads.

    Attributes:
        parameter: The parameter that names it.
        path: A path or URL.
    """

    parameter: str
    path: str


def inputs(**paths: object) -> list[Input]:
    """The files, folders and URLs among the values of parameters.

    A pattern stands for the files that match it now, and for itself: an output that would match it
    is read by the next run. Other values, such as None, the name of a model on the hub or data in
    memory, are left out.
    """
    found = []
    for parameter, value in paths.items():
        if isinstance(value, (str, os.PathLike)) or hasattr(value, "protocol"):
            found += [Input(parameter=parameter, path=path) for path in _expanded(str(value))]
    return found


def refuse_inputs(outputs: Sequence[str | Path], read: Sequence[Input]) -> None:
    """Raise if an output is something that the run reads, or lies in a folder that it reads or in an index.

    Args:
        outputs: Local files or folders that the run writes; they need not exist.
        read: What it reads.

    Raises:
        OptionError: An output is or lies in an input; the message names both.
    """
    places: dict[FileId, tuple[str | Path, bool]] = {}
    for output in outputs:
        target = _real(Path(output))
        for place in (target, *target.parents):
            identifier = _id_of(place)
            if identifier is not None:
                places.setdefault(identifier, (output, place == target))
        index = next((folder for folder in target.parents if _is_index(folder)), None)
        if index is not None:
            raise OptionError(f"{output}: lies in the index {index}, which holds nothing else; choose another path")
    replaced = any(exists for _, exists in places.values())
    for one in read:
        for output in outputs:
            if glob.has_magic(one.path) and fnmatch.fnmatch(os.path.abspath(output), os.path.abspath(one.path)):
                raise OptionError(
                    f"{output}: would be among what the next run reads, `{one.parameter}` {one.path}; choose another "
                    "path"
                )
        for identifier, is_folder in _ids_below(Path(one.path), files=replaced):
            output, is_target = places.get(identifier, (None, False))
            if output is not None and (is_folder or is_target):
                relation = "is" if is_target else "lies in"
                raise OptionError(
                    f"{output}: {relation} what this run reads, `{one.parameter}` {one.path}; choose another path"
                )


def refuse_input_folder(out: str | Place, read: Sequence[Input]) -> None:
    """Raise if an output folder is or lies in something that the run reads, or holds some of it.

    Args:
        out: The folder; a path, or the URL of an index.
        read: What the run reads.

    Raises:
        OptionError: The folder and an input overlap; the message names both.
    """
    if not isinstance(out, Path) and (is_url(out) or hasattr(out, "protocol")):
        for one in read:
            with contextlib.suppress(StoreError):  # an input that cannot be reached has an error of its own
                if lies_in(out, one.path):
                    raise OptionError(
                        f"{out}: is or lies in what this run reads, `{one.parameter}` {one.path}; choose another path"
                    )
        return
    folder = Path(str(out))
    refuse_inputs([folder], read)
    if os.path.lexists(folder) and not folder.is_dir():
        raise OptionError(f"{out}: is a file, expected a folder or a new name; choose another path")
    place = _id_of(folder)
    for one in read if place is not None else ():
        target = _real(Path(one.path))
        if place in map(_id_of, target.parents):
            raise OptionError(
                f"{out}: holds what this run reads, `{one.parameter}` {one.path}; choose another folder for the output"
            )


def check_replaceable(path: Path, is_earlier: Callable[[Path], bool], *, force: bool | None = None) -> None:
    """Raise if a file may not be written.

    Args:
        path: The file; it need not exist.
        is_earlier: Whether an existing file is an earlier output for the same name.
        force: Whether a file that is none may be replaced; None if the caller offers no choice.

    Raises:
        OptionError: The path is a folder, a pipe or a device, or an existing file that is not an
            earlier output.
    """
    target = output_target(path)
    try:
        if force or not target.exists() or target.stat().st_size == 0:
            return
        earlier = is_earlier(target)
    except OSError as error:
        raise _unwritable(path, error) from error
    except (ValueError, LookupError, TypeError, RecursionError):
        earlier = False
    if not earlier:
        advice = "" if force is None else ", or pass `force=True` to replace it"
        raise OptionError(
            f"{path}: an existing file that is not an earlier output of the same kind; choose another name{advice}"
        )


def output_target(path: Path) -> Path:
    """The file that is written for an output's path, with symbolic links followed.

    Raises:
        OptionError: It is a folder, a pipe, a device or a socket, or cannot be looked up.
    """
    target = path
    try:
        target = _followed(path)
        kind = target.stat().st_mode
    except FileNotFoundError:
        return target
    except OptionError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        raise _unwritable(path, error) from error
    if stat.S_ISDIR(kind):
        raise _unwritable(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    special = special_kind(target)
    if special is not None:
        raise OptionError(f"{path}: expected a file, found {special}; choose the name of a file")
    return target


def check_can_write(path: Path) -> None:
    """Raise if a file cannot be written; make the folders above it. An existing file is left as it is.

    Raises:
        OptionError: It cannot be written.
    """
    with _partial(path, output_target(path)):
        pass


def replace_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, which appears whole or not at all, and make the folders above it.

    Raises:
        OptionError: The file cannot be written; an earlier file of that name is kept.
    """
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file, which appears whole or not at all, and make the folders above it.

    Raises:
        OptionError: The file cannot be written; an earlier file of that name is kept.
    """
    target = output_target(path)
    with _partial(path, target) as partial:
        partial.write_bytes(content)
        os.replace(partial, target)


@contextlib.contextmanager
def _partial(path: Path, target: Path) -> Iterator[Path]:
    """A new file beside the target, removed at the end if it still exists."""
    partial = target.with_name(f".trackstar-{secrets.token_hex(8)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        # A name that is too long for the file system is found before the work, not after it.
        target.is_file()
        yield partial
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            partial.unlink()


def _unwritable(path: Path, error: OSError | ValueError) -> OptionError:
    return OptionError(
        f"{path}: results cannot be written ({system_reason(error)}); make the folder writable, or choose another"
    )


def _followed(path: Path) -> Path:
    """The path that a chain of symbolic links ends at; links to open files (`/dev/stdout`) are refused."""
    place = path
    for _ in range(_MOST_LINKS):
        if place.is_relative_to("/proc") or place.is_relative_to("/dev/fd"):
            raise OptionError(f"{path}: expected a file, found a stream of this process; choose the name of a file")
        if not place.is_symlink():
            return place
        place = Path(os.path.normpath(_real(place.parent) / os.readlink(place)))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _real(path: Path) -> Path:
    """The path without symbolic links, as far as it can be looked up."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        return path


def _id_of(path: Path) -> FileId | None:
    """Device and inode of an existing file or folder."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _ids_below(path: Path, *, files: bool) -> Iterator[tuple[FileId, bool]]:
    """Device and inode of a file, or of a folder and what is below it, and whether each is a folder.

    Symbolic links are followed, as by the readers of corpora.

    Args:
        path: The file or folder; nothing is yielded if it does not exist.
        files: Whether the files below a folder are wanted, too.
    """
    first = _id_of(path)
    if first is None:
        return
    if not path.is_dir():
        yield first, False
        return
    yield first, True
    seen = {first}
    for folder, folders, names in os.walk(path, followlinks=True):
        for name in tuple(folders):
            identifier = _id_of(Path(folder) / name)
            if identifier is None or identifier in seen:
                folders.remove(name)
            else:
                seen.add(identifier)
                yield identifier, True
        for name in names if files else ():
            identifier = _id_of(Path(folder) / name)
            if identifier is not None:
                yield identifier, False


def _is_index(folder: Path) -> bool:
    try:
        return (folder / "manifest.json").is_file() and (folder / "shards").is_dir()
    except OSError:
        return False


def _expanded(path: str) -> list[str]:
    """A path or URL as a list; a pattern with the files that match it; nothing for what is missing."""
    if path.startswith(("file://", "local://")):
        path = path.partition("://")[2]
    if is_url(path):
        return [path]
    try:
        if os.path.lexists(path):
            return [path]
    except ValueError:  # a NUL byte
        return []
    return [*sorted(glob.glob(path, recursive=True)), path] if glob.has_magic(path) else []
