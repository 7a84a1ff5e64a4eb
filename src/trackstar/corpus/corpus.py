"""A corpus: training examples in order, read from wherever they lie, with a digest of what they were."""

import dataclasses
import hashlib
import heapq
import itertools
import json
import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import cast

from trackstar.corpus.data_files import find_files, one_line
from trackstar.corpus.records import Example
from trackstar.corpus.sources import DatasetSource, Fields, LineSource, ParquetSource, SequenceSource, Source
from trackstar.errors import CorpusError, OptionError

_LONGEST_VALUE = 200

ID_FIELDS = ("example_id", "sentence_id", "id")
"""Fields that name an example, tried in this order where none is given."""


def open_corpus(
    data: object, *, text_field: str = "text", id_field: str | None = None, limit: int | None = None
) -> "Corpus":
    """Open a corpus and check its first record; nothing else is read yet.

    Args:
        data: A path, glob or URL of files (JSON lines: .jsonl, .ndjson, .json; text, one example a line: .txt; either
            plain, .gz or .zst; .parquet), of a folder of such files, or of a folder saved by `datasets`; or a
            `datasets.Dataset`; or a sequence of strings, mappings or `Example`s.
        text_field: The field or column that holds the text; text lines and strings have none.
        id_field: The field or column that names an example; None is the first of `ID_FIELDS` that the first record
            has, and where it has none, examples are named `STEM:RECORD` after their file and place.
        limit: Most records to read; None reads all.

    Returns:
        The corpus. Reading it holds one record (or block of 1,024 rows) in memory at a time.

    Raises:
        CorpusError: Nothing is there, it holds nothing, or its first record cannot be read.
        OptionError: `limit` is below 1, or `id_field` is given for bare text.
    """
    if limit is not None and limit < 1:
        raise OptionError(f"--limit {limit}: expected at least 1")
    source = _source(data)
    found = source.field_names()
    if id_field is not None and not found:
        raise OptionError(f"--id-field {id_field}: {source.name} holds bare text, which has no fields; leave it out")
    if id_field is None:
        id_field = next((name for name in ID_FIELDS if name in found), None)
    corpus = Corpus(source=source, text_field=text_field, id_field=id_field, limit=limit)
    if next(corpus.examples(), None) is None:
        raise CorpusError(f"{source.name}: holds no record; expected at least one")
    return corpus


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Training examples in the order of their records; made by `open_corpus`.

    Attributes:
        source: Where the records come from.
        text_field: The field that holds the text.
        id_field: The field that names an example; None where names are made from file and place.
        limit: Most records that are read; None for all.
    """

    source: Source
    text_field: str
    id_field: str | None
    limit: int | None

    @property
    def name(self) -> str:
        """The path or URL as given, without credentials; `in memory` for a sequence."""
        return self.source.name

    @property
    def description(self) -> dict[str, str]:
        """What is read and how, for people: source, format, text_field, id_field, limit."""
        return {
            "source": self.source.name,
            "format": self.source.kind,
            "text_field": self.text_field,
            "id_field": self.id_field or "none: named after file and record",
            "limit": "none" if self.limit is None else str(self.limit),
        }

    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples from record `start` on; the records before it are skipped unread where the format allows it.

        Raises:
            CorpusError: A record cannot be read; the message names file and line, or row.
            OptionError: `start` is negative.
        """
        if start < 0:
            raise OptionError(f"start is {start}; expected a record number, 0 or more")
        return self._examples(start)

    def _examples(self, start: int) -> Iterator[Example]:
        if self.limit is not None and start >= self.limit:
            return
        records = self.source.records(start, self._fields)
        for record in itertools.islice(records, None if self.limit is None else self.limit - start):
            name = record.identifier if record.identifier is not None else f"{record.stem}:{record.number}"
            yield Example(example_id=name, text=record.text, record=record.number)

    @property
    def metadata_fields(self) -> tuple[str, ...]:
        """The first record's fields beside its text and name: source, date, licence and the like."""
        return tuple(name for name in self.source.field_names() if name not in (self.text_field, self.id_field))

    def metadata(self) -> Iterator[dict[str, str]]:
        """Each record's fields beside its text and name, as short text, in the records' order.

        Lists and objects are given as JSON, and what is longer than 200 characters is cut; fields that are null are
        left out.

        Raises:
            CorpusError: A record cannot be read; the message names file and line, or row.
        """
        for record in itertools.islice(self.source.whole_records(), self.limit):
            yield {
                str(name): _shown(value)
                for name, value in record.items()
                if value is not None and name not in (self.text_field, self.id_field)
            }

    def count(self) -> int:
        """How many examples there are, at the cost of reading them without their fields, or less.

        Raises:
            CorpusError: A file cannot be read.
        """
        records = self.source.count()
        return records if self.limit is None else min(records, self.limit)

    def sample(self, count: int, seed: int) -> list[Example]:
        """`count` examples drawn uniformly without replacement in one pass, in the order of their records.

        Every record has a priority made from the seed and its number alone, and the lowest are kept: the same seed
        draws the same examples, and a larger sample holds a smaller one. All examples where there are no more.

        Raises:
            CorpusError: A record cannot be read.
            OptionError: `count` is below 1.
        """
        if count < 1:
            raise OptionError(f"the sample's size is {count}; expected at least 1")
        kept = heapq.nsmallest(count, self.examples(), key=lambda example: _priority(seed, example.record))
        return sorted(kept, key=lambda example: example.record)

    def digest(self) -> str:
        """BLAKE2b-128 of the content and of what is read from it; reads everything once.

        For files it covers their bytes as stored, so that the same records in another format or compression have
        another digest; for a `datasets.Dataset`, saved or not, and a sequence it covers names and texts. Folder and
        file names do not matter unless examples are named after them.

        Raises:
            CorpusError: Something cannot be read.
        """
        choices = {
            "content": self.source.content_digest(self._fields),
            "id_field": self.id_field,
            "limit": self.limit,
            "text_field": self.text_field,
        }
        return hashlib.blake2b(json.dumps(choices, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def _fields(self) -> Fields:
        return Fields(text=self.text_field, identifier=self.id_field)


def _shown(value: object) -> str:
    return (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))[:_LONGEST_VALUE]


def _priority(seed: int, record: int) -> bytes:
    """A number as good as random, of the seed and the record's number alone."""
    return hashlib.blake2b(struct.pack("<q", record), digest_size=16, key=f"trackstar sample {seed}".encode()).digest()


def _source(data: object) -> Source:
    if isinstance(data, (str, os.PathLike)):
        return _path_source(os.fspath(data))
    # A dataset can be handed over only by who has imported the library, so it is not imported here for others.
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        if isinstance(data, datasets.Dataset):
            return DatasetSource(data, name="datasets.Dataset", stem="example")
        if isinstance(data, datasets.DatasetDict):
            splits = ", ".join(map(str, cast("Mapping[str, object]", data)))
            raise CorpusError(f"a DatasetDict of several splits ({splits}); expected one of them: dataset[SPLIT]")
    if isinstance(data, Sequence) and not isinstance(data, (bytes, bytearray, memoryview)):
        return SequenceSource(data)
    raise CorpusError(
        f"a corpus of type {type(data).__name__}; expected a path, a datasets.Dataset, or a list of texts, mappings or "
        "Examples (turn an iterator into a list)"
    )


def _path_source(path: str | bytes) -> Source:
    place = find_files(os.fsdecode(path))
    if not place.dataset:
        return ParquetSource(place) if place.files[0].format == "parquet" else LineSource(place)
    import datasets

    try:
        dataset = datasets.load_from_disk(os.fsdecode(path))
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise CorpusError(f"{place.name}: a saved dataset that cannot be opened ({reason}); save it again") from error
    return DatasetSource(dataset, name=place.name, stem=PurePosixPath(os.fsdecode(path)).name)
