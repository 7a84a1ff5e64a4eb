"""Files on another file system, through fsspec: written whole, read in ranges of bounded size, listed, removed.

Whatever fails may only have failed this once, so that each step is tried several times. What still fails is one line.

An object store shows a file when all of it has arrived. On others it is written under its name with `.partial` behind
it and then renamed, as on this machine's disks.
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
from trackstar.text import one_line

Value = TypeVar("Value")
_Piece = tuple[int, memoryview]  # the place of its first byte in the file, and where its bytes go

WAITS = (0.5, 4.0)
"""Seconds to wait before each further try."""

RANGE_BYTES = 4 << 20
"""Most bytes of one request."""

GAP_BYTES = 64 << 10
"""Parts of a file that are no further from one another are asked for together."""

PART_BYTES = 16 << 20
"""Most bytes that are asked for at the same time."""

WHOLE_AT_ONCE = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "tos"})
"""Object stores: a file is there when all of it is, and there are no folders to be made."""

# What trying again does not mend.
_LASTING = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_WRITE_ADVICE = (
    "see that the place is there and may be written, and that the connection holds, and run the same command again: "
    "finished shards are kept"
)
_READ_ADVICE = "see that it may be read and that the connection holds, and run the same command again"


class CutOffError(Exception):
    """A file is shorter than what was asked of it.

    Attributes:
        size: Its length in bytes.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def size_of(path: RemotePath) -> int:
    """A file's length in bytes.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: That cannot be told.
    """

    def ask() -> int:
        path.fs.invalidate_cache(path.path)
        found = path.fs.info(path.path)
        if found["type"] != "file":
            raise FileNotFoundError(str(path))
        return int(found["size"])

    return _reading(path, ask)


def fill(path: RemotePath, targets: Sequence[tuple[int, memoryview]]) -> None:
    """Read parts of a file.

    Args:
        path: The file.
        targets: The place of each part's first byte in the file, and where its bytes go.

    Raises:
        FileNotFoundError: There is no such file.
        CutOffError: It ends before a part does.
        StoreError: It cannot be read.
    """
    waiting: list[_Joined] = []
    for joined in _joined(targets):
        if waiting and sum(map(len, waiting)) + len(joined) > PART_BYTES:
            _read_joined(path, waiting)
            waiting = []
        waiting.append(joined)
    if waiting:
        _read_joined(path, waiting)


def read_whole(path: RemotePath) -> bytes:
    """All of a small file.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: It cannot be read.
    """

    size = size_of(path)
    for _ in range(len(WAITS) + 1):
        content = bytearray(size)
        with contextlib.suppress(CutOffError):
            fill(path, [(0, memoryview(content))])
        before, size = size, size_of(path)
        if size == before:
            return bytes(content)
    raise StoreError(f"{path}: changes while it is read; run the same command again when nothing writes it any more")


def names_in(folder: RemotePath) -> list[str]:
    """The names of what is in a folder, sorted; none where there is no such folder.

    Raises:
        StoreError: They cannot be told, or a file is in the folder's place.
    """

    def ask() -> list[str]:
        folder.fs.invalidate_cache(folder.path)
        return list(folder.fs.ls(folder.path, detail=False))

    try:
        found = [path.strip("/") for path in _reading(folder, ask)]
    except FileNotFoundError:
        return []
    own = folder.path.strip("/")
    # Some stores list an empty object that stands for the folder itself.
    names = sorted(path.rpartition("/")[2] for path in found if path != own)
    if found and not names and folder.fs.isfile(folder.path):
        raise StoreError(f"{folder}: is a file, expected a folder; choose another place")
    return names


def files_below(folder: RemotePath) -> list[str]:
    """Every file in a folder and those below it, as paths from the folder on, sorted.

    Raises:
        StoreError: They cannot be told.
    """

    def ask() -> list[str]:
        folder.fs.invalidate_cache(folder.path)
        return list(folder.fs.find(folder.path))

    own = folder.path.strip("/") + "/"
    return sorted(path.strip("/").removeprefix(own) for path in _reading(folder, ask))


def make_folder(folder: RemotePath) -> None:
    """Make a folder and those above it, where the file system has folders; a bucket is never made.

    Raises:
        StoreError: It cannot be made.
    """
    if not _whole_at_once(folder):
        _writing(folder, lambda: folder.fs.makedirs(folder.path, exist_ok=True))


@contextlib.contextmanager
def replacing(path: RemotePath, *, partial_suffix: str) -> Iterator[int]:
    """A descriptor of a nameless file of this machine that takes the place of `path` when the block ends well.

    Args:
        path: The file to write.
        partial_suffix: What is put behind its name until it is whole, where that is not at once.

    Raises:
        StoreError: The file cannot be written there; what was at `path` is still there, or again.
    """
    try:
        with tempfile.TemporaryFile(prefix="trackstar-", buffering=0) as local:
            yield local.fileno()
            target = path if _whole_at_once(path) else path.with_name(path.name + partial_suffix)
            _upload(path, target, f"/proc/self/fd/{local.fileno()}", os.fstat(local.fileno()).st_size)
    except OSError as error:
        raise no_room(path, "put together in", error) from error


def no_room(path: Place, verb: str, error: OSError) -> StoreError:
    """The one-line error for a file that this machine cannot hold for a while."""
    return StoreError(
        f"{path}: cannot be {verb} {tempfile.gettempdir()} ({one_line(error)}); free some space there, or set TMPDIR "
        "to another folder"
    )


def remove(path: RemotePath) -> bool:
    """Remove a file; False where that cannot be done."""
    try:
        _attempts(lambda: path.fs.rm_file(path.path))
    except Exception:
        return False
    return True


def remove_folder(path: RemotePath) -> None:
    """Remove a folder with all that is in it, as far as it can be removed."""
    with contextlib.suppress(Exception):
        _attempts(lambda: path.fs.rm(path.path, recursive=True))


def _upload(path: RemotePath, target: RemotePath, source: str, size: int) -> None:
    """Send a file of this machine to `target`, and give it its name, which `path` is."""

    def send() -> None:
        path.fs.put_file(source, target.path)
        path.fs.invalidate_cache(target.path)
        found = path.fs.info(target.path)["size"]
        if found != size:
            raise OSError(f"{found} bytes have arrived, expected {size}")
        if target is not path:
            path.fs.mv(target.path, path.path)

    try:
        _writing(path, send)
    except BaseException:
        if target is not path:
            with contextlib.suppress(Exception):
                path.fs.rm_file(target.path)
        raise


class _Joined:
    """Pieces that are so near to one another that one request is less than several."""

    def __init__(self, piece: _Piece) -> None:
        self.pieces = [piece]
        self.first, self.stop = piece[0], piece[0] + len(piece[1])

    def __len__(self) -> int:
        return self.stop - self.first

    def takes(self, piece: _Piece) -> bool:
        """Add a piece that begins no earlier than the last, where it is near."""
        stop = max(self.stop, piece[0] + len(piece[1]))
        near = piece[0] - self.stop <= GAP_BYTES and stop - self.first <= RANGE_BYTES
        if near:
            self.pieces.append(piece)
            self.stop = stop
        return near


def _joined(targets: Sequence[_Piece]) -> list[_Joined]:
    """What is to be read, as requests of at most `RANGE_BYTES`, in their order in the file."""
    pieces = [
        (offset + first, target[first : first + RANGE_BYTES])
        for offset, target in targets
        for first in range(0, len(target), RANGE_BYTES)
    ]
    requests: list[_Joined] = []
    for piece in sorted(pieces, key=operator.itemgetter(0)):
        if not (requests and requests[-1].takes(piece)):
            requests.append(_Joined(piece))
    return requests


def _read_joined(path: RemotePath, requests: list[_Joined]) -> None:
    """Answer requests at the same time."""
    contents = [one.pieces[0][1] if len(one.pieces) == 1 else memoryview(bytearray(len(one))) for one in requests]
    _fill(path, [(one.first, content) for one, content in zip(requests, contents, strict=True)])
    for one, content in zip(requests, contents, strict=True):
        if len(one.pieces) > 1:
            for offset, target in one.pieces:
                target[:] = content[offset - one.first : offset - one.first + len(target)]


def _fill(path: RemotePath, pieces: list[_Piece]) -> None:
    """Read pieces at once; what a short answer leaves over is asked for again."""
    waits = iter(WAITS)
    while True:
        left, error = _placed(pieces, _answers(path, pieces))
        if not left:
            return
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(str(path)) from error
        size = size_of(path)
        if any(offset + len(target) > size for offset, target in left):
            raise CutOffError(size)
        if error is not None or _length(left) == _length(pieces):
            wait = None if isinstance(error, _LASTING) else next(waits, None)
            if wait is None:
                reason = one_line(error) if error is not None else "no answer has a byte"
                raise StoreError(f"{path}: cannot be read ({reason}); {_READ_ADVICE}") from error
            time.sleep(wait)
        pieces = left


def _answers(path: RemotePath, pieces: list[_Piece]) -> Sequence[bytes | Exception]:
    """Each piece's bytes, or why they did not come."""
    begins = [offset for offset, _ in pieces]
    ends = [offset + len(target) for offset, target in pieces]
    try:
        return path.fs.cat_ranges([path.path] * len(pieces), begins, ends, on_error="return")
    except Exception as error:
        return [error] * len(pieces)


def _placed(pieces: list[_Piece], answers: Sequence[bytes | Exception]) -> tuple[list[_Piece], Exception | None]:
    """Put answers where they belong; gives what is still to be asked for, and the first error."""
    left, first_error = [], None
    for (offset, target), answer in zip(pieces, answers, strict=True):
        if not isinstance(answer, Exception) and len(answer) > len(target):
            answer = OSError(f"{len(answer)} bytes came of {len(target)} asked for")
        if isinstance(answer, Exception):
            first_error = first_error or answer
            left.append((offset, target))
            continue
        target[: len(answer)] = answer
        if len(answer) < len(target):
            left.append((offset + len(answer), target[len(answer) :]))
    return left, first_error


def _length(pieces: list[_Piece]) -> int:
    return sum(len(target) for _, target in pieces)


def _reading(path: RemotePath, action: Callable[[], Value]) -> Value:
    try:
        return _attempts(action)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(str(path)) from error
    except Exception as error:
        raise StoreError(f"{path}: cannot be read ({one_line(error)}); {_READ_ADVICE}") from error


def _writing(path: RemotePath, action: Callable[[], Value]) -> Value:
    try:
        return _attempts(action)
    except Exception as error:
        raise StoreError(f"{path}: cannot be written ({one_line(error)}); {_WRITE_ADVICE}") from error


def _attempts(action: Callable[[], Value]) -> Value:
    """What an action gives, tried again after each of `WAITS` where it fails for a reason that may pass."""
    for wait in WAITS:
        try:
            return action()
        except _LASTING:
            raise
        except Exception:  # a file system raises whatever its client library does
            time.sleep(wait)
    return action()


def _whole_at_once(path: RemotePath) -> bool:
    return path.protocol in WHOLE_AT_ONCE
