"""The files of a corpus or of queries: find, open and decompress them, and read their lines.

Every failure is a one-line error that names the file and, if it concerns one, the line.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, cast

from trackstar.corpus.digests import digest_of_stream
from trackstar.corpus.local_files import (
    FileState,
    check_not_special,
    file_state,
    files_below,
    files_matching,
    special_kind,
)
from trackstar.errors import CorpusError
from trackstar.text import one_line, without_credentials

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Format = Literal["jsonl", "text", "csv", "tsv", "parquet", "arrow"]
Compression = Literal["gzip", "zstd", "xz"]

LONGEST_LINE = 64 * 2**20
"""Most bytes of one line. Bounds memory if a file has no line ends."""

BLOCK_BYTES = 2**20
Decompressed = io.BufferedReader | gzip.GzipFile | lzma.LZMAFile
"""A stream of a file's decompressed bytes."""
_ZSTD_BLOCK_BYTES = 2**13  # zstd expands up to 32,000-fold: 8 KiB read are at most 256 MiB decompressed

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
_UNCOMPRESSED: tuple[Format, ...] = ("parquet", "arrow")
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}
EXPECTED_NAMES = ".jsonl, .ndjson, .json, .txt, .csv or .tsv (plain, .gz, .zst or .xz), or .parquet, .arrow or .feather"
_REPLACE = "copy it from its source or write it again"

_SHARD_NUMBER = re.compile(r"-\d+-of-\d+$")  # the public release's `trex_sentences.jsonl-00003-of-00020`


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One file to read.

    Attributes:
        filesystem: Its fsspec file system.
        path: Its path on that file system.
        name: Its name in messages.
        stem: Its base name without endings; names the examples whose records have no name.
        format: Format of its records.
        compression: Its compression; None for none.
        array: Whether it may hold one JSON array in place of lines, as its name ends in `.json`.
        state: Its state when it was found, if it is local; it must not change until it is read.
    """

    filesystem: "AbstractFileSystem" = dataclasses.field(repr=False)
    path: str
    name: str
    stem: str
    format: Format
    compression: Compression | None
    array: bool = False
    state: FileState | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataFiles:
    """The files that a path or URL names.

    Attributes:
        name: The path as given, without credentials.
        files: The files to read, in the order of their names.
        left_out: Base names of the files beside them whose endings name no known format.
        dataset: Whether it is a folder saved by the `datasets` library; `files` is then empty.
    """

    name: str
    files: tuple[DataFile, ...]
    left_out: tuple[str, ...]
    dataset: bool


def find_files(path: str) -> DataFiles:
    """Find the files of a path, glob or URL: one file, a folder's files at any depth, or a saved
    dataset.

    Raises:
        CorpusError: The path does not exist, is a pipe, a socket or a device, holds no file of a
            known format, or mixes formats.
    """
    name = without_credentials(path)
    if not path.strip():
        raise CorpusError("the path is empty; give a file, a folder or a glob")
    filesystem, root = _filesystem(path, name)
    local = _is_local(filesystem)
    if local and special_kind(root) is not None:
        check_not_special(root)
    file = _data_file(filesystem, root, name)
    try:
        # Checked first: `isdir` of a web address downloads the whole file.
        if file is not None and filesystem.isfile(root):
            return DataFiles(name=name, files=(file,), left_out=(), dataset=False)
        if filesystem.isdir(root):
            return _folder(filesystem, root, name)
        if not filesystem.exists(root) and any(sign in path for sign in "*?["):
            matches = cast("list[str]", files_matching(root) if local and "**" in root else filesystem.glob(root))
            files = [each for each in sorted(matches) if not filesystem.isdir(each)]
            return _several(filesystem, files, name, kind="pattern")
        if not filesystem.exists(root):
            raise CorpusError(f"{name}: no such file or folder; check the path")
    except CorpusError:
        raise
    except Exception as error:  # remote file systems raise the errors of their client libraries
        raise _unreadable(name, error) from error
    raise CorpusError(
        f"{name}: its name has no known ending; expected {EXPECTED_NAMES}; rename it, or convert it if "
        "its content is none of these"
    )


def _filesystem(path: str, name: str) -> "tuple[AbstractFileSystem, str]":
    import fsspec.core

    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        raise CorpusError(f"{name}: its file system needs a package ({one_line(error)}); install it") from error
    except Exception as error:
        raise CorpusError(f"{name}: not a path or URL that can be opened ({one_line(error)}); check it") from error


def _folder(filesystem: "AbstractFileSystem", root: str, name: str) -> DataFiles:
    inside = {PurePosixPath(path).name for path in cast("list[str]", filesystem.ls(root, detail=False))}
    if "dataset_dict.json" in inside:
        splits = ", ".join(sorted(each for each in inside if filesystem.isdir(f"{root}/{each}")))
        raise CorpusError(f"{name}: a saved dataset of several splits ({splits}); name one of them: {name}/SPLIT")
    if {"dataset_info.json", "state.json"} <= inside:
        return DataFiles(name=name, files=(), left_out=(), dataset=True)
    if _is_local(filesystem):
        return _several(filesystem, files_below(root), name, kind="folder")
    paths = sorted(cast("list[str]", filesystem.find(root)))
    depth = len(PurePosixPath(root).parts)
    visible = [each for each in paths if not any(part[0] in "._" for part in PurePosixPath(each).parts[depth:])]
    return _several(filesystem, visible, name, kind="folder")


def _several(filesystem: "AbstractFileSystem", paths: list[str], name: str, *, kind: str) -> DataFiles:
    files, left_out = [], []
    for path in paths:
        file = _data_file(filesystem, path, _full_name(filesystem, path))
        if file is None:
            left_out.append(PurePosixPath(path).name)
        else:
            files.append(file)
    if not files:
        raise CorpusError(f"{name}: the {kind} holds no file that can be read; expected endings {EXPECTED_NAMES}")
    formats = {file.format: PurePosixPath(file.path).name for file in files}
    if len(formats) > 1:
        mixed = "; ".join(f"{file} ({form})" for form, file in sorted(formats.items()))
        raise CorpusError(
            f"{name}: the {kind} mixes formats: {mixed}; select the files of one with a pattern such as *.jsonl"
        )
    return DataFiles(name=name, files=tuple(files), left_out=tuple(left_out), dataset=False)


def _full_name(filesystem: "AbstractFileSystem", path: str) -> str:
    return path if _is_local(filesystem) else without_credentials(filesystem.unstrip_protocol(path))


def _is_local(filesystem: "AbstractFileSystem") -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def _data_file(filesystem: "AbstractFileSystem", path: str, name: str) -> DataFile | None:
    """The file, or None if its name ends in no known format."""
    base = PurePosixPath(_SHARD_NUMBER.sub("", path.split("?")[0] if "://" in name else path))
    compression = _COMPRESSIONS.get(base.suffix.lower())
    uncompressed = base.with_suffix("") if compression else base
    ending = uncompressed.suffix.lower()
    form = _FORMATS.get(ending)
    if form is None or (form in _UNCOMPRESSED and compression):
        return None
    return DataFile(
        filesystem=filesystem, path=path, name=name, stem=uncompressed.stem, format=form, compression=compression,
        array=ending == ".json", state=file_state(path) if _is_local(filesystem) else None,
    )  # fmt: skip


@contextlib.contextmanager
def open_raw(file: DataFile) -> Iterator[io.BufferedReader]:
    """Open the file's bytes as stored, without decompression.

    Raises:
        CorpusError: The file cannot be opened, is a pipe, a socket or a device, or has changed
            since it was found.
    """
    _check_unchanged(file)
    try:
        stream: io.BufferedReader = io.BufferedReader(cast("Any", file.filesystem.open(file.path, "rb")), BLOCK_BYTES)
    except Exception as error:
        raise _unreadable(file.name, error) from error
    with stream:
        try:
            yield stream
        except CorpusError:
            _check_unchanged(file)  # a record may be broken because it is just being written
            raise
    _check_unchanged(file)


def _check_unchanged(file: DataFile) -> None:
    if file.state is None:
        return
    check_not_special(file.path)
    found = file_state(file.path)
    if found is not None and found != file.state:
        sizes = f"{found.size} bytes" if found.size != file.state.size else "modified or replaced"
        raise CorpusError(
            f"{file.name}: changed while it was read ({sizes}, at first {file.state.size} bytes); expected the same "
            "content throughout; run again when nothing writes it"
        )


def content_digest(file: DataFile) -> str:
    """BLAKE2b-128 of the file's bytes as stored."""
    with open_raw(file) as stream:
        try:
            return digest_of_stream(stream)
        except Exception as error:
            raise _unreadable(file.name, error) from error


def digested(raw: io.BufferedReader, digest: hashlib.blake2b) -> io.BufferedReader:
    """The same bytes, which are added to the digest as they are read."""
    return io.BufferedReader(_DigestedStream(raw, digest), BLOCK_BYTES)


def read_to_end(raw: io.BufferedReader, file: DataFile) -> None:
    """Read the rest of an open file.

    Raises:
        CorpusError: It cannot be read.
    """
    try:
        while raw.read(BLOCK_BYTES):
            pass
    except Exception as error:
        raise _unreadable(file.name, error) from error


def raw_lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    """The decompressed lines that are not blank, without line ends, each with its number from 1.

    Raises:
        CorpusError: The file cannot be read or decompressed, ends early, changes meanwhile, or has
            a line longer than `LONGEST_LINE`.
    """
    with open_raw(file) as raw:
        yield from lines_of(raw, file)


def lines_of(raw: io.BufferedReader, file: DataFile) -> Iterator[tuple[int, bytes]]:
    """The lines of an open file, as `raw_lines` returns them."""
    return filled_lines(decompressed(raw, file), file)


def filled_lines(stream: Decompressed, file: DataFile) -> Iterator[tuple[int, bytes]]:
    """The lines of a decompressed file that are not blank, without line ends, each with its number from 1."""
    for number, line in whole_lines(stream, file):
        if line.strip():
            yield number, line.rstrip(b"\r\n")


def whole_lines(stream: Decompressed, file: DataFile) -> Iterator[tuple[int, bytes]]:
    """Every line of a decompressed file with its line end and its number from 1.

    Raises:
        CorpusError: The file cannot be decompressed, or has a line longer than `LONGEST_LINE`.
    """
    number = 0
    while True:
        try:
            line = stream.readline(LONGEST_LINE + 1)
        except Exception as error:
            raise unreadable(file, error, after=f"line {number}" if number else "") from error
        if not line:
            return
        number += 1
        if len(line) > LONGEST_LINE:
            raise CorpusError(
                f"{file.name}:{number}: the line is longer than {LONGEST_LINE >> 20} MiB; "
                "expected one record per line; is the file binary or without line ends?"
            )
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def decoded(line: bytes, location: str) -> str:
    """The line as text.

    Raises:
        CorpusError: It is not UTF-8, or holds a NUL byte, as binary files do.
    """
    if (position := line.find(b"\0")) >= 0:
        raise CorpusError(f"{location}: byte {position} is NUL; expected UTF-8 text; is the file binary or in UTF-16?")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} is 0x{line[error.start]:02x}, which is not UTF-8"
        raise CorpusError(f"{location}: {byte}; expected UTF-8 text; convert the file") from None


def decompressed(raw: io.BufferedReader, file: DataFile) -> Decompressed:
    """An open file's bytes, decompressed as they are read."""
    if file.compression == "gzip":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if file.compression == "zstd":
        return io.BufferedReader(_ZstdStream(raw), BLOCK_BYTES)
    if file.compression == "xz":
        return lzma.LZMAFile(raw)
    return raw


class _DigestedStream(io.RawIOBase):
    """A stream whose bytes are added to a digest as they are read."""

    def __init__(self, raw: io.BufferedReader, digest: hashlib.blake2b) -> None:
        self._raw = raw
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._raw.readinto(buffer)
        self._digest.update(memoryview(buffer)[:count])
        return count


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or more zstd frames; unlike zstandard's reader, raises if the end
    is missing.
    """

    def __init__(self, raw: io.BufferedReader) -> None:
        import zstandard

        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._decompressed = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._decompressed:
            if not self._advance():
                return 0
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count

    def _advance(self) -> bool:
        """Decompress the next block; return False at the end of the file."""
        block = self._raw.read(_ZSTD_BLOCK_BYTES)
        if not block:
            if self._frame is not None:
                raise EOFError
            return False
        parts = []
        while block:
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            parts.append(self._frame.decompress(block))
            block = b""
            if self._frame.eof:
                block, self._frame = self._frame.unused_data, None
        self._decompressed = memoryview(b"".join(parts))
        return True


def unreadable(file: DataFile, error: Exception, *, after: str) -> CorpusError:
    """The error for a file that cannot be read or decompressed behind a line or record."""
    return _unreadable(file.name if not after else f"{file.name}: after {after}", error)


def _unreadable(location: str, error: Exception) -> CorpusError:
    """The error for a file that cannot be read."""
    reason = one_line(error) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return CorpusError(f"{location}: no such file; check the path")
    if isinstance(error, PermissionError):
        return CorpusError(f"{location}: permission denied; expected a file that this user can read")
    if isinstance(error, EOFError):
        return CorpusError(f"{location}: the compressed data ends early; expected a whole file; {_REPLACE}")
    if isinstance(error, (gzip.BadGzipFile, zlib.error)):
        return CorpusError(f"{location}: damaged gzip data ({reason}); expected a whole gzip file; {_REPLACE}")
    if isinstance(error, lzma.LZMAError):
        return CorpusError(f"{location}: damaged xz data ({reason}); expected a whole xz file; {_REPLACE}")
    if type(error).__module__.startswith("zstandard"):
        return CorpusError(f"{location}: damaged zstd data ({reason}); expected a whole zstd file; {_REPLACE}")
    return CorpusError(f"{location}: cannot be read ({reason}); expected a readable file; check it")
