"""Files on other file systems, through fsspec: write whole files, read ranges, list and remove.

Each step is retried, since its failure may be temporary; after the last try it raises an error of
one line.

An object store shows a file only when it is complete. On other file systems a file is written under
its name with `.partial` appended and then renamed, as on a local disk.
"""

import contextlib
import operator
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from trackstar.errors import StoreError
from trackstar.store.files.places import Place, RemotePath
from trackstar.text import system_reason

Value = TypeVar("Value")
_Part = tuple[int, memoryview]  # position of the first byte in the file, and the buffer to fill

WAITS = (0.5, 4.0)
"""Seconds to wait before each retry."""

RANGE_BYTES = 4 << 20
"""Largest number of bytes in one request."""

GAP_BYTES = 64 << 10
"""Largest gap, in bytes, between parts of a file that are read in one request."""

PART_BYTES = 16 << 20
"""Largest number of bytes in the requests that are sent together."""

WHOLE_AT_ONCE = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "tos"})
"""Object stores: a file appears when it is complete, and there are no folders to make."""

# Errors that a retry does not resolve.
_PERMANENT = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_WRITE_ADVICE = (
    "check that the location exists, that it is writable and that the connection is stable, then try again: finished "
    "shards are kept"
)
_READ_ADVICE = "check that the file is readable and that the connection is stable, then try again"


class CutOffError(Exception):
    """A file ends before a requested part.

    Attributes:
        size: Length of the file in bytes.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def size_of(path: RemotePath) -> int:
    """Length of a file in bytes.

    Raises:
        FileNotFoundError: The file does not exist.
        StoreError: The file system does not answer.
    """

    def request() -> int:
        path.fs.invalidate_cache(path.path)
        info = path.fs.info(path.path)
        if info["type"] != "file":
            raise FileNotFoundError(str(path))
        return int(info["size"])

    return _reading(path, request)


def fill(path: RemotePath, targets: Sequence[tuple[int, memoryview]]) -> None:
    """Read parts of a file.

    Args:
        path: The file.
        targets: Position of each part's first byte in the file, and the buffer that the part fills.

    Raises:
        FileNotFoundError: The file does not exist.
        CutOffError: The file ends before a part does.
        StoreError: The file cannot be read.
    """
    batch: list[_Request] = []
    for request in _requests(targets):
        if batch and sum(map(len, batch)) + len(request) > PART_BYTES:
            _send(path, batch)
            batch = []
        batch.append(request)
    if batch:
        _send(path, batch)


def read_whole(path: RemotePath) -> bytes:
    """Content of a small file.

    Raises:
        FileNotFoundError: The file does not exist.
        StoreError: The file cannot be read, or changes while it is read.
    """
    size = size_of(path)
    for _ in range(len(WAITS) + 1):
        content = bytearray(size)
        with contextlib.suppress(CutOffError):
            fill(path, [(0, memoryview(content))])
        before, size = size, size_of(path)
        if size == before:
            return bytes(content)
    raise StoreError(f"{path}: changes while it is read; try again when no other process writes it")


def names_in(folder: RemotePath) -> list[str]:
    """Names of the files and folders in a folder, sorted; none if the folder does not exist.

    Raises:
        StoreError: The folder cannot be listed, or is a file.
    """

    def request() -> list[str]:
        folder.fs.invalidate_cache(folder.path)
        return list(folder.fs.ls(folder.path, detail=False))

    try:
        paths = [path.strip("/") for path in _reading(folder, request)]
    except FileNotFoundError:
        return []
    folder_path = folder.path.strip("/")
    # Some stores list an empty object that stands for the folder itself.
    names = sorted(path.rpartition("/")[2] for path in paths if path != folder_path)
    if paths and not names and folder.fs.isfile(folder.path):
        raise StoreError(f"{folder}: is a file, expected a folder; choose another location")
    return names


def files_below(folder: RemotePath) -> list[str]:
    """Relative paths of all files below a folder, sorted.

    Raises:
        StoreError: The folder cannot be listed.
    """

    def request() -> list[str]:
        folder.fs.invalidate_cache(folder.path)
        return list(folder.fs.find(folder.path))

    prefix = folder.path.strip("/") + "/"
    return sorted(path.strip("/").removeprefix(prefix) for path in _reading(folder, request))


def make_folder(folder: RemotePath) -> None:
    """Make a folder and its missing parents if the file system has folders; a bucket is never made.

    Raises:
        StoreError: The folder cannot be made.
    """
    if not _whole_at_once(folder):
        _writing(folder, lambda: folder.fs.makedirs(folder.path, exist_ok=True))


@contextlib.contextmanager
def replacing(path: RemotePath, *, partial_suffix: str) -> Iterator[int]:
    """Context manager that yields the descriptor of a local file, which replaces `path` on success.

    Args:
        path: The file to write.
        partial_suffix: Suffix of the file's name until it is complete, where the file system needs
            one.

    Raises:
        StoreError: The file cannot be written; an earlier file at `path` is unchanged.
    """
    try:
        with tempfile.TemporaryFile(prefix="trackstar-", buffering=0) as local:
            yield local.fileno()
            target = path if _whole_at_once(path) else path.with_name(path.name + partial_suffix)
            _upload(path, target, f"/proc/self/fd/{local.fileno()}", os.fstat(local.fileno()).st_size)
    except OSError as error:
        raise no_local_space(path, "assembled in", error) from error


def no_local_space(path: Place, verb: str, error: OSError) -> StoreError:
    """The error for a file that does not fit into this machine's folder for temporary files."""
    return StoreError(
        f"{path}: cannot be {verb} {tempfile.gettempdir()} ({system_reason(error)}); free some space there, or set "
        "TMPDIR to another folder"
    )


def remove(path: RemotePath) -> bool:
    """Remove a file; False if it cannot be removed."""
    try:
        _attempts(lambda: path.fs.rm_file(path.path))
    except Exception:
        return False
    return True


def remove_folder(path: RemotePath) -> None:
    """Remove a folder and its content as far as possible."""
    with contextlib.suppress(Exception):
        _attempts(lambda: path.fs.rm(path.path, recursive=True))


def _upload(path: RemotePath, target: RemotePath, source: str, size: int) -> None:
    """Send the local file `source` to `target`, then rename it to `path` if that is another name."""

    def send() -> None:
        path.fs.put_file(source, target.path)
        path.fs.invalidate_cache(target.path)
        arrived = path.fs.info(target.path)["size"]
        if arrived != size:
            raise OSError(f"{arrived} bytes have arrived, expected {size}")
        if target is not path:
            path.fs.mv(target.path, path.path)

    try:
        _writing(path, send)
    except BaseException:
        if target is not path:
            with contextlib.suppress(Exception):
                path.fs.rm_file(target.path)
        raise


class _Request:
    """A range of a file that covers one or several parts close to one another."""

    def __init__(self, part: _Part) -> None:
        self.parts = [part]
        self.first, self.stop = part[0], part[0] + len(part[1])

    def __len__(self) -> int:
        return self.stop - self.first

    def extend(self, part: _Part) -> bool:
        """Add a part if it is close enough; it begins no earlier than the last one."""
        stop = max(self.stop, part[0] + len(part[1]))
        close = part[0] - self.stop <= GAP_BYTES and stop - self.first <= RANGE_BYTES
        if close:
            self.parts.append(part)
            self.stop = stop
        return close


def _requests(targets: Sequence[_Part]) -> list[_Request]:
    """The parts to read, grouped into requests of at most `RANGE_BYTES`, in the file's order."""
    parts = [
        (offset + first, target[first : first + RANGE_BYTES])
        for offset, target in targets
        for first in range(0, len(target), RANGE_BYTES)
    ]
    requests: list[_Request] = []
    for part in sorted(parts, key=operator.itemgetter(0)):
        if not (requests and requests[-1].extend(part)):
            requests.append(_Request(part))
    return requests


def _send(path: RemotePath, requests: list[_Request]) -> None:
    """Send requests together and copy the answers into the parts' buffers."""
    contents = [
        request.parts[0][1] if len(request.parts) == 1 else memoryview(bytearray(len(request))) for request in requests
    ]
    _fill(path, [(request.first, content) for request, content in zip(requests, contents, strict=True)])
    for request, content in zip(requests, contents, strict=True):
        if len(request.parts) > 1:
            for offset, target in request.parts:
                target[:] = content[offset - request.first : offset - request.first + len(target)]


def _fill(path: RemotePath, parts: list[_Part]) -> None:
    """Read parts together; request the rest of a part whose answer is short, and retry after errors."""
    waits = iter(WAITS)
    while True:
        missing, error = _missing_parts(parts, _answers(path, parts))
        if not missing:
            return
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(str(path)) from error
        size = size_of(path)
        if any(offset + len(target) > size for offset, target in missing):
            raise CutOffError(size)
        if error is not None or _length(missing) == _length(parts):
            wait = None if isinstance(error, _PERMANENT) else next(waits, None)
            if wait is None:
                reason = system_reason(error) if error is not None else "the answers are empty"
                raise StoreError(f"{path}: cannot be read ({reason}); {_READ_ADVICE}") from error
            time.sleep(wait)
        parts = missing


def _answers(path: RemotePath, parts: list[_Part]) -> Sequence[bytes | Exception]:
    """The bytes of each part, or the error that its request ended with."""
    begins = [offset for offset, _ in parts]
    ends = [offset + len(target) for offset, target in parts]
    try:
        return path.fs.cat_ranges([path.path] * len(parts), begins, ends, on_error="return")
    except Exception as error:
        return [error] * len(parts)


def _missing_parts(parts: list[_Part], answers: Sequence[bytes | Exception]) -> tuple[list[_Part], Exception | None]:
    """Copy answers into the buffers; return the parts that are still missing and the first error."""
    missing, first_error = [], None
    for (offset, target), answer in zip(parts, answers, strict=True):
        if not isinstance(answer, Exception) and len(answer) > len(target):
            answer = OSError(f"{len(answer)} bytes arrived, expected {len(target)}")
        if isinstance(answer, Exception):
            first_error = first_error or answer
            missing.append((offset, target))
            continue
        target[: len(answer)] = answer
        if len(answer) < len(target):
            missing.append((offset + len(answer), target[len(answer) :]))
    return missing, first_error


def _length(parts: list[_Part]) -> int:
    return sum(len(target) for _, target in parts)


def _reading(path: RemotePath, action: Callable[[], Value]) -> Value:
    try:
        return _attempts(action)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(str(path)) from error
    except Exception as error:
        raise StoreError(f"{path}: cannot be read ({system_reason(error)}); {_READ_ADVICE}") from error


def _writing(path: RemotePath, action: Callable[[], Value]) -> Value:
    try:
        return _attempts(action)
    except Exception as error:
        raise StoreError(f"{path}: cannot be written ({system_reason(error)}); {_WRITE_ADVICE}") from error


def _attempts(action: Callable[[], Value]) -> Value:
    """The result of an action, retried after each of `WAITS` if its error may be temporary."""
    for wait in WAITS:
        try:
            return action()
        except _PERMANENT:
            raise
        except Exception:  # a file system raises any error of its client library
            time.sleep(wait)
    return action()


def _whole_at_once(path: RemotePath) -> bool:
    return path.protocol in WHOLE_AT_ONCE
