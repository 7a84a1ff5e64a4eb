"""How records are read: which of their fields are the text, the targets, the name and the metadata."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from trackstar.choices import RECORD_FORMATS, TRAIN_ON, Join, RecordFormat, TrainOn
from trackstar.corpus.fields import listed
from trackstar.errors import CorpusError, OptionError, check_choice
from trackstar.text import abridged

ID_FIELDS = ("example_id", "sentence_id", "id")
"""Fields that name an example, tried in this order if `id_field` is None."""

CONVERSATION_FIELDS = ("messages", "conversations")
TOKENS_FIELD = "input_ids"
MASK_FIELDS = ("loss_mask", "completion_mask", "assistant_masks")
"""Fields of which each marks the targets of token ids with 1; a target is marked by all that are there."""
DIVIDED_FIELD = "prompt"
"""Field with the beginning of a conversation that `completion` continues."""
_REQUIRED: dict[RecordFormat, tuple[str, ...]] = {
    "text": (),
    "prompt-completion": ("prompt", "completion"),
    "messages": (),
    "instruction": ("instruction", "output"),
    "tokens": (),
}
_OPTIONAL: dict[RecordFormat, tuple[str, ...]] = {
    "text": (),
    "prompt-completion": (),
    "messages": ("tools", "system"),
    "instruction": ("input",),
    "tokens": ("labels", *MASK_FIELDS, "attention_mask"),
}
_NO_METADATA = ("token_type_ids", "position_ids", "special_tokens_mask")
"""Further fields of token ids, which describe the tokens and not the record."""

TRAIN_ON_OF: dict[RecordFormat, tuple[TrainOn, ...]] = {
    "text": ("all",),
    "prompt-completion": ("completion", "all"),
    "messages": ("assistant", "completion", "all"),
    "instruction": ("completion", "all"),
    "tokens": ("labels", "all"),
}
"""The choices of targets by format; the first is the default."""


class Columns(NamedTuple):
    """The fields that are read of each record.

    Attributes:
        required: Fields that every record has.
        optional: Fields that are read where there are some.
        everything: Whether all other fields are read, too.
        name: The field with the name.
        advice: What to do if another field is missing, for messages.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    everything: bool
    name: str | None = None
    advice: str = ""

    def missing(self, field: str, field_names: Sequence[str], location: str) -> CorpusError:
        """The error for a missing field; the message lists the fields that the record has."""
        advice = "name the one to read with `id_field`" if field == self.name else self.advice
        return CorpusError(f'{location}: no field "{field}"; found {listed(field_names)}; {advice}')

    def check(self, field_names: Sequence[str], location: str) -> None:
        """Raise if columns of these names lack a field.

        Raises:
            CorpusError: A field is missing; the message names it.
        """
        for field in self.required:
            if field not in field_names and field.split(".")[0] not in field_names:
                raise self.missing(field, field_names, location)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How records are read. A corpus that is read in another way is another corpus.

    Attributes:
        text_field: Field that holds the text, the messages or the token ids; a path such as
            `doc.text` leads into nested objects.
        id_field: Field that names an example; None if names come from the file and record number.
        limit: Most records to read; None for all.
        format: Which fields are the text that the model was trained on.
        train_on: Which tokens are targets.
        join: What is put between a prompt and its completion.
        chat_template: Digest of the chat template; None if no conversation is rendered.
        metadata: Fields that are kept as metadata; None keeps every field that is not read otherwise.
    """

    text_field: str = "text"
    id_field: str | None = None
    limit: int | None = None
    format: RecordFormat = "text"
    train_on: TrainOn = "all"
    join: Join = "auto"
    chat_template: str | None = None
    metadata: tuple[str, ...] | None = None

    @property
    def may_be_conversations(self) -> bool:
        """Whether a chat template can render the records."""
        return self.format in ("messages", "instruction")

    @property
    def is_divided(self) -> bool:
        """Whether the messages of a conversation are divided between a prompt and a completion."""
        return self.format == "messages" and self.text_field == DIVIDED_FIELD

    @property
    def columns(self) -> Columns:
        """The fields to read."""
        text = () if _REQUIRED[self.format] else (self.text_field,)
        if self.is_divided:
            text = (DIVIDED_FIELD, "completion")
        name = () if self.id_field is None else (self.id_field,)
        kept = self.metadata or ()
        required = tuple(dict.fromkeys((*text, *_REQUIRED[self.format], *name)))
        optional = tuple(dict.fromkeys((*_OPTIONAL[self.format], *kept)))
        return Columns(required, optional, self.metadata is None, self.id_field, self._advice)

    @property
    def used(self) -> tuple[str, ...]:
        """Fields that are read as text, targets or name, and so are no metadata."""
        columns = self.columns
        more = _NO_METADATA if self.format == "tokens" else ()
        return (*columns.required, *_OPTIONAL[self.format], *more)

    @property
    def _advice(self) -> str:
        """What to do if a field is missing, for messages."""
        if self.format == "text":
            return "name the one to read with `text_field`"
        needed = " and ".join(_REQUIRED[self.format] or (self.text_field,))
        return f"records of the format {self.format} have {needed}; choose another with `format`"


def found_format(field_names: Sequence[str], text_field: str) -> RecordFormat:
    """The format of records with these fields; `text` if it is none of the others."""
    names = set(field_names)
    if text_field in names or text_field != "text" or not names:
        return "text"
    if names & {*CONVERSATION_FIELDS}:
        return "messages"
    for form in ("prompt-completion", "instruction"):
        if names >= {*_REQUIRED[form]}:
            return form
    return "tokens" if TOKENS_FIELD in names else "text"


def other_form(reading: Reading, field_names: Sequence[str]) -> RecordFormat | None:
    """The form that a record read by its field `text` would have without it, as Alpaca's do."""
    if (reading.format, reading.text_field) != ("text", "text"):
        return None
    form = found_format([name for name in field_names if name != "text"], "text")
    return None if form == "text" else form


def field_of_text(form: RecordFormat, field_names: Sequence[str], text_field: str, name: str) -> str:
    """The field with the text, the messages or the token ids.

    Raises:
        CorpusError: No field of conversations is there.
    """
    if text_field != "text" or form in ("text", "prompt-completion", "instruction"):
        return text_field
    if form == "tokens":
        return TOKENS_FIELD
    found = next((field for field in CONVERSATION_FIELDS if field in field_names), None)
    if found is None:
        raise CorpusError(
            f"{name}: no field messages or conversations; found {listed(field_names)}; name the one with the messages "
            "with `text_field`"
        )
    return found


def checked_format(form: RecordFormat | None, field_names: Sequence[str], text_field: str) -> RecordFormat:
    """The format, given or found.

    Raises:
        OptionError: It is unknown.
    """
    if form is None:
        return found_format(field_names, text_field)
    check_choice("format", form, RECORD_FORMATS)
    return form


def checked_train_on(train_on: TrainOn | None, form: RecordFormat) -> TrainOn:
    """Which tokens are targets, given or by the format.

    Raises:
        OptionError: It is unknown, or records of the format do not tell these tokens.
    """
    possible = TRAIN_ON_OF[form]
    if train_on is None:
        return possible[0]
    check_choice("train_on", train_on, TRAIN_ON)
    if train_on not in possible:
        raise OptionError(
            f"`train_on`: expected {' or '.join(possible)} for records of the format {form}, found {train_on}; leave "
            "it out, or choose another `format`"
        )
    return train_on


def metadata_fields(metadata: str | Sequence[str]) -> tuple[str, ...] | None:
    """The fields to keep: `all` is None, `none` is no field; otherwise their names, or one text with commas.

    Raises:
        OptionError: There is no name.
    """
    if metadata == "all":
        return None
    if metadata == "none":
        return ()
    names = metadata.split(",") if isinstance(metadata, str) else list(metadata)
    kept = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not kept:
        raise OptionError(f"`metadata`: expected all, none, or names of fields, found {abridged(metadata)}")
    return kept
