"""Fields of an indexed corpus's records (source, date, licence ...), held by column, to show and to group by."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from trackstar.corpus import Corpus, open_corpus
from trackstar.errors import CorpusError, OptionError
from trackstar.progress import Progress
from trackstar.store import Index

_MOST_FIELDS = 30
_MOST_CHARACTERS = 64 << 20


class _Column:
    """One field: every record's value as a number, and each value once."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.values: list[str] = [""]
        self._code_of: dict[str, int] = {"": 0}
        self.characters = 0

    def add(self, records: int, value: str) -> None:
        """Record number `records` has this value; those before it that were not given have none."""
        self.codes.extend([0] * (records - len(self.codes)))
        code = self._code_of.get(value)
        if code is None:
            code = self._code_of[value] = len(self.values)
            self.values.append(value)
            self.characters += len(value)
        self.codes.append(code)


class Metadata:
    """The fields of every record of a corpus beside text and name; made by `read`.

    Args:
        columns: Each field's values: a number a record, and what the numbers stand for.
    """

    def __init__(self, columns: Mapping[str, tuple[np.ndarray, list[str]]]) -> None:
        self._columns = columns

    @classmethod
    def read(cls, index: Index, corpora: Sequence[Corpus]) -> "Metadata":
        """Read the corpora that an index was made of.

        A field whose different values come to more than 64 MiB is left out.

        Raises:
            CorpusError: A corpus is not what was indexed, or cannot be read.
        """
        columns = {name: _Column() for name in metadata_fields(corpora)}
        records = 0
        with Progress("Reading the corpus's fields", unit="records", shown=False) as bar:
            for corpus, entry in zip(corpora, index.manifest.corpora, strict=True):
                if corpus.digest() != entry.digest:
                    raise CorpusError(
                        f"{corpus.name}: has changed since {index.path} was made of it, expected the same bytes; give "
                        "the corpus that was indexed (--data)"
                    )
                records = entry.first_record
                for fields in corpus.metadata():
                    for name in [name for name in columns if name in fields]:
                        columns[name].add(records, fields[name])
                        if columns[name].characters > _MOST_CHARACTERS:
                            del columns[name]
                    records += 1
                    bar.advance(1)
        for column in columns.values():
            column.codes.extend([0] * (records - len(column.codes)))
        return cls({name: (np.array(column.codes, dtype=np.int32), column.values) for name, column in columns.items()})

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields' names."""
        return tuple(self._columns)

    def of_record(self, record: int) -> dict[str, str]:
        """A record's fields; those that it lacks are left out."""
        found = {name: values[codes[record]] for name, (codes, values) in self._columns.items()}
        return {name: value for name, value in found.items() if value}

    def shares(self, field: str) -> dict[str, float]:
        """Each value's share of the corpus's records.

        Raises:
            KeyError: There is no such field.
        """
        codes, values = self._columns[field]
        return {values[code]: count / len(codes) for code, count in Counter(codes.tolist()).items()}


def metadata_fields(corpora: Sequence[Corpus]) -> list[str]:
    """The fields of all corpora, each once, as many as are read."""
    names = dict.fromkeys(name for corpus in corpora for name in corpus.metadata_fields)
    return list(names)[:_MOST_FIELDS]


def corpora_of_index(index: Index, data: str | None) -> list[Corpus]:
    """The corpora that an index says it was made of, or that lies elsewhere now; not yet compared with it.

    Raises:
        CorpusError: One is not there.
        OptionError: One is given for an index of several.
    """
    entries = index.manifest.corpora
    if data is not None and len(entries) > 1:
        raise OptionError(f"--data {data}: {index.path} was made of {len(entries)} corpora, expected one; leave it out")
    return [
        open_corpus(data or entry.source, text_field=entry.text_field, id_field=entry.id_field, limit=entry.limit)
        for entry in entries
    ]
