"""The files of a corpus or of queries: find them, open them, decompress them, read their lines.

Every failure becomes one line that names the file and, where there is one, the line.
"""

import dataclasses
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, cast

from trackstar.errors import CorpusError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Format = Literal["jsonl", "text", "parquet"]
Compression = Literal["gzip", "zstd"]

LONGEST_LINE = 64 * 2**20
"""Most bytes of one line: what bounds memory when a file has no line ends."""

BLOCK_BYTES = 2**20
_ZSTD_BLOCK_BYTES = 2**13  # zstd can grow 32,000-fold: a small block in keeps the block out below 256 MiB

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
EXPECTED_NAMES = ".jsonl, .ndjson, .json or .txt (plain, .gz or .zst), or .parquet"

_SHARD_NUMBER = re.compile(r"-\d+-of-\d+$")  # the public release's `trex_sentences.jsonl-00003-of-00020`
_CREDENTIALS = re.compile(r"://[^/@]*@")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One file to read.

    Attributes:
        filesystem: The fsspec file system that it is on.
        path: Its path there.
        name: Its name in messages.
        stem: Its base name without endings, from which example ids are made where records have none.
        format: What it holds.
        compression: How it is compressed, or None.
    """

    filesystem: "AbstractFileSystem" = dataclasses.field(repr=False)
    path: str
    name: str
    stem: str
    format: Format
    compression: Compression | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DataFiles:
    """What a path or URL names.

    Attributes:
        name: The path as given, without credentials.
        files: The files to read, in the order of their names.
        left_out: Files beside them whose names end in nothing that can be read.
        dataset: Whether it is a folder saved by the `datasets` library; it then has no files.
    """

    name: str
    files: tuple[DataFile, ...]
    left_out: tuple[str, ...]
    dataset: bool


def find_files(path: str) -> DataFiles:
    """Find what a path, glob or URL names: one file, a folder's files at any depth, or a saved dataset.

    Raises:
        CorpusError: Nothing is there, nothing there can be read, or a folder mixes formats.
    """
    name = without_credentials(path)
    if not path.strip():
        raise CorpusError("the path is empty; give a file, a folder or a glob")
    filesystem, root = _filesystem(path, name)
    file = _data_file(filesystem, root, name)
    try:
        # Asked first: to tell whether a web address is a folder, fsspec would load all of it.
        if file is not None and filesystem.isfile(root):
            return DataFiles(name=name, files=(file,), left_out=(), dataset=False)
        if filesystem.isdir(root):
            return _folder(filesystem, root, name)
        if not filesystem.exists(root) and any(sign in path for sign in "*?["):
            found = sorted(cast("list[str]", filesystem.glob(root)))
            return _several(filesystem, [each for each in found if not filesystem.isdir(each)], name, kind="pattern")
        if not filesystem.exists(root):
            raise CorpusError(f"{name}: no such file or folder; check the path")
    except CorpusError:
        raise
    except Exception as error:  # a remote file system raises whatever its client library does
        raise _unreadable(name, error) from error
    raise CorpusError(f"{name}: its name does not tell what it holds; expected an ending {EXPECTED_NAMES}; rename it")


def without_credentials(path: str) -> str:
    """The path or URL with `USER:PASSWORD@` removed, so that neither messages nor manifests tell them."""
    return _CREDENTIALS.sub("://", path)


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
    found = sorted(cast("list[str]", filesystem.find(root)))
    depth = len(PurePosixPath(root).parts)
    visible = [each for each in found if not any(part[0] in "._" for part in PurePosixPath(each).parts[depth:])]
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
        found = "; ".join(f"{file} ({held})" for held, file in sorted(formats.items()))
        raise CorpusError(
            f"{name}: the {kind} mixes formats: {found}; name the files of one by a pattern such as *.jsonl"
        )
    return DataFiles(name=name, files=tuple(files), left_out=tuple(left_out), dataset=False)


def _full_name(filesystem: "AbstractFileSystem", path: str) -> str:
    return path if _is_local(filesystem) else without_credentials(filesystem.unstrip_protocol(path))


def _is_local(filesystem: "AbstractFileSystem") -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def _data_file(filesystem: "AbstractFileSystem", path: str, name: str) -> DataFile | None:
    """The file, or None where its name does not tell its format."""
    base = PurePosixPath(_SHARD_NUMBER.sub("", path.split("?")[0] if "://" in name else path))
    compression = _COMPRESSIONS.get(base.suffix.lower())
    held = base.with_suffix("") if compression else base
    form = _FORMATS.get(held.suffix.lower())
    if form is None or (form == "parquet" and compression):
        return None
    return DataFile(
        filesystem=filesystem, path=path, name=name, stem=held.stem, format=form, compression=compression
    )  # fmt: skip


def open_raw(file: DataFile) -> io.BufferedReader:
    """The file's bytes as they are stored."""
    try:
        return io.BufferedReader(cast("io.RawIOBase", file.filesystem.open(file.path, "rb")), BLOCK_BYTES)
    except Exception as error:
        raise _unreadable(file.name, error) from error


def content_digest(file: DataFile) -> str:
    """BLAKE2b-128 of the file's bytes as they are stored."""
    digest = hashlib.blake2b(digest_size=16)
    with open_raw(file) as stream:
        try:
            while block := stream.read(BLOCK_BYTES):
                digest.update(block)
        except Exception as error:
            raise _unreadable(file.name, error) from error
    return digest.hexdigest()


def raw_lines(file: DataFile) -> Iterator[tuple[int, bytes]]:
    """The file's lines that are not blank, decompressed, each with its number from 1 and without its line end.

    Raises:
        CorpusError: The file cannot be read or decompressed, ends early, or has a line above `LONGEST_LINE`.
    """
    number = 0
    with open_raw(file) as raw:
        stream = _decompressed(raw, file.compression)
        while True:
            try:
                line = stream.readline(LONGEST_LINE + 1)
            except Exception as error:
                raise _unreadable(file.name, error, after_line=number) from error
            if not line:
                return
            number += 1
            if len(line) > LONGEST_LINE:
                raise CorpusError(
                    f"{file.name}:{number}: the line is longer than {LONGEST_LINE >> 20} MiB; "
                    "expected one record a line; is the file binary or without line ends?"
                )
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line.rstrip(b"\r\n")


def decoded(line: bytes, place: str) -> str:
    """The line as text.

    Raises:
        CorpusError: It is not UTF-8, or holds a NUL byte as binary files do.
    """
    if (at := line.find(b"\0")) >= 0:
        raise CorpusError(f"{place}: byte {at} is NUL; expected UTF-8 text; is the file binary or in UTF-16?")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is 0x{line[error.start]:02x}, which is not UTF-8"
        raise CorpusError(f"{place}: {found}; expected UTF-8 text; convert the file") from None


def one_line(message: object, most: int = 200) -> str:
    """An error's text on one line, shortened and without credentials."""
    text = without_credentials(" ".join(str(message).split()))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _decompressed(raw: io.BufferedReader, compression: Compression | None) -> io.BufferedIOBase:
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if compression == "zstd":
        return io.BufferedReader(_ZstdStream(raw), BLOCK_BYTES)
    return raw


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of one or more zstd frames; unlike zstandard's own reader it notices a missing end."""

    def __init__(self, raw: io.BufferedReader) -> None:
        import zstandard

        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._waiting = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._waiting:
            if not self._advance():
                return 0
        count = min(len(buffer), len(self._waiting))
        buffer[:count] = self._waiting[:count]
        self._waiting = self._waiting[count:]
        return count

    def _advance(self) -> bool:
        """Decompress one more block; false at the end of the file."""
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
        self._waiting = memoryview(b"".join(parts))
        return True


def _unreadable(name: str, error: Exception, *, after_line: int | None = None) -> CorpusError:
    """The line that tells why a file cannot be read."""
    place = name if not after_line else f"{name}: after line {after_line}"
    reason = one_line(error) or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return CorpusError(f"{place}: no such file; check the path")
    if isinstance(error, PermissionError):
        return CorpusError(f"{place}: permission denied; expected a file that this user can read")
    if isinstance(error, EOFError):
        return CorpusError(f"{place}: the compressed data end too early; expected a whole file; copy or make it again")
    if isinstance(error, (gzip.BadGzipFile, zlib.error)):
        return CorpusError(f"{place}: damaged gzip data ({reason}); expected a whole gzip file; copy or make it again")
    if type(error).__module__.startswith("zstandard"):
        return CorpusError(f"{place}: damaged zstd data ({reason}); expected a whole zstd file; copy or make it again")
    return CorpusError(f"{place}: cannot be read ({reason}); expected a readable file; check it")
