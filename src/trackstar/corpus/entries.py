"""The records of one open file in order: JSON lines, a JSON array, separated values, or bare text."""

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import final

from trackstar.corpus.data_files import (
    BLOCK_BYTES,
    LONGEST_LINE,
    DataFile,
    Decompressed,
    decoded,
    decompressed,
    filled_lines,
    unreadable,
    whole_lines,
)
from trackstar.corpus.fields import DECODER, RepeatedFieldError, json_object, repeated_field
from trackstar.errors import CorpusError
from trackstar.text import one_line

Entry = tuple[str, "Mapping[str, object] | str | None"]
"""A record's location and its fields, or its text; None for a line that is skipped unread."""

_SEPARATORS = {"csv": ",", "tsv": "\t"}
_KINDS = {'"': "a string", "[": "an array", "t": "a boolean", "f": "a boolean", "n": "null"}
_DIGITS = frozenset("-0123456789")
# A parser stops this near to the end of what it has where a value is cut off.
_NEAR_END = 16


def entries_of(raw: io.BufferedReader, file: DataFile, *, skip: int = 0) -> Iterator[Entry]:
    """The records of an open file.

    Args:
        raw: The file's bytes as stored.
        file: The file.
        skip: Number of records at the beginning whose lines need not be parsed.

    Raises:
        CorpusError: The file cannot be decompressed, or a record cannot be read; the message names
            file and line, or record.
    """
    stream = decompressed(raw, file)
    if file.format in ("csv", "tsv"):
        yield from _rows(stream, file)
    elif file.format == "text":
        for record, (number, line) in enumerate(filled_lines(stream, file)):
            location = f"{file.name}:{number}"
            yield location, decoded(line, location) if record >= skip else None
    elif file.array and _begins_array(stream, file):
        yield from _ArrayReader(stream, file)
    else:
        for record, (number, line) in enumerate(filled_lines(stream, file)):
            location = f"{file.name}:{number}"
            yield location, json_object(line, location) if record >= skip else None


def count_of(raw: io.BufferedReader, file: DataFile) -> int:
    """The number of records of an open file; lines are not parsed.

    Raises:
        CorpusError: The file cannot be read.
    """
    stream = decompressed(raw, file)
    if file.format in ("csv", "tsv"):
        return sum(1 for _ in _rows(stream, file))
    if file.array and _begins_array(stream, file):
        return sum(1 for _ in _ArrayReader(stream, file))
    return sum(1 for _ in filled_lines(stream, file))


def _begins_array(stream: Decompressed, file: DataFile) -> bool:
    try:
        begin = stream.peek(BLOCK_BYTES)
    except Exception as error:
        raise unreadable(file, error, after="") from error
    return begin.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _rows(stream: Decompressed, file: DataFile) -> Iterator[Entry]:
    """The rows behind the header, which names the fields; all values are text."""
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_LINE))
    lines = (decoded(line, f"{file.name}:{number}") for number, line in whole_lines(stream, file))
    reader = csv.reader(lines, delimiter=_SEPARATORS[file.format], strict=True)
    names: list[str] | None = None
    while True:
        location = f"{file.name}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            reason = one_line(error)
            raise CorpusError(
                f"{location}: broken {file.format.upper()} ({reason}); expected values with quotes around those that "
                "hold quotes or line ends; write the file again"
            ) from None
        if row is None:
            return
        if not row:
            continue
        if names is None:
            names = row
            repeated = next((name for number, name in enumerate(names) if name in names[:number]), None)
            if repeated is not None:
                raise CorpusError(f"{location}: the header names {one_line(repr(repeated))} twice; expected each once")
            _check_separator(names, file, location)
            continue
        if len(row) != len(names):
            raise CorpusError(
                f"{location}: found {len(row)} values, expected {len(names)}, as many as the header has names; quote "
                "values that hold the separator"
            )
        yield location, dict(zip(names, row, strict=True))


def _check_separator(names: list[str], file: DataFile, location: str) -> None:
    """Raise if the header is one name that holds another separator.

    Raises:
        CorpusError: It is.
    """
    known = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
    expected = known.pop(_SEPARATORS[file.format])
    found = next((sign for sign in known if sign in names[0]), None)
    if len(names) == 1 and found is not None:
        way = f"write the file with {expected}"
        if known[found] == "tabs":
            way += ", or let its name end in .tsv"
        raise CorpusError(
            f"{location}: the header {one_line(repr(names[0]))} is one name, with {known[found]} in it; expected names "
            f"between {expected}; {way}"
        )


@final
class _ArrayReader:
    """The objects of a JSON array, which is read in parts and never held whole."""

    def __init__(self, stream: Decompressed, file: DataFile) -> None:
        self._stream = stream
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._place = 0
        self._ended = False
        self._number = 0

    def __iter__(self) -> Iterator[Entry]:
        self._take("[")
        if self._next() == "]":
            self._place += 1
        else:
            while True:
                yield self._location, self._object()
                self._number += 1
                if self._next() == "]":
                    self._place += 1
                    break
                self._take(",")
        if self._next():
            raise CorpusError(f"{self._file.name}: text behind the JSON array; expected one array; write it again")

    @property
    def _location(self) -> str:
        return f"{self._file.name}: record {self._number}"

    def _object(self) -> Mapping[str, object]:
        first = self._next()
        if first != "{":
            found = _KINDS.get(first) or ("a number" if first in _DIGITS else _shown(first))
            way = "write texts one per line, as .txt" if first == '"' else "write the file again"
            raise CorpusError(f"{self._location}: found {found}, expected an object; {way}")
        while True:
            try:
                value, self._place = DECODER.raw_decode(self._text, self._place)
            except RepeatedFieldError as error:
                raise repeated_field(error, self._location) from None
            except json.JSONDecodeError as error:
                reason = f"{error.msg} at character {error.pos - self._place} of the record"
                cut = error.pos > len(self._text) - _NEAR_END or error.msg.startswith("Unterminated")
                if not cut or not self._more():
                    raise CorpusError(
                        f"{self._location}: broken JSON ({reason}); expected an array of objects"
                    ) from None
            except (ValueError, RecursionError) as error:
                raise CorpusError(
                    f"{self._location}: JSON that cannot be read ({one_line(error)}); expected a plain object"
                ) from None
            else:
                return value

    def _next(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            self._skip(" \t\r\n")
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def _skip(self, characters: str) -> None:
        if not self._text:
            self._more()
        while self._place < len(self._text) and self._text[self._place] in characters:
            self._place += 1

    def _take(self, expected: str) -> None:
        found = self._next()
        if found != expected:
            shown = _shown(found)
            raise CorpusError(
                f"{self._location}: broken JSON (found {shown} where {expected!r} was expected); expected one array of "
                "objects; write the file again"
            )
        self._place += 1

    def _more(self) -> bool:
        """Read on; false at the end of the file."""
        pending = len(self._text) - self._place
        if self._ended:
            return False
        if pending > LONGEST_LINE:
            raise CorpusError(f"{self._location}: the record is longer than {LONGEST_LINE >> 20} MiB; split it")
        try:
            block = self._stream.read(max(BLOCK_BYTES, pending))
        except Exception as error:
            raise unreadable(self._file, error, after=f"record {self._number}" if self._number else "") from error
        self._ended = not block
        try:
            text = self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            byte = f"a byte 0x{error.object[error.start]:02x} is not UTF-8"
            raise CorpusError(
                f"{self._location} or a later one: {byte}; expected UTF-8 text; convert the file"
            ) from None
        self._text, self._place = self._text[self._place :] + text, 0
        return bool(text) or not self._ended


def _shown(character: str) -> str:
    return one_line(repr(character)) if character else "the end of the file"
