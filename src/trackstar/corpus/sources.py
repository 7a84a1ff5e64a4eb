"""Sources of a corpus's records: files of lines, arrays or separated values, and objects in memory.

A source yields its records in order, from any record on, and digests its content. What the fields
mean, limits and fallback names are left to its users. `tables.py` has the sources with columns.
"""
# ruff: noqa: D102 - a method is documented once, where it is abstract.

import abc
import itertools
import json
import pickle
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast, final

from trackstar.corpus.data_files import (
    DataFile,
    DataFiles,
    content_digest,
    digested,
    open_raw,
    read_to_end,
)
from trackstar.corpus.digests import digest_of_bytes, running_digest
from trackstar.corpus.entries import Entry, count_of, entries_of
from trackstar.corpus.reading import Columns
from trackstar.corpus.record_reader import Record
from trackstar.corpus.records import Example
from trackstar.errors import CorpusError
from trackstar.text import one_line

ROWS_AT_ONCE = 1024
ALL = Columns((), (), everything=True)
_LINES = {"jsonl": "JSON lines", "text": "text lines", "csv": "CSV", "tsv": "TSV"}

Visit = Callable[[Record], None]
"""Callback that receives a record."""

Encode = Callable[[Record], bytes]
"""A record's name and content as bytes, for a digest."""


class Source(abc.ABC):
    """Records in order.

    Attributes:
        name: Its name in messages and manifests.
        kind: Description of its format, for people to read.
        in_memory: Whether the records were passed as objects, so that `name` cannot be opened again.
    """

    name: str
    kind: str
    in_memory: bool = False

    @abc.abstractmethod
    def field_names(self) -> tuple[str, ...]:
        """The first record's fields; empty if records are bare text.

        Raises:
            CorpusError: There is no record, or the first cannot be read.
        """

    @abc.abstractmethod
    def records(self, start: int, columns: Columns) -> Iterator[Record]:
        """The records from number `start` on; earlier ones are skipped unchecked.

        Args:
            start: Number of the first record.
            columns: The fields to read, where a format stores them apart.

        Raises:
            CorpusError: A record cannot be read; the message names it.
        """

    @abc.abstractmethod
    def count(self) -> int | None:
        """Number of records, which are not checked; None if only reading them all would tell.

        Raises:
            CorpusError: A file cannot be read.
        """

    @abc.abstractmethod
    def content_digest(self, columns: Columns, *, stems: bool, encode: Encode) -> str:
        """BLAKE2b-128 of the content that `records` reads: of files' bytes, or of encoded records.

        Args:
            columns: The fields to read.
            stems: Whether examples are named after files.
            encode: Encodes records.
        """

    @abc.abstractmethod
    def visit(self, columns: Columns, limit: int | None, visit: Visit, *, stems: bool, encode: Encode) -> str:
        """Pass the first `limit` records to a callback, and return `content_digest`.

        All but tables in files are read once for both. These are read a second time, the columns
        that are used.

        Raises:
            CorpusError: A record cannot be read; the message names it.
        """


class RecordSource(Source):
    """A source whose digest is that of its records."""

    def content_digest(self, columns: Columns, *, stems: bool, encode: Encode) -> str:
        del stems
        return _records_digest(self.records(0, columns), encode)

    def visit(self, columns: Columns, limit: int | None, visit: Visit, *, stems: bool, encode: Encode) -> str:
        del stems
        return _records_digest(_visited(self.records(0, columns), limit, visit), encode)


class FileSource(Source):
    """Files of JSON lines, JSON arrays, separated values or bare text."""

    def __init__(self, data_files: DataFiles) -> None:
        self.name = data_files.name
        self._files = data_files.files
        self.kind = f"{_LINES[data_files.files[0].format]}, {files_description(data_files)}"

    def field_names(self) -> tuple[str, ...]:
        for file in self._files:
            for _, value in _entries(file):
                return tuple(map(str, value)) if isinstance(value, Mapping) else ()
        raise CorpusError(f"{self.name}: holds no record; expected at least one line that is not blank")

    def records(self, start: int, columns: Columns) -> Iterator[Record]:
        del columns
        record = -1
        for file in self._files:
            for location, value in _entries(file, skip=start - record - 1):
                record += 1
                if record >= start:
                    yield Record(record, file.stem, value, location)

    def count(self) -> int:
        count = 0
        for file in self._files:
            with open_raw(file) as raw:
                count += count_of(raw, file)
        return count

    def content_digest(self, columns: Columns, *, stems: bool, encode: Encode) -> str:
        del columns, encode
        return files_digest(self._files, stems=stems)

    def visit(self, columns: Columns, limit: int | None, visit: Visit, *, stems: bool, encode: Encode) -> str:
        del columns, encode
        record, digests = 0, []
        for file in self._files:
            digest = running_digest()
            with open_raw(file) as raw:
                stream = digested(raw, digest)
                if limit is None or record < limit:
                    entries = entries_of(stream, file)
                    for location, value in itertools.islice(entries, None if limit is None else limit - record):
                        visit(Record(record, file.stem, value, location))
                        record += 1
                read_to_end(stream, file)
            digests.append(digest.hexdigest())
        return joined_digest(self._files, digests, stems=stems)


def _entries(file: DataFile, *, skip: int = 0) -> Iterator[Entry]:
    with open_raw(file) as raw:
        yield from entries_of(raw, file, skip=skip)


class SequenceSource(RecordSource):
    """Strings, mappings or examples in memory."""

    in_memory = True

    def __init__(self, items: Sequence[object]) -> None:
        self.name = "in memory"
        self.kind = "sequence"
        self._items = items

    def field_names(self) -> tuple[str, ...]:
        if not len(self._items):
            raise CorpusError("the sequence of examples is empty; expected at least one")
        first = self._items[0]
        return tuple(map(str, first)) if isinstance(first, Mapping) else ()

    def records(self, start: int, columns: Columns) -> Iterator[Record]:
        del columns
        for number in range(start, len(self._items)):
            yield Record(number, "example", self._items[number], f"record {number}")

    def count(self) -> int:
        return len(self._items)


class IterableSource(RecordSource):
    """Records from an iterator that begins anew each time, such as a streamed dataset's.

    Args:
        begin: Returns an iterator over all records, the same ones each time.
        name: Its name in messages and manifests.
        kind: Description of its format.
        length: Number of records; None if it is not known.
        in_memory: Whether `name` cannot be opened again.
        limit: Most records to ask the iterators for, which may have no end; None for all.
    """

    def __init__(
        self,
        begin: Callable[[], Iterator[object]],
        *,
        name: str,
        kind: str,
        length: int | None,
        in_memory: bool,
        limit: int | None = None,
    ) -> None:
        self.name = name
        self.kind = kind
        self.in_memory = in_memory
        self._begin = begin
        self._limit = limit
        self._length = length if length is None or limit is None else min(length, limit)
        self._content: str | None = None

    def field_names(self) -> tuple[str, ...]:
        first = next(self.records(0, ALL), None)
        if first is None:
            raise CorpusError(f"{self.name}: holds no record; expected at least one")
        return tuple(map(str, first.value)) if isinstance(first.value, Mapping) else ()

    def records(self, start: int, columns: Columns) -> Iterator[Record]:
        del columns
        prefix = "" if self.in_memory else f"{self.name}: "
        number = 0
        digest = running_digest()
        try:
            items = itertools.islice(iter(self._begin()), self._limit)
        except Exception as error:
            raise self._failed(number, error) from error
        while True:
            try:
                item = next(items)
            except StopIteration:
                break
            except Exception as error:
                raise self._failed(number, error) from error
            digest.update(_fingerprint(item))
            if number + 1 == self._length:
                self._check_same(digest.hexdigest())
            if number >= start:
                yield Record(number, "example", item, f"{prefix}record {number}")
            number += 1
        if self._length is None:
            self._length = number
            self._check_same(digest.hexdigest())
        elif self._length != number:
            raise CorpusError(
                f"{self.name}: gave {number} records, expected {self._length} as stated or as the first time; pass a "
                "list, or a function whose iterators give the same records each time"
            )

    def count(self) -> int | None:
        return self._length

    def _check_same(self, content: str) -> None:
        """Raise if all records are not those of the first time."""
        if self._content is None:
            self._content = content
        elif self._content != content:
            raise CorpusError(
                f"{self.name}: gave other records than the first time; pass a list, or a function whose iterators give "
                "the same records each time"
            )

    def _failed(self, number: int, error: Exception) -> CorpusError:
        if isinstance(error, CorpusError):
            return error
        return _unreadable_from(self.name, number, error)


def _unreadable_from(name: str, number: int, error: Exception) -> CorpusError:
    reason = one_line(error) or type(error).__name__
    return CorpusError(f"{name}: cannot be read from record {number} on ({type(error).__name__}: {reason})")


def _fingerprint(item: object) -> bytes:
    """A record's content as JSON, as far as JSON has it; equal for equal records."""
    try:
        return json.dumps(item, default=_as_json).encode()
    except (TypeError, ValueError, RecursionError):  # names of fields that are no text, or a record in itself
        return type(item).__name__.encode()


def _as_json(value: Any) -> object:
    if isinstance(value, Mapping):
        return dict(cast("Mapping[object, object]", value))
    if isinstance(value, Example):
        return [value.example_id, value.text, value.targets, value.metadata, value.tokens and value.tokens.token_ids]
    return value.tolist() if hasattr(value, "tolist") else type(value).__name__


@final
class Spool:
    """The items of an iterator, kept in a temporary file so that they can be read more than once.

    Args:
        items: The iterator.
        name: Its name in messages.
        limit: Most items to take; None for all.
    """

    def __init__(self, items: Iterator[object], *, name: str, limit: int | None = None) -> None:
        self._items = itertools.islice(items, limit)
        self._name = name
        self._file: Any = None

    def __call__(self) -> Iterator[object]:
        """All items from the first on.

        Raises:
            CorpusError: The iterator fails, or an item cannot be kept; the message has its number.
        """
        if self._file is None:
            file = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed with this object
            weakref.finalize(self, file.close)
            number = 0
            try:
                for item in self._items:
                    pickle.dump(item, file)
                    number += 1
            except Exception as error:
                raise _unreadable_from(self._name, number, error) from error
            self._file = file
        place, end = 0, self._file.seek(0, 2)
        while place < end:
            self._file.seek(place)
            item = pickle.load(self._file)
            place = self._file.tell()
            yield item


def files_description(data_files: DataFiles) -> str:
    """Number of files that are read, and names of those that are not."""
    count = f"{len(data_files.files)} file{'s' if len(data_files.files) > 1 else ''}"
    return count if not data_files.left_out else f"{count}; not read: {', '.join(data_files.left_out)}"


def files_digest(files: Sequence[DataFile], *, stems: bool) -> str:
    """BLAKE2b-128 over the files' digests in order, and over their stems if examples are named after them."""
    return joined_digest(files, [content_digest(file) for file in files], stems=stems)


def joined_digest(files: Sequence[DataFile], digests: Sequence[str], *, stems: bool) -> str:
    """`files_digest` of files whose digests are known."""
    parts = zip(digests, files, strict=True)
    lines = [f"{digest} {file.format} {file.stem if stems else ''}" for digest, file in parts]
    return digest_of_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))


def _records_digest(records: Iterator[Record], encode: Encode) -> str:
    """BLAKE2b-128 over every record's name and content."""
    digest = running_digest()
    for record in records:
        digest.update(encode(record))
    return digest.hexdigest()


def _visited(records: Iterator[Record], limit: int | None, visit: Visit) -> Iterator[Record]:
    """All records, of which the first `limit` are passed to a callback."""
    for record in records:
        if limit is None or record.number < limit:
            visit(record)
        yield record
