"""Sources of a corpus's records: files, a `datasets.Dataset`, or a sequence in memory.

A source yields its records in order, from any record on, and digests its content. Limits, fallback
names and tokens are left to its users.
"""
# ruff: noqa: D102 - a method is documented once, where it is abstract.

import abc
import itertools
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from trackstar.corpus.data_files import (
    DataFile,
    DataFiles,
    content_digest,
    decoded,
    digested,
    lines_of,
    open_raw,
    raw_lines,
    read_to_end,
)
from trackstar.corpus.digests import digest_of_bytes, running_digest
from trackstar.corpus.fields import (
    Fields,
    checked_name,
    checked_text,
    json_object,
    missing_field,
    name_and_text,
    one_line_name,
)
from trackstar.corpus.records import Example
from trackstar.errors import CorpusError
from trackstar.text import one_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_AT_ONCE = 1024
# Arrow raises these for values and names that it cannot convert to Python objects.
_CONVERSION_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError)


class Record(NamedTuple):
    """One record: its number from 0, the stem of its fallback name, its name or None, its text, and
    its location for messages.
    """

    number: int
    stem: str
    identifier: str | None
    text: str
    location: str


Visit = Callable[[Record], None]
"""Callback that receives a record."""


class Source(abc.ABC):
    """Records in order.

    Attributes:
        name: Its name in messages and manifests.
        kind: Description of its format, for people to read.
    """

    name: str
    kind: str

    @abc.abstractmethod
    def field_names(self) -> tuple[str, ...]:
        """The first record's fields; empty if records are bare text.

        Raises:
            CorpusError: There is no record, or the first cannot be read.
        """

    @abc.abstractmethod
    def records(self, start: int, fields: Fields) -> Iterator[Record]:
        """The records from number `start` on; earlier ones are skipped unchecked.

        Raises:
            CorpusError: A record cannot be read; the message names it.
        """

    @abc.abstractmethod
    def whole_records(self) -> Iterator[Mapping[str, object]]:
        """Every record with all its fields, in order; empty mappings if records are bare text.

        Raises:
            CorpusError: A record cannot be read; the message names it.
        """

    @abc.abstractmethod
    def count(self) -> int:
        """Number of records, which are not checked.

        Raises:
            CorpusError: A file cannot be read.
        """

    @abc.abstractmethod
    def content_digest(self, fields: Fields) -> str:
        """BLAKE2b-128 of the content that `records` reads."""

    @abc.abstractmethod
    def visit(self, fields: Fields, limit: int | None, visit: Visit) -> str:
        """Pass the first `limit` records to a callback, and return `content_digest`.

        Lines, datasets and sequences are read once for both. Parquet files are read a second time,
        the columns of text and name only.

        Raises:
            CorpusError: A record cannot be read; the message names it.
        """


class LineSource(Source):
    """Files of lines: JSON objects, or bare text."""

    def __init__(self, data_files: DataFiles) -> None:
        self.name = data_files.name
        self._files = data_files.files
        self._json = data_files.files[0].format == "jsonl"
        self.kind = f"{'JSON lines' if self._json else 'text lines'}, {files_description(data_files)}"

    def field_names(self) -> tuple[str, ...]:
        for file in self._files:
            for number, line in raw_lines(file):
                return tuple(json_object(line, f"{file.name}:{number}")) if self._json else ()
        raise CorpusError(f"{self.name}: holds no record; expected at least one line that is not blank")

    def records(self, start: int, fields: Fields) -> Iterator[Record]:
        record = -1
        for file in self._files:
            for number, line in raw_lines(file):
                record += 1
                if record >= start:
                    yield self._record(record, file, number, line, fields)

    def _record(self, record: int, file: DataFile, number: int, line: bytes, fields: Fields) -> Record:
        location = f"{file.name}:{number}"
        if self._json:
            identifier, text = name_and_text(json_object(line, location), fields, location)
        else:
            identifier, text = None, decoded(line, location)
        return Record(record, file.stem, identifier, text, location)

    def whole_records(self) -> Iterator[Mapping[str, object]]:
        for file in self._files:
            for number, line in raw_lines(file):
                yield json_object(line, f"{file.name}:{number}") if self._json else {}

    def count(self) -> int:
        return sum(1 for file in self._files for _ in raw_lines(file))

    def content_digest(self, fields: Fields) -> str:
        return files_digest(self._files, stems=fields.identifier is None)

    def visit(self, fields: Fields, limit: int | None, visit: Visit) -> str:
        record, digests = 0, []
        for file in self._files:
            digest = running_digest()
            with open_raw(file) as raw:
                stream = digested(raw, digest)
                if limit is None or record < limit:
                    lines = lines_of(stream, file)
                    for number, line in itertools.islice(lines, None if limit is None else limit - record):
                        visit(self._record(record, file, number, line, fields))
                        record += 1
                read_to_end(stream, file)
            digests.append(digest.hexdigest())
        return joined_digest(self._files, digests, stems=fields.identifier is None)


class ParquetSource(Source):
    """Parquet files; `records` reads only the columns of the text and the name."""

    def __init__(self, data_files: DataFiles) -> None:
        self.name = data_files.name
        self.kind = f"Parquet, {files_description(data_files)}"
        self._files = data_files.files

    def field_names(self) -> tuple[str, ...]:
        with open_raw(self._files[0]) as stream:
            return _column_names(_parquet(stream, self._files[0]), self._files[0])

    def records(self, start: int, fields: Fields) -> Iterator[Record]:
        record = 0
        for file in self._files:
            with open_raw(file) as stream:
                table = _parquet(stream, file)
                columns = [name for name in fields if name is not None]
                column_names = _column_names(table, file)
                for name in columns:
                    if name not in column_names:
                        raise missing_field(name, fields, column_names, file.name)
                    if column_names.count(name) > 1:
                        raise CorpusError(f"{file.name}: has two columns {one_line(repr(name))}; expected one")
                first = record
                for group in range(table.num_row_groups):
                    rows = table.metadata.row_group(group).num_rows
                    if record + rows > start:
                        batches = _parquet_batches(table, group, columns, file)
                        yield from _rows(batches, fields, start, record, file, first)
                    record += rows

    def whole_records(self) -> Iterator[Mapping[str, object]]:
        for file in self._files:
            with open_raw(file) as stream:
                table = _parquet(stream, file)
                names = list(_column_names(table, file))
                first = 0
                for group in range(table.num_row_groups):
                    for batch in _parquet_batches(table, group, names, file):
                        columns = {
                            name: _values(batch.column(number), f"{file.name}: row", first)
                            for number, name in enumerate(batch.schema.names)
                        }
                        for row in range(batch.num_rows):
                            yield {name: values[row] for name, values in columns.items()}
                        first += batch.num_rows

    def count(self) -> int:
        rows = 0
        for file in self._files:
            with open_raw(file) as stream:
                rows += _parquet(stream, file).metadata.num_rows
        return rows

    def content_digest(self, fields: Fields) -> str:
        return files_digest(self._files, stems=fields.identifier is None)

    def visit(self, fields: Fields, limit: int | None, visit: Visit) -> str:
        for record in itertools.islice(self.records(0, fields), limit):
            visit(record)
        return self.content_digest(fields)


class DatasetSource(Source):
    """A `datasets.Dataset`, in memory or memory-mapped from a folder."""

    def __init__(self, dataset: Any, *, name: str, stem: str) -> None:
        self.name = name
        self.kind = "datasets.Dataset"
        self._dataset = dataset
        self._stem = stem

    def field_names(self) -> tuple[str, ...]:
        if not len(self._dataset):
            raise CorpusError(f"{self.name}: holds no record; expected at least one")
        return tuple(self._dataset.column_names)

    def records(self, start: int, fields: Fields) -> Iterator[Record]:
        columns = [name for name in fields if name is not None]
        for name in columns:
            if name not in self._dataset.column_names:
                raise missing_field(name, fields, self._dataset.column_names, self.name)
        table = self._dataset.select_columns(list(dict.fromkeys(columns))).with_format("arrow")
        for first in range(start, len(table), ROWS_AT_ONCE):
            try:
                rows = table[first : min(first + ROWS_AT_ONCE, len(table))]
            except Exception as error:
                raise CorpusError(f"{self.name}: cannot be read from record {first} on ({one_line(error)})") from error
            texts, identifiers = _columns(rows, fields, f"{self.name}: record", first)
            for row, (text, identifier) in enumerate(zip(texts, identifiers, strict=True), start=first):
                location = f"{self.name}: record {row}"
                name = checked_name(identifier, fields, location)
                yield Record(row, self._stem, name, checked_text(text, fields, location), location)

    def whole_records(self) -> Iterator[Mapping[str, object]]:
        try:
            yield from self._dataset
        except Exception as error:
            raise CorpusError(f"{self.name}: cannot be read ({one_line(error)}); save it again") from error

    def count(self) -> int:
        return len(self._dataset)

    def content_digest(self, fields: Fields) -> str:
        return _records_digest(self.records(0, fields))

    def visit(self, fields: Fields, limit: int | None, visit: Visit) -> str:
        return _records_digest(_visited(self.records(0, fields), limit, visit))


class SequenceSource(Source):
    """Strings, mappings or examples in memory."""

    def __init__(self, items: Sequence[object]) -> None:
        self.name = "in memory"
        self.kind = "sequence"
        self._items = items

    def field_names(self) -> tuple[str, ...]:
        if not len(self._items):
            raise CorpusError("the sequence of examples is empty; expected at least one")
        first = self._items[0]
        return tuple(map(str, first)) if isinstance(first, Mapping) else ()

    def records(self, start: int, fields: Fields) -> Iterator[Record]:
        for number in range(start, len(self._items)):
            item, location = self._items[number], f"record {number}"
            if isinstance(item, Example):
                identifier, text = (
                    one_line_name(item.example_id, f"{location}: the id"),
                    checked_text(item.text, fields, location),
                )
            elif isinstance(item, str):
                identifier, text = None, checked_text(item, fields, location)
            elif isinstance(item, Mapping):
                identifier, text = name_and_text(item, fields, location)
            else:
                kind = type(item).__name__
                raise CorpusError(f"{location}: found {kind}, expected a string, a mapping or an Example")
            yield Record(number, "example", identifier, text, location)

    def whole_records(self) -> Iterator[Mapping[str, object]]:
        for item in self._items:
            yield item if isinstance(item, Mapping) else {}

    def count(self) -> int:
        return len(self._items)

    def content_digest(self, fields: Fields) -> str:
        return _records_digest(self.records(0, fields))

    def visit(self, fields: Fields, limit: int | None, visit: Visit) -> str:
        return _records_digest(_visited(self.records(0, fields), limit, visit))


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


def _records_digest(records: Iterator[Record]) -> str:
    """BLAKE2b-128 over every record's name and text, each preceded by its length."""
    digest = running_digest()
    for record in records:
        name = b"" if record.identifier is None else record.identifier.encode()
        text = record.text.encode()
        digest.update(struct.pack("<?QQ", record.identifier is not None, len(name), len(text)))
        digest.update(name)
        digest.update(text)
    return digest.hexdigest()


def _visited(records: Iterator[Record], limit: int | None, visit: Visit) -> Iterator[Record]:
    """All records, of which the first `limit` are passed to a callback."""
    for record in records:
        if limit is None or record.number < limit:
            visit(record)
        yield record


def _parquet(stream: Any, file: DataFile) -> "pq.ParquetFile":
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(stream)
    except Exception as error:
        reason = one_line(error)
        raise CorpusError(
            f"{file.name}: not a Parquet file ({reason}); expected a whole Parquet file; write it again"
        ) from error
    groups = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    if min(groups, default=0) < 0 or sum(groups) != table.metadata.num_rows:
        raise CorpusError(
            f"{file.name}: its footer counts {table.metadata.num_rows} rows, its row groups {sum(groups)}; expected "
            "equal counts; write the file again"
        )
    return table


def _column_names(table: "pq.ParquetFile", file: DataFile) -> tuple[str, ...]:
    """The names of the columns.

    Raises:
        CorpusError: They cannot be read.
    """
    try:
        return tuple(table.schema_arrow.names)
    except _CONVERSION_ERRORS as error:  # a type that Arrow does not know, a name that is not UTF-8
        raise CorpusError(
            f"{file.name}: its columns cannot be read ({one_line(error)}); write the file again"
        ) from error


def _parquet_batches(
    table: "pq.ParquetFile", group: int, columns: list[str], file: DataFile
) -> Iterator["pa.RecordBatch"]:
    rows = 0
    try:
        for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=list(dict.fromkeys(columns))):
            rows += batch.num_rows
            yield batch
    except Exception as error:
        reason = one_line(error)
        raise CorpusError(f"{file.name}: row group {group} is damaged ({reason}); write the file again") from error
    expected = table.metadata.row_group(group).num_rows
    if rows != expected:
        raise CorpusError(
            f"{file.name}: row group {group} holds {rows} rows, expected {expected}; write the file again"
        )


def _rows(
    batches: Iterator["pa.RecordBatch"], fields: Fields, start: int, record: int, file: DataFile, first: int
) -> Iterator[Record]:
    """A row group's records from number `start` on.

    `record` is the number of the row group's first record, `first` that of the file's first record.
    """
    for batch in batches:
        skipped = min(max(start - record, 0), batch.num_rows)
        record += skipped
        texts, identifiers = _columns(batch.slice(skipped), fields, f"{file.name}: row", record - first)
        for text, identifier in zip(texts, identifiers, strict=True):
            location = f"{file.name}: row {record - first}"
            name = checked_name(identifier, fields, location)
            yield Record(record, file.stem, name, checked_text(text, fields, location), location)
            record += 1


def _columns(
    rows: "pa.RecordBatch | pa.Table", fields: Fields, location: str, first: int
) -> tuple[list[object], list[object]]:
    """The text and the name of each row as Python objects; names are None if records have none."""
    for name in fields:
        if name is not None and name not in rows.schema.names:  # a Parquet group (struct) without members
            raise CorpusError(f'{location} {first}: field "{name}" holds no values; expected strings')
    texts = _values(rows.column(fields.text), location, first)
    if fields.identifier is None:
        return texts, [None] * len(texts)
    return texts, _values(rows.column(fields.identifier), location, first)


def _values(column: Any, location: str, first: int) -> list[object]:
    """A column's values as Python objects.

    Raises:
        CorpusError: A value cannot be converted: text that is not UTF-8, a date out of range, a
            date of an unknown time zone.
    """
    try:
        return cast("list[object]", column.to_pylist())
    except _CONVERSION_ERRORS as error:
        for row in range(len(column)):
            _check_value(column, row, f"{location} {row + first}")
        raise CorpusError(
            f"{location} {first} or a later one: cannot be read ({one_line(error)}); write the file again"
        ) from None


def _check_value(column: Any, row: int, location: str) -> None:
    try:
        column[row].as_py()
    except UnicodeDecodeError as error:
        raise CorpusError(f"{location}: byte {error.start} is not UTF-8; expected UTF-8 text") from None
    except _CONVERSION_ERRORS as error:
        raise CorpusError(f"{location}: cannot be read ({one_line(error)}); write it as text") from None
