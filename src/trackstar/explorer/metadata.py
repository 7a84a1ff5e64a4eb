"""Fields of an indexed corpus's records (source, date, licence ...), by column, to show and to group by."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from trackstar.corpus import Corpus, open_corpus
from trackstar.corpus.corpus import short_text
from trackstar.errors import CorpusError, OptionError
from trackstar.progress import Progress
from trackstar.store import Index
from trackstar.store.locations import opened_source

_MOST_FIELDS = 30
_FIRST_EXAMPLES = 64
_MOST_CHARACTERS = 64 << 20


class _Column:
    """One field: a code per record, and the value that each code stands for."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.values: list[str] = [""]
        self._code_of: dict[str, int] = {"": 0}
        self.characters = 0

    def add(self, records: int, value: str) -> None:
        """Set the value of record number `records`; earlier records without a value get the empty one."""
        self.codes.extend([0] * (records - len(self.codes)))
        code = self._code_of.get(value)
        if code is None:
            code = self._code_of[value] = len(self.values)
            self.values.append(value)
            self.characters += len(value)
        self.codes.append(code)


class Metadata:
    """The fields of every record of a corpus except text and name; made by `read`.

    Args:
        columns: Per field, one code per record and the value of each code.
    """

    def __init__(self, columns: Mapping[str, tuple[np.ndarray, list[str]]]) -> None:
        self._columns = columns

    @classmethod
    def read(cls, index: Index, corpora: Sequence[Corpus]) -> "Metadata":
        """The fields that an index keeps, or else those of the corpora that it was built from.

        A field whose distinct values exceed 64 Mi characters is left out.

        Raises:
            CorpusError: A corpus differs from the indexed one, or cannot be read.
        """
        columns = {name: _Column() for name in metadata_fields(index, corpora)}
        records = 0
        if keeps_metadata(index):
            for stored in index.examples():
                record = stored.example.record
                if record < records:  # a further window of a record
                    continue
                for name in [name for name in columns if name in stored.metadata]:
                    _add(columns, name, record, stored.metadata[name])
                records = record + 1
            return cls._of(columns, records)
        with Progress("Reading corpus fields", unit="records", shown=False) as bar:
            for corpus, entry in zip(corpora, index.manifest.corpora, strict=True):
                if corpus.choice_of_digest(entry.digest) is None:
                    raise CorpusError(
                        f"{corpus.name}: has changed since {index.path} was built from it, expected the same bytes; "
                        "pass the corpus that was indexed as `data`"
                    )
                records = entry.first_record
                for fields in corpus.metadata():
                    for name in [name for name in columns if name in fields]:
                        _add(columns, name, records, fields[name])
                    records += 1
                    bar.advance(1)
        return cls._of(columns, records)

    @classmethod
    def _of(cls, columns: "dict[str, _Column]", records: int) -> "Metadata":
        for column in columns.values():
            column.codes.extend([0] * (records - len(column.codes)))
        return cls({name: (np.array(column.codes, dtype=np.int32), column.values) for name, column in columns.items()})

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields."""
        return tuple(self._columns)

    def of_record(self, record: int) -> dict[str, str]:
        """A record's fields that are not empty."""
        values_by_name = {name: values[codes[record]] for name, (codes, values) in self._columns.items()}
        return {name: value for name, value in values_by_name.items() if value}

    def shares(self, field: str) -> dict[str, float]:
        """Each value's share of the corpus's records.

        Raises:
            KeyError: There is no such field.
        """
        codes, values = self._columns[field]
        return {values[code]: count / len(codes) for code, count in Counter(codes.tolist()).items()}


def _add(columns: dict[str, _Column], name: str, record: int, value: object) -> None:
    """Add a value to a column; a column whose values are too long is dropped."""
    if value is None:
        return
    columns[name].add(record, short_text(value))
    if columns[name].characters > _MOST_CHARACTERS:
        del columns[name]


def keeps_metadata(index: Index) -> bool:
    """Whether the index keeps its records' fields, so that the corpora need not be there."""
    return all(entry.metadata != () for entry in index.manifest.corpora)


def metadata_fields(index: Index, corpora: Sequence[Corpus]) -> list[str]:
    """Names of the fields of the first examples, or of the corpora's first records, each once; at most
    as many as are read.
    """
    if keeps_metadata(index):
        first = itertools.islice(index.examples(), _FIRST_EXAMPLES)
        names = dict.fromkeys(name for stored in first for name in stored.metadata)
    else:
        names = dict.fromkeys(name for corpus in corpora for name in corpus.metadata_fields)
    return list(names)[:_MOST_FIELDS]


def corpora_of_index(index: Index, data: str | None) -> list[Corpus]:
    """Open the corpora that an index was built from; `data` is the path of a single corpus that has
    moved.

    Whether they are still the indexed ones is not checked.

    Raises:
        CorpusError: A corpus does not exist.
        OptionError: `data` is given, but the index has several corpora.
    """
    entries = index.manifest.corpora
    if data is not None and len(entries) > 1:
        raise OptionError(f"`data`: {index.path} was built from {len(entries)} corpora, found one path; leave it out")
    return [
        open_corpus(data or opened_source(entry.source, entry.location, index.path), **entry.options).read_as(
            entry.reading
        )
        for entry in entries
    ]
