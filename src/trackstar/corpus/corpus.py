"""A corpus: training examples in record order, read from files or memory, with a content digest."""

import dataclasses
import heapq
import itertools
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trackstar.choices import DUPLICATE_IDS, JOINS, DuplicateIds, Join, RecordFormat, TrainOn
from trackstar.corpus.chat import ChatTemplate, read_template
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
from trackstar.corpus.fields import MISSING, value_at
from trackstar.corpus.origins import source_of
from trackstar.corpus.packing import Packing
from trackstar.corpus.reading import (
    DIVIDED_FIELD,
    ID_FIELDS,
    Reading,
    checked_format,
    checked_train_on,
    field_of_text,
    metadata_fields,
)
from trackstar.corpus.record_reader import ReadRecord, Record, RecordReader
from trackstar.corpus.records import Example
from trackstar.corpus.sources import ALL, Source
from trackstar.corpus.tokenization import leading_token
from trackstar.errors import CorpusError, OptionError, check_at_least, check_choice
from trackstar.progress import Progress

_LONGEST_VALUE = 200
# Records between two updates of a bar.
_RECORDS_PER_STEP = 500


def open_corpus(
    data: object,
    *,
    text_field: str = "text",
    id_field: str | None = None,
    limit: int | None = None,
    duplicate_ids: DuplicateIds = "refuse",
    format: RecordFormat | None = None,
    train_on: TrainOn | None = None,
    join: Join = "auto",
    chat_template: str | os.PathLike[str] | None = None,
    metadata: str | Sequence[str] = "all",
    tokenizer: Any = None,
) -> "Corpus":
    """Open a corpus and check its first record; nothing else is read yet.

    Args:
        data: A path, glob or URL of files: JSON lines (.jsonl, .ndjson, .json), a JSON array
            (.json), separated values with a header (.csv, .tsv), text with one example per line
            (.txt), all plain, .gz, .zst or .xz; Parquet (.parquet) or Arrow (.arrow, .feather). Or
            a folder of such files, a folder saved by `datasets`, or `hf:NAME[:CONFIG[:SPLIT]]` for
            a dataset of the hub, which is streamed. Or a dataset of `datasets`, a frame of pandas
            or polars, a sequence or iterator of strings, mappings or `Example`s, or a function that
            returns such an iterator.
        text_field: Field or column that holds the text, the messages or the token ids; text lines
            and strings have none. `doc.text` is the field `text` of the object `doc`.
        id_field: Field or column that names an example. None is the first of `ID_FIELDS` that the
            first record has; if it has none of them, examples are named `STEM:RECORD` after the
            file and the record's number.
        limit: Most records to read; None reads all.
        duplicate_ids: What `Corpus.survey`, and so every index, does with a second record of a
            name: `refuse` raises, `number` names it `NAME~2`.
        format: Form of the records: `text`; `prompt-completion` (fields prompt and completion);
            `messages` (messages with role and content, or ShareGPT's conversations); `instruction`
            (instruction, input and output); `tokens` (input_ids with labels or loss_mask). None
            finds it by the first record's fields.
        train_on: Which tokens are targets: `all`; `completion`, for conversations the last answer;
            `assistant`, every answer; `labels`. None is what training of that form counts:
            the completion, every answer, the labels, or all of a text.
        join: What is put between prompt and completion: see `trackstar.corpus.joining.joined`.
        chat_template: File with the chat template of the training run; None is the tokenizer's own.
        metadata: Fields that are kept with an index: `all` that are not read otherwise, `none`, or
            their names.
        tokenizer: The model's tokenizer, whose chat template renders conversations; an index
            passes its model's.

    Returns:
        The corpus. Reading it holds one record, or a block of 1,024 rows, in memory at a time.

    Raises:
        CorpusError: The data does not exist, holds no record, or its first record cannot be read.
        OptionError: `limit` is below 1 or not below 2^63, a choice is unknown or does not fit the
            format, or `id_field` is given for bare text.
        ModelError: The tokenizer has no chat template, and a conversation needs one.
    """
    check_at_least("limit", limit)
    check_choice("duplicate_ids", duplicate_ids, DUPLICATE_IDS)
    check_choice("join", join, JOINS)
    kept = metadata_fields(metadata)
    source = source_of(data, limit)
    field_names = source.field_names()
    if id_field is not None and not field_names:
        raise OptionError(
            f"`id_field`: expected none, as {source.name} holds bare text, which has no fields, found {id_field}; "
            "leave it out"
        )
    if id_field is None:
        id_field = next((name for name in ID_FIELDS if name in field_names), None)
    form = checked_format(format, field_names, text_field)
    if form == "prompt-completion" and _prompt_is_conversation(source):
        form, text_field = "messages", DIVIDED_FIELD
        train_on = train_on or "completion"
    reading = Reading(
        text_field=field_of_text(form, field_names, text_field, source.name),
        id_field=id_field,
        limit=limit,
        format=form,
        train_on=checked_train_on(train_on, form),
        join=join,
        chat_template=None if chat_template is None else "",
        metadata=kept,
    )
    if chat_template is not None and not reading.may_be_conversations:
        raise OptionError(
            f"`chat_template`: expected none for records of the format {form}, which is no conversation; leave it out, "
            "or choose another `format`"
        )
    template = None if chat_template is None else read_template(chat_template)
    corpus = Corpus(source=source, reading=reading, duplicate_ids=duplicate_ids, template=template)
    if tokenizer is not None:
        corpus = corpus.for_tokenizer(tokenizer)
    if corpus.check_first() is None:
        raise CorpusError(f"{source.name}: holds no record; expected at least one")
    return corpus


def _prompt_is_conversation(source: Source) -> bool:
    """Whether the first record's prompt is an array of messages, which the completion continues."""
    first = next(source.records(0, Reading(format="prompt-completion").columns), None)
    return (
        first is not None
        and isinstance(first.value, Mapping)
        and isinstance(first.value.get(DIVIDED_FIELD), (list, tuple))
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Training examples in record order, as opened by `open_corpus`.

    Attributes:
        source: Origin of the records.
        reading: How records are read.
        duplicate_ids: What is done with a second record of a name.
        template: Text of a chat template; None for the tokenizer's own.
        chat: The chat template with a tokenizer's special tokens; None until a tokenizer is known.
        packing: Packs the examples into rows of equal length; None leaves them as they are.
        leading: The token that the tokenizer puts before every text; empty for none, or until a
            tokenizer is known.
        first_position: Number that positions in names (`STEM:POSITION`) begin with; above 0 if the
            corpus is added to an index.
        taken: Names that the index has to which the corpus is added; None if there is none.
    """

    source: Source
    reading: Reading
    duplicate_ids: DuplicateIds = "refuse"
    template: str | None = None
    chat: ChatTemplate | None = None
    packing: Packing | None = None
    leading: str = ""
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
        return self.source.in_memory

    @property
    def needs_tokenizer(self) -> bool:
        """Whether records are conversations, which a tokenizer's chat template makes texts of."""
        return self.reading.format == "messages" or self.reading.chat_template is not None

    def for_tokenizer(self, tokenizer: Any, *, pack: int | None = None) -> "Corpus":
        """This corpus as a model reads it: conversations are rendered, unless they already are.

        Args:
            tokenizer: The model's tokenizer.
            pack: Tokens of a row that the examples are packed into; None leaves them as they are.

        Raises:
            ModelError: The tokenizer has no chat template, and none was given; or no end-of-text
                token.
            OptionError: `pack` is below 2.
        """
        corpus = dataclasses.replace(self, leading=leading_token(tokenizer))
        if self.needs_tokenizer and self.chat is None:
            chat = ChatTemplate.of(tokenizer, self.template)
            reading = dataclasses.replace(self.reading, chat_template=chat.digest)
            corpus = dataclasses.replace(corpus, chat=chat, reading=reading)
        if pack is not None:
            corpus = dataclasses.replace(corpus, packing=Packing(pack, tokenizer))
        return corpus

    def read_as(self, reading: Reading) -> "Corpus":
        """The same records read in another way, to compare contents."""
        return dataclasses.replace(self, reading=reading, chat=None)

    def check_first(self) -> ReadRecord | None:
        """The first record, checked; None if there is none.

        Raises:
            CorpusError: It cannot be read.
        """
        reader = self._reader
        for record in self.source.records(0, self.reading.columns):
            first = reader.read(record)
            if first.content.chat is None or self.chat is not None:
                reader.example(first, "first")
            return first
        return None

    @property
    def description(self) -> dict[str, str]:
        """Source, format, form of the records, text_field, id_field and limit, for people to read."""
        reading = self.reading
        return {
            "source": self.source.name,
            "format": self.source.kind,
            "records": f"{reading.format}, targets: {reading.train_on}",
            "text_field": reading.text_field,
            "id_field": reading.id_field or "none: named after file and record",
            "limit": "none" if reading.limit is None else str(reading.limit),
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
        if self.packing is not None:
            # A row's place among the tokens is known only after all rows before it.
            rows = self.packing.rows(self._documents(0), first_row=self.first_position)
            return itertools.islice(rows, start, None)
        return self._documents(start)

    def _documents(self, start: int) -> Iterator[Example]:
        """The examples before they are packed."""
        limit = self.reading.limit
        if limit is not None and start >= limit:
            return
        reader = self._reader
        records = self.source.records(start, self.reading.columns)
        numbers = self.survey().numbers if self.duplicate_ids == "number" else {}
        for record in itertools.islice(records, None if limit is None else limit - start):
            read = reader.read(record)
            name = self._name(read)
            if record.number in numbers:
                name = numbered(name, numbers[record.number])
            yield reader.example(read, name)

    def _name(self, record: ReadRecord) -> str:
        if record.identifier is not None:
            return record.identifier
        return f"{record.stem}:{self.first_position + record.number}"

    @property
    def metadata_fields(self) -> tuple[str, ...]:
        """The first record's fields that are read neither as text, targets nor name, such as source,
        date and licence.
        """
        used = self.reading.used
        return tuple(name for name in self.source.field_names() if name not in used)

    def metadata(self) -> Iterator[dict[str, str]]:
        """Each record's other fields, as short text, in record order.

        Lists and objects become JSON, values are cut after 200 characters, null fields are left
        out, and half of a surrogate pair becomes U+FFFD.

        Raises:
            CorpusError: A record cannot be read; the message names file and line, or row.
        """
        reader = RecordReader(dataclasses.replace(self.reading, metadata=None), None)
        for record in itertools.islice(self.source.records(0, ALL), self.reading.limit):
            fields = reader.other_fields(record.value) if isinstance(record.value, Mapping) else {}
            yield {
                _whole_characters(str(name)): short_text(value) for name, value in fields.items() if value is not None
            }

    def count(self) -> int | None:
        """Number of examples; None if it is not known beforehand, as of packed ones.

        Counts lines without parsing them, or reads the count from the format. An iterator without a
        length is surveyed.

        Raises:
            CorpusError: A file cannot be read.
        """
        if self.packing is not None:
            return None
        records = self.source.count()
        if records is None:
            return self.survey().records
        return records if self.reading.limit is None else min(records, self.reading.limit)

    def sample(self, count: int, seed: int, *, progress: bool = False) -> list[Example]:
        """`count` examples drawn uniformly without replacement in one pass, in record order.

        Each record has a pseudorandom priority, a function of the seed and its number alone, and
        the lowest priorities are drawn. So the same seed draws the same examples, and a larger
        sample contains a smaller one. A corpus of at most `count` records is returned whole.

        Args:
            count: Number of examples.
            seed: Seed of the priorities.
            progress: Whether progress is shown.

        Raises:
            CorpusError: A record cannot be read.
            OptionError: `count` is below 1.
        """
        check_at_least("count", count)
        total = self._surveyed[0].records if self._surveyed and self.packing is None else None
        with Progress("Drawing a sample", unit="records", total=total, shown=progress) as bar:
            examples = _counted(self.examples(), bar.advance)
            drawn = heapq.nsmallest(count, examples, key=lambda example: _priority(seed, example.record))
        return sorted(drawn, key=lambda example: example.record)

    def digest(self) -> str:
        """BLAKE2b-128 of the content, of how it is read, and of `duplicate_ids`; reads everything
        once.

        For files it covers their bytes as stored: the same records in another format or compression
        have another digest. For a `datasets.Dataset`, saved or not, and for other objects it covers
        names, contents and metadata. Folder and file names matter only if examples are named after them.

        Raises:
            CorpusError: A file or record cannot be read.
        """
        return self._digest_with(self._content_digest(), self.duplicate_ids)

    def _content_digest(self) -> str:
        reading = self.reading
        return self.source.content_digest(reading.columns, stems=reading.id_field is None, encode=self._encoded)

    def _encoded(self, record: Record) -> bytes:
        """A record's name, content and metadata for a digest, each preceded by its length."""
        read = self._reader.read(record)
        name = b"" if read.identifier is None else read.identifier.encode()
        content = read.content.key.encode("utf-8", "surrogatepass")
        metadata = read.metadata.encode("utf-8", "surrogatepass")
        begin = struct.pack("<?QQ", read.identifier is not None, len(name), len(content))
        return begin + name + content + (struct.pack("<Q", len(metadata)) + metadata if metadata else b"")

    def choice_of_digest(self, digest: str) -> DuplicateIds | None:
        """The `duplicate_ids` with which this corpus has a digest; None if it has it with neither.

        The content is read on the first call only.

        Raises:
            CorpusError: A file or record cannot be read.
        """
        if not self._contents:
            self._contents.append(self._content_digest())
        content = self._contents[0]
        return next((choice for choice in DUPLICATE_IDS if self._digest_with(content, choice) == digest), None)

    def survey(self, *, progress: bool = False) -> Survey:
        """Check every record, compare their names, and digest the content, in one pass; the result
        is cached.

        Memory is 16 bytes per record, and more only for names that are repeated.

        Args:
            progress: Whether progress is shown.

        Raises:
            CorpusError: A record cannot be read; or, if duplicates are refused, two records have
                the same name, one has the name of another's window (`a#1` beside `a`), or one has a
                name that the index has to which the corpus is added. The message names both places.
        """
        if not self._surveyed:
            names, texts = NameCollector(), HashCollector()
            reader = self._reader
            records = blank = metadata = spelled_out = 0
            absent = dict.fromkeys(self.reading.metadata or ())

            def visit(record: Record) -> None:
                nonlocal records, blank, metadata, spelled_out
                records += 1
                if records % _RECORDS_PER_STEP == 0:
                    bar.advance(_RECORDS_PER_STEP)
                read = reader.read(record)
                names.add(self._name(read))
                metadata += len(read.metadata.encode("utf-8", "surrogatepass"))
                if absent and isinstance(record.value, Mapping):
                    for field in [name for name in absent if value_at(record.value, name) is not MISSING]:
                        del absent[field]
                key = read.content.key
                if key and not key.isspace():
                    texts.add(key)
                elif key and read.content.tokens is None:
                    blank += 1
                if self.leading and read.content.special_tokens and read.content.text.startswith(self.leading):
                    spelled_out += 1
                if self.chat is not None and read.content.chat is not None:
                    reader.example(read, "checked")

            reading = self.reading
            with Progress("Reading the corpus", unit="records", shown=progress) as bar:
                content = self.source.visit(
                    reading.columns, reading.limit, visit, stems=reading.id_field is None, encode=self._encoded
                )
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
                metadata_bytes=metadata,
                spelled_out=spelled_out,
                leading=self.leading,
                absent=tuple(absent),
                numbers=check.numbers() if self.duplicate_ids == "number" else {},
            )
            self._surveyed.append(survey)
        return self._surveyed[0]

    def _named(self) -> Iterator[Named]:
        reader = self._reader
        for record in itertools.islice(self.source.records(0, self.reading.columns), self.reading.limit):
            yield Named(name=self._name(reader.read(record)), record=record.number, location=record.location)

    def _digest_with(self, content: str, duplicate_ids: DuplicateIds) -> str:
        reading = self.reading
        choices: dict[str, Any] = {
            "content": content,
            "id_field": reading.id_field,
            "limit": reading.limit,
            "text_field": reading.text_field,
        }
        # The digest of a text is that of indexes made before there were other formats and choices.
        if duplicate_ids != "refuse":
            choices["duplicate_ids"] = duplicate_ids
        if reading.format != "text":
            choices |= {
                "format": reading.format,
                "train_on": reading.train_on,
                "join": reading.join,
                "chat_template": reading.chat_template,
            }
        return digest_of_json(choices, sort_keys=True)

    @property
    def _reader(self) -> RecordReader:
        return RecordReader(self.reading, self.chat)


def short_text(value: object) -> str:
    """A value as text of at most 200 characters: JSON for lists and objects."""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False, default=str)
        except (ValueError, TypeError, RecursionError):  # keys of other types, or too many levels or digits
            value = f"a {type(value).__name__} that cannot be shown"
    return _whole_characters(value[:_LONGEST_VALUE])


def _whole_characters(text: str) -> str:
    """The text with U+FFFD in place of each half of a surrogate pair."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _counted(examples: Iterator[Example], advance: Callable[[int], None]) -> Iterator[Example]:
    """The examples, counted as they pass."""
    for number, example in enumerate(examples, start=1):
        if number % _RECORDS_PER_STEP == 0:
            advance(_RECORDS_PER_STEP)
        yield example


def _priority(seed: int, record: int) -> bytes:
    """A keyed hash of the record's number, as a pseudorandom sort key."""
    return draw_bytes(struct.pack("<q", record), key=f"trackstar sample {seed}")
