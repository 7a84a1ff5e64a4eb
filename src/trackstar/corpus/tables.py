"""Sources with columns: Parquet and Arrow files, a `datasets.Dataset`, and tables in memory."""
# ruff: noqa: D102 - a method is documented once, where it is abstract.

import abc
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast, final

from trackstar.corpus.data_files import DataFile, DataFiles, open_raw
from trackstar.corpus.reading import Columns
from trackstar.corpus.record_reader import Record
from trackstar.corpus.sources import (
    ROWS_AT_ONCE,
    Encode,
    RecordSource,
    Source,
    Visit,
    files_description,
    files_digest,
)
from trackstar.errors import CorpusError
from trackstar.text import one_line

if TYPE_CHECKING:
    import pyarrow as pa

# Arrow raises these for values and names that it cannot convert to Python objects.
_CONVERSION_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError)


def chosen(columns: Columns, names: Sequence[str], location: str) -> list[str]:
    """The columns to read, each once.

    Raises:
        CorpusError: A column is missing, or has the name of another one.
    """
    columns.check(names, location)
    wanted = list(names) if columns.everything else [*columns.required, *columns.optional]
    found = [name if name in names else name.split(".")[0] for name in wanted]
    for name in dict.fromkeys(found):
        if names.count(name) > 1:
            raise CorpusError(f"{location}: has two columns {one_line(repr(name))}; expected one")
    return [name for name in dict.fromkeys(found) if name in names]


class TableFile(abc.ABC):
    """An open file of rows with columns."""

    names: tuple[str, ...]

    @abc.abstractmethod
    def count(self) -> int:
        """Number of rows."""

    @abc.abstractmethod
    def batches(self, start: int, columns: list[str]) -> "Iterator[tuple[int, pa.RecordBatch]]":
        """Rows in batches, each with the number of its first row in the file; whole batches before row
        `start` may be left out.
        """


class TableSource(Source):
    """Parquet or Arrow files; `records` reads only the columns that are used."""

    def __init__(self, data_files: DataFiles) -> None:
        self.name = data_files.name
        self._files = data_files.files
        title = "Parquet" if data_files.files[0].format == "parquet" else "Arrow"
        self.kind = f"{title}, {files_description(data_files)}"

    def field_names(self) -> tuple[str, ...]:
        with open_raw(self._files[0]) as stream:
            return _table(stream, self._files[0]).names

    def records(self, start: int, columns: Columns) -> Iterator[Record]:
        record = 0
        for file in self._files:
            with open_raw(file) as stream:
                table = _table(stream, file)
                names = chosen(columns, table.names, file.name)
                rows = 0
                for first, batch in table.batches(start - record, names):
                    rows = first + batch.num_rows
                    skipped = min(max(start - record - first, 0), batch.num_rows)
                    for row, value in _row_values(batch.slice(skipped), columns, f"{file.name}: row", first + skipped):
                        yield Record(record + row, file.stem, value, f"{file.name}: row {row}")
                record += max(rows, table.count())

    def count(self) -> int:
        rows = 0
        for file in self._files:
            with open_raw(file) as stream:
                rows += _table(stream, file).count()
        return rows

    def content_digest(self, columns: Columns, *, stems: bool, encode: Encode) -> str:
        del columns, encode
        return files_digest(self._files, stems=stems)

    def visit(self, columns: Columns, limit: int | None, visit: Visit, *, stems: bool, encode: Encode) -> str:
        for record in itertools.islice(self.records(0, columns), limit):
            visit(record)
        return self.content_digest(columns, stems=stems, encode=encode)


def _table(stream: io.BufferedReader, file: DataFile) -> TableFile:
    return _ParquetFile(stream, file) if file.format == "parquet" else _ArrowFile(stream, file)


@final
class _ParquetFile(TableFile):
    def __init__(self, stream: io.BufferedReader, file: DataFile) -> None:
        import pyarrow.parquet as pq

        self._file = file
        try:
            self._table: pq.ParquetFile = pq.ParquetFile(stream)
        except Exception as error:
            reason = one_line(error)
            raise CorpusError(
                f"{file.name}: not a Parquet file ({reason}); expected a whole Parquet file; write it again"
            ) from error
        metadata = self._table.metadata
        groups = [metadata.row_group(group).num_rows for group in range(self._table.num_row_groups)]
        if min(groups, default=0) < 0 or sum(groups) != metadata.num_rows:
            raise CorpusError(
                f"{file.name}: its footer counts {metadata.num_rows} rows, its row groups {sum(groups)}; expected "
                "equal counts; write the file again"
            )
        self._groups = groups
        self.names = _column_names(lambda: self._table.schema_arrow, file)

    def count(self) -> int:
        return self._table.metadata.num_rows

    def batches(self, start: int, columns: list[str]) -> "Iterator[tuple[int, pa.RecordBatch]]":
        first = 0
        for group, rows in enumerate(self._groups):
            if first + rows > start:
                found = 0
                try:
                    for batch in self._table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns):
                        yield first + found, batch
                        found += batch.num_rows
                except CorpusError:
                    raise
                except Exception as error:
                    raise CorpusError(
                        f"{self._file.name}: row group {group} is damaged ({one_line(error)}); write the file again"
                    ) from error
                if found != rows:
                    raise CorpusError(
                        f"{self._file.name}: row group {group} holds {found} rows, expected {rows}; write it again"
                    )
            first += rows


@final
class _ArrowFile(TableFile):
    """An Arrow IPC file, whose footer finds its batches, or an IPC stream."""

    def __init__(self, stream: io.BufferedReader, file: DataFile) -> None:
        import pyarrow as pa
        import pyarrow.ipc as ipc

        self._file = file
        self._counted: int | None = None
        self._stream = stream
        try:
            magic = stream.read(6)
            stream.seek(0)
            self._is_file = magic == b"ARROW1"
            source = pa.PythonFile(stream, mode="r")
            self._reader: Any = ipc.open_file(source) if self._is_file else ipc.open_stream(source)
        except Exception as error:
            raise self._damaged(error) from error
        self.names = _column_names(lambda: self._reader.schema, file)

    def count(self) -> int:
        if self._counted is None:
            self._counted = sum(batch.num_rows for batch in self._all())
        return self._counted

    def batches(self, start: int, columns: list[str]) -> "Iterator[tuple[int, pa.RecordBatch]]":
        first = 0
        for batch in self._all():
            if first + batch.num_rows > start:
                part = batch.select(columns)
                for row in range(0, batch.num_rows, ROWS_AT_ONCE):
                    yield first + row, part.slice(row, ROWS_AT_ONCE)
            first += batch.num_rows
        self._counted = first

    def _all(self) -> "Iterator[pa.RecordBatch]":
        try:
            if self._is_file:
                for number in range(self._reader.num_record_batches):
                    yield self._checked(self._reader.get_batch(number))
            else:
                for batch in self._reader:
                    yield self._checked(batch)
        except CorpusError:
            raise
        except Exception as error:
            raise self._damaged(error) from error

    def _checked(self, batch: "pa.RecordBatch") -> "pa.RecordBatch":
        batch.validate()
        return batch

    def _damaged(self, error: Exception) -> CorpusError:
        return CorpusError(
            f"{self._file.name}: not a whole Arrow file or stream ({one_line(error)}); expected one; write it again"
        )


class FrameSource(RecordSource):
    """A table in memory: of pandas, polars or pyarrow."""

    in_memory = True

    def __init__(self, table: "pa.Table", *, kind: str) -> None:
        self.name = kind
        self.kind = kind
        self._table = table

    def field_names(self) -> tuple[str, ...]:
        if not self._table.num_rows:
            raise CorpusError(f"{self.name}: holds no record; expected at least one")
        return tuple(self._table.column_names)

    def records(self, start: int, columns: Columns) -> Iterator[Record]:
        names = chosen(columns, self._table.column_names, self.name)
        first = start
        for batch in self._table.select(names).slice(start).to_batches(max_chunksize=ROWS_AT_ONCE):
            for row, value in _row_values(batch, columns, f"{self.name}: record", first):
                yield Record(row, "example", value, f"{self.name}: record {row}")
            first += batch.num_rows

    def count(self) -> int:
        return self._table.num_rows


class DatasetSource(RecordSource):
    """A `datasets.Dataset`, in memory or memory-mapped from a folder."""

    def __init__(self, dataset: Any, *, name: str, stem: str, in_memory: bool) -> None:
        self.name = name
        self.kind = "datasets.Dataset"
        self.in_memory = in_memory
        self._dataset = dataset
        self._stem = stem

    def field_names(self) -> tuple[str, ...]:
        if not len(self._dataset):
            raise CorpusError(f"{self.name}: holds no record; expected at least one")
        return tuple(self._dataset.column_names)

    def records(self, start: int, columns: Columns) -> Iterator[Record]:
        names = chosen(columns, self._dataset.column_names, self.name)
        table = self._dataset.select_columns(names).with_format("arrow")
        for first in range(start, len(table), ROWS_AT_ONCE):
            try:
                rows = table[first : min(first + ROWS_AT_ONCE, len(table))]
            except Exception as error:
                raise CorpusError(f"{self.name}: cannot be read from record {first} on ({one_line(error)})") from error
            for row, value in _row_values(rows, columns, f"{self.name}: record", first):
                yield Record(row, self._stem, value, f"{self.name}: record {row}")

    def count(self) -> int:
        return len(self._dataset)


def frame_source(data: Any, kind: str) -> FrameSource:
    """A source of a pandas or polars frame, or of another object that gives Arrow data.

    Raises:
        CorpusError: It is no table.
    """
    import pyarrow as pa

    try:
        if kind == "pandas.DataFrame":
            named = any(name is not None for name in data.index.names)  # such as that of `frame.set_index("id")`
            table = pa.Table.from_pandas(data.reset_index() if named else data, preserve_index=False)
        else:
            table = data if isinstance(data, pa.Table) else pa.table(data)
    except Exception as error:
        raise CorpusError(
            f"{kind}: not read as a table ({one_line(error)}); expected a frame of plain values with named columns"
        ) from error
    return FrameSource(table, kind=kind)


def _column_names(schema: Callable[[], Any], file: DataFile) -> tuple[str, ...]:
    """The names of the columns.

    Raises:
        CorpusError: They cannot be read.
    """
    try:
        return tuple(schema().names)
    except _CONVERSION_ERRORS as error:  # a type that Arrow does not know, a name that is not UTF-8
        raise CorpusError(
            f"{file.name}: its columns cannot be read ({one_line(error)}); write the file again"
        ) from error


def _row_values(
    rows: "pa.RecordBatch | pa.Table", columns: Columns, location: str, first: int
) -> Iterator[tuple[int, dict[str, object]]]:
    """Each row as its values by column, with its number."""
    names = list(rows.schema.names)
    for name in columns.required:
        if name not in names and name.split(".")[0] not in names:  # a Parquet group (struct) without members
            raise CorpusError(f'{location} {first}: field "{name}" holds no values; expected strings')
    values = [_values(rows.column(number), location, first) for number in range(len(names))]
    for row in range(rows.num_rows):
        yield first + row, {name: column[row] for name, column in zip(names, values, strict=True)}


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
