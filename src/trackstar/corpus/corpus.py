"""A corpus: training examples in record order, read from files or memory, with a content digest."""

import dataclasses
import heapq
import itertools
import json
import os
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

from trackstar.choices import DUPLICATE_IDS, DuplicateIds
from trackstar.corpus.data_files import find_files
from trackstar.corpus.digests import digest_of_json, draw_bytes
from trackstar.corpus.duplicates import (
    DuplicateCheck,
    HashCollector,
    NameCollector,
    Named,
    Survey,
    TakenNames,
    numbered,
)
from trackstar.corpus.local_files import check_no_special_inside
from trackstar.corpus.records import Example
from trackstar.corpus.sources import (
    DatasetSource,
    Fields,
    LineSource,
    ParquetSource,
    Record,
    SequenceSource,
    Source,
)
from trackstar.errors import CorpusError, OptionError, check_at_least, check_choice
from trackstar.text import one_line

_LONGEST_VALUE = 200
_DATASET_NAME = "datasets.Dataset"

ID_FIELDS = ("example_id", "sentence_id", "id")
"""Fields that name an example, tried in this order if `id_field` is None."""


def open_corpus(
    data: object,
    *,
    text_field: str = "text",
    id_field: str | None = None,
    limit: int | None = None,
    duplicate_ids: DuplicateIds = "refuse",
) -> "Corpus":
    """Open a corpus and check its first record; nothing else is read yet.

    Args:
        data: A path, glob or URL of files: JSON lines (.jsonl, .ndjson, .json), text with one
            example per line (.txt), either plain, .gz or .zst; or Parquet (.parquet). Or a folder
            of such files, a folder saved by `datasets`, a `datasets.Dataset`, or a sequence of
            strings, mappings or `Example`s.
        text_field: Field or column that holds the text; text lines and strings have none.
        id_field: Field or column that names an example. None is the first of `ID_FIELDS` that the
            first record has; if it has none of them, examples are named `STEM:RECORD` after the
            file and the record's number.
        limit: Most records to read; None reads all.
        duplicate_ids: What `Corpus.survey`, and so every index, does with a second record of a
            name: `refuse` raises, `number` names it `NAME~2`.

    Returns:
        The corpus. Reading it holds one record, or a block of 1,024 rows, in memory at a time.

    Raises:
        CorpusError: The data does not exist, holds no record, or its first record cannot be read.
        OptionError: `limit` is below 1 or not below 2^63, `duplicate_ids` is unknown, or `id_field`
            is given for bare text.
    """
    check_at_least("limit", limit)
    check_choice("duplicate_ids", duplicate_ids, DUPLICATE_IDS)
    source = _source(data)
    field_names = source.field_names()
    if id_field is not None and not field_names:
        raise OptionError(
            f"`id_field`: expected none, as {source.name} holds bare text, which has no fields, found {id_field}; "
            "leave it out"
        )
    if id_field is None:
        id_field = next((name for name in ID_FIELDS if name in field_names), None)
    corpus = Corpus(source=source, text_field=text_field, id_field=id_field, limit=limit, duplicate_ids=duplicate_ids)
    if next(corpus.examples(), None) is None:
        raise CorpusError(f"{source.name}: holds no record; expected at least one")
    return corpus


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Training examples in record order, as opened by `open_corpus`.

    Attributes:
        source: Origin of the records.
        text_field: Field that holds the text.
        id_field: Field that names an example; None if names come from the file and record number.
        limit: Most records to read; None for all.
        duplicate_ids: What is done with a second record of a name.
        first_position: Number that positions in names (`STEM:POSITION`) begin with; above 0 if the
            corpus is added to an index.
        taken: Names that the index has to which the corpus is added; None if there is none.
    """

    source: Source
    text_field: str
    id_field: str | None
    limit: int | None
    duplicate_ids: DuplicateIds = "refuse"
    first_position: int = 0
    taken: TakenNames | None = None
    _contents: list[str] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)
    _surveyed: list[Survey] = dataclasses.field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The path or URL as given, without credentials; `in memory` for a sequence."""
        return self.source.name

    @property
    def in_memory(self) -> bool:
        """Whether the records were passed as objects, so that `name` cannot be opened again."""
        return isinstance(self.source, SequenceSource) or self.name == _DATASET_NAME

    @property
    def description(self) -> dict[str, str]:
        """Source, format, text_field, id_field and limit, for people to read."""
        return {
            "source": self.source.name,
            "format": self.source.kind,
            "text_field": self.text_field,
            "id_field": self.id_field or "none: named after file and record",
            "limit": "none" if self.limit is None else str(self.limit),
        }

    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples from record `start` on. Earlier records are skipped unread if the format
        allows it.

        Raises:
            CorpusError: A record cannot be read; the message names file and line, or row.
            OptionError: `start` is negative.
        """
        check_at_least("start", start, 0)
        return self._examples(start)

    def _examples(self, start: int) -> Iterator[Example]:
        if self.limit is not None and start >= self.limit:
            return
        records = self.source.records(start, self._fields)
        numbers = self.survey().numbers if self.duplicate_ids == "number" else {}
        for record in itertools.islice(records, None if self.limit is None else self.limit - start):
            name = self._name(record)
            if record.number in numbers:
                name = numbered(name, numbers[record.number])
            yield Example(example_id=name, text=record.text, record=record.number)

    def _name(self, record: Record) -> str:
        if record.identifier is not None:
            return record.identifier
        return f"{record.stem}:{self.first_position + record.number}"

    @property
    def metadata_fields(self) -> tuple[str, ...]:
        """The first record's fields other than its text and name, such as source, date and licence."""
        return tuple(name for name in self.source.field_names() if name not in (self.text_field, self.id_field))

    def metadata(self) -> Iterator[dict[str, str]]:
        """Each record's fields other than its text and name, as short text, in record order.

        Lists and objects become JSON, values are cut after 200 characters, null fields are left
        out, and half of a surrogate pair becomes U+FFFD.

        Raises:
            CorpusError: A record cannot be read; the message names file and line, or row.
        """
        for record in itertools.islice(self.source.whole_records(), self.limit):
            yield {
                _whole_characters(str(name)): _short_text(value)
                for name, value in record.items()
                if value is not None and name not in (self.text_field, self.id_field)
            }

    def count(self) -> int:
        """Number of examples. Counts lines without parsing them, or reads the count from the
        format.

        Raises:
            CorpusError: A file cannot be read.
        """
        records = self.source.count()
        return records if self.limit is None else min(records, self.limit)

    def sample(self, count: int, seed: int) -> list[Example]:
        """`count` examples drawn uniformly without replacement in one pass, in record order.

        Each record has a pseudorandom priority, a function of the seed and its number alone, and
        the lowest priorities are drawn. So the same seed draws the same examples, and a larger
        sample contains a smaller one. A corpus of at most `count` records is returned whole.

        Raises:
            CorpusError: A record cannot be read.
            OptionError: `count` is below 1.
        """
        check_at_least("count", count)
        drawn = heapq.nsmallest(count, self.examples(), key=lambda example: _priority(seed, example.record))
        return sorted(drawn, key=lambda example: example.record)

    def digest(self) -> str:
        """BLAKE2b-128 of the content, the field names, the limit and `duplicate_ids`; reads
        everything once.

        For files it covers their bytes as stored: the same records in another format or compression
        have another digest. For a `datasets.Dataset`, saved or not, and for a sequence it covers
        names and texts. Folder and file names matter only if examples are named after them.

        Raises:
            CorpusError: A file or record cannot be read.
        """
        return self._digest_with(self.source.content_digest(self._fields), self.duplicate_ids)

    def choice_of_digest(self, digest: str) -> DuplicateIds | None:
        """The `duplicate_ids` with which this corpus has a digest; None if it has it with neither.

        The content is read on the first call only.

        Raises:
            CorpusError: A file or record cannot be read.
        """
        if not self._contents:
            self._contents.append(self.source.content_digest(self._fields))
        content = self._contents[0]
        return next((choice for choice in DUPLICATE_IDS if self._digest_with(content, choice) == digest), None)

    def survey(self) -> Survey:
        """Check every record, compare their names, and digest the content, in one pass; the result
        is cached.

        Memory is 16 bytes per record, and more only for names that are repeated.

        Raises:
            CorpusError: A record cannot be read; or, if duplicates are refused, two records have
                the same name, one has the name of another's window (`a#1` beside `a`), or one has a
                name that the index has to which the corpus is added. The message names both places.
        """
        if not self._surveyed:
            names, texts = NameCollector(), HashCollector()
            records = blank = 0

            def visit(record: Record) -> None:
                nonlocal records, blank
                records += 1
                names.add(self._name(record))
                if record.text and not record.text.isspace():
                    texts.add(record.text)
                elif record.text:
                    blank += 1

            content = self.source.visit(self._fields, self.limit, visit)
            self._contents[:] = [content]
            if self.taken is not None:
                self.taken.check_content()
            check = DuplicateCheck(names.hashes(), self.taken, self._named)
            if self.duplicate_ids == "refuse":
                check.refuse()
            survey = Survey(
                digest=self._digest_with(content, self.duplicate_ids),
                records=records,
                blank_texts=blank,
                repeated_texts=texts.repeated(),
                numbers=check.numbers() if self.duplicate_ids == "number" else {},
            )
            self._surveyed.append(survey)
        return self._surveyed[0]

    def _named(self) -> Iterator[Named]:
        for record in itertools.islice(self.source.records(0, self._fields), self.limit):
            yield Named(name=self._name(record), record=record.number, location=record.location)

    def _digest_with(self, content: str, duplicate_ids: DuplicateIds) -> str:
        choices: dict[str, Any] = {
            "content": content,
            "id_field": self.id_field,
            "limit": self.limit,
            "text_field": self.text_field,
        }
        if duplicate_ids != "refuse":  # the digest of the default is that of indexes made before there was a choice
            choices["duplicate_ids"] = duplicate_ids
        return digest_of_json(choices, sort_keys=True)

    @property
    def _fields(self) -> Fields:
        return Fields(text=self.text_field, identifier=self.id_field)


def _short_text(value: object) -> str:
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False, default=str)
        except (ValueError, TypeError, RecursionError):  # keys of other types, or too many levels or digits
            value = f"a {type(value).__name__} that cannot be shown"
    return _whole_characters(value[:_LONGEST_VALUE])


def _whole_characters(text: str) -> str:
    """The text with U+FFFD in place of each half of a surrogate pair."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _priority(seed: int, record: int) -> bytes:
    """A keyed hash of the record's number, as a pseudorandom sort key."""
    return draw_bytes(struct.pack("<q", record), key=f"trackstar sample {seed}")


def _source(data: object) -> Source:
    if isinstance(data, (str, os.PathLike)):
        return _path_source(os.fspath(data))
    # Only a caller who has imported `datasets` can pass a dataset, so it is not imported here.
    datasets = sys.modules.get("datasets")
    if datasets is not None:
        if isinstance(data, datasets.Dataset):
            return DatasetSource(data, name=_DATASET_NAME, stem="example")
        if isinstance(data, datasets.DatasetDict):
            splits = ", ".join(map(str, cast("Mapping[str, object]", data)))
            raise CorpusError(f"a DatasetDict of several splits ({splits}); expected one of them: dataset[SPLIT]")
    if isinstance(data, Sequence) and not isinstance(data, (bytes, bytearray, memoryview)):
        return SequenceSource(data)
    raise CorpusError(
        f"a corpus of type {type(data).__name__}; expected a path, a datasets.Dataset, or a list of texts, mappings or "
        "Examples (pass an iterator as a list)"
    )


def _path_source(path: str | bytes) -> Source:
    data_files = find_files(os.fsdecode(path))
    name = data_files.name
    if not data_files.dataset:
        return ParquetSource(data_files) if data_files.files[0].format == "parquet" else LineSource(data_files)
    import datasets

    check_no_special_inside(os.fsdecode(path))
    try:
        dataset = datasets.load_from_disk(os.fsdecode(path))
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise CorpusError(f"{name}: a saved dataset that cannot be opened ({reason}); save it again") from error
    return DatasetSource(dataset, name=name, stem=PurePosixPath(os.fsdecode(path)).name)
