"""Records as examples: the text and its targets, the name, and the other fields as metadata."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np

from trackstar.choices import Join
from trackstar.corpus.chat import ChatTemplate, Conversation, Spans, conversation
from trackstar.corpus.fields import (
    MISSING,
    checked_name,
    checked_text,
    json_kind,
    one_line_name,
    value_at,
    without_paths,
)
from trackstar.corpus.joining import joined
from trackstar.corpus.reading import MASK_FIELDS, Reading
from trackstar.corpus.records import Example, TokenSequence
from trackstar.errors import CorpusError, OptionError

INSTRUCTION_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
INSTRUCTION_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""Alpaca's prompts, with and without an input."""

NO_TARGET = -100
"""The label of a position that is no target, in Transformers and PyTorch."""

_DEEPEST = 32


class Record(NamedTuple):
    """One record: its number from 0, the stem of its fallback name, its fields, bare text or `Example`, and
    its location for messages.
    """

    number: int
    stem: str
    value: Any
    location: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Content:
    """What the model was trained on, as a record states it.

    Attributes:
        text: The text; empty for a conversation and for token ids.
        targets: Ranges of characters that are targets; None for all.
        special_tokens: Whether the tokenizer adds its special tokens.
        chat: A conversation, which a chat template makes a text of.
        tokens: Token ids.
    """

    text: str = ""
    targets: Spans | None = None
    special_tokens: bool = True
    chat: Conversation | None = None
    tokens: TokenSequence | None = None

    @property
    def key(self) -> str:
        """The content as canonical text; different contents have different ones."""
        if self.chat is not None:
            return self.chat.key
        if self.tokens is not None:
            return f"{self.tokens.token_ids.tobytes().hex()} {self.tokens.target_mask.tobytes().hex()}"
        if self.targets is None and self.special_tokens:
            return self.text
        return json.dumps([self.text, self.targets, self.special_tokens])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadRecord:
    """A checked record.

    Attributes:
        number: Its number, from 0.
        stem: Stem of its fallback name.
        identifier: Its name; None if it has none.
        content: What the model was trained on.
        metadata: Its other fields as a JSON object, or nothing.
        location: Its location, for messages.
    """

    number: int
    stem: str
    identifier: str | None
    content: Content
    metadata: str
    location: str


@final
class RecordReader:
    """Reads records in one way.

    Args:
        reading: The way.
        chat: The chat template; None if there is none, or if no tokenizer is known yet.
    """

    def __init__(self, reading: Reading, chat: ChatTemplate | None) -> None:
        self._reading = reading
        self._chat = chat
        self._columns = reading.columns
        self._used = reading.used

    def read(self, record: Record) -> ReadRecord:
        """A record's name, content and metadata.

        Raises:
            CorpusError: A field is missing or malformed; the message names the location.
        """
        value, location = record.value, record.location
        identifier, metadata = None, ""
        if isinstance(value, Example):
            identifier = one_line_name(value.example_id, f"{location}: the id")
            checked_text(value.text, "text", location)
            content = Content(
                text=value.text, targets=value.targets, special_tokens=value.special_tokens, tokens=value.tokens
            )
            metadata = value.metadata
        elif isinstance(value, str):
            content = Content(text=checked_text(value, self._reading.text_field, location))
        elif isinstance(value, Mapping):
            identifier = self._name(value, location)
            content = self._content(value, location)
            metadata = "" if self._reading.metadata == () else metadata_text(self.other_fields(value))
        else:
            raise CorpusError(f"{location}: found {type(value).__name__}, expected a string, a mapping or an Example")
        return ReadRecord(
            number=record.number, stem=record.stem, identifier=identifier, content=content, metadata=metadata,
            location=location,
        )  # fmt: skip

    def example(self, record: ReadRecord, name: str) -> Example:
        """The record as an example of that name; a conversation is rendered.

        Raises:
            CorpusError: The chat template does not render the conversation.
            OptionError: There is no chat template.
        """
        content = record.content
        text, targets, special_tokens = content.text, content.targets, content.special_tokens
        if content.chat is not None:
            if self._chat is None:
                raise OptionError(
                    f"`tokenizer`: {record.location} is a conversation, which the chat template of a model's tokenizer "
                    "makes a text of; pass the model's tokenizer"
                )
            rendered = self._chat.rendered(content.chat, self._reading.train_on, record.location)
            text, targets, special_tokens = rendered.text, rendered.targets, False
        return Example(
            example_id=name, text=text, record=record.number, targets=targets, special_tokens=special_tokens,
            tokens=content.tokens, metadata=record.metadata,
        )  # fmt: skip

    def other_fields(self, record: Mapping[Any, object]) -> dict[Any, object]:
        """The fields that are kept as metadata."""
        kept = self._reading.metadata
        if kept is None:
            return without_paths(record, self._used)
        return {name: value for name in kept if (value := value_at(record, name)) is not MISSING}

    def _name(self, record: Mapping[Any, object], location: str) -> str | None:
        field = self._reading.id_field
        if field is None:
            return None
        value = value_at(record, field)
        if value is MISSING:
            # The text is looked for first, as records without either are not of this format.
            self._content(record, location)
            raise self._columns.missing(field, list(map(str, record)), location)
        return checked_name(value, field, location)

    def _content(self, record: Mapping[Any, object], location: str) -> Content:
        reading = self._reading
        if reading.format == "text":
            value = self._value(record, reading.text_field, location)
            return Content(text=checked_text(value, reading.text_field, location))
        if reading.format == "messages":
            return self._conversation(record, location)
        if reading.format == "tokens":
            return Content(tokens=self._tokens(record, location))
        if reading.format == "prompt-completion":
            prompt, completion = (self._text(record, name, location) for name in ("prompt", "completion"))
            return self._completed(prompt, completion)
        _, output = (self._text(record, name, location) for name in ("instruction", "output"))
        if reading.chat_template is not None:
            return Content(chat=conversation(instruction_messages(record, location), None, "messages", location))
        return self._completed(instruction_prompt(record, location), output)

    def _completed(self, prompt: str, completion: str) -> Content:
        join: Join = self._reading.join
        text = joined(prompt, completion, join)
        if self._reading.train_on == "all":
            return Content(text=text)
        return Content(text=text, targets=((len(prompt), len(text)),) if completion else ())

    def _conversation(self, record: Mapping[Any, object], location: str) -> Content:
        field = self._reading.text_field
        messages = self._value(record, field, location)
        if self._reading.is_divided:
            messages = whole_conversation(messages, self._value(record, "completion", location))
        chat = conversation(messages, record.get("tools"), field, location, system=record.get("system"))
        if not chat.answers and self._reading.train_on != "all":
            raise CorpusError(
                f"{location}: the conversation has no message of the assistant; expected at least one, whose tokens "
                'are the targets; leave the record out, or pass `train_on="all"`'
            )
        return Content(chat=chat)

    def _tokens(self, record: Mapping[Any, object], location: str) -> TokenSequence:
        reading = self._reading
        ids = whole_numbers(self._value(record, reading.text_field, location), reading.text_field, location)
        if len(ids) and int(ids.min()) < 0:
            at = int(np.argmin(ids))
            raise CorpusError(f"{location}: {reading.text_field}[{at}] is {ids[at]}; expected token ids, 0 or more")
        mask = np.ones(len(ids), dtype=bool)
        if reading.train_on != "all":
            mask = target_positions(record, ids, reading.text_field, location)
        given = record.get("attention_mask")
        if given is not None:
            attended = _aligned(given, "attention_mask", ids, reading.text_field, location) != 0
            ids, mask = ids[attended], mask[attended]
        mask[:1] = False
        return TokenSequence(token_ids=ids.astype(np.int32), target_mask=mask)

    def _value(self, record: Mapping[Any, object], name: str, location: str) -> object:
        value = value_at(record, name)
        if value is MISSING:
            raise self._columns.missing(name, list(map(str, record)), location)
        return value

    def _text(self, record: Mapping[Any, object], name: str, location: str) -> str:
        value = self._value(record, name, location)
        if isinstance(value, (list, tuple)):
            raise CorpusError(
                f'{location}: field "{name}" is an array; expected a string; write a conversation as one field '
                "messages that ends with the answer"
            )
        return checked_text(value, name, location)


def whole_conversation(prompt: object, completion: object) -> object:
    """The messages of a prompt, then those of the completion; a completion that is text is an answer."""
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, (list, tuple)) and isinstance(completion, (list, tuple)):
        return [*prompt, *completion]
    return completion if isinstance(prompt, (list, tuple)) else prompt


def instruction_prompt(record: Mapping[Any, object], location: str) -> str:
    """Alpaca's prompt of a record with `instruction` and, perhaps, `input`.

    Raises:
        CorpusError: A field is no text.
    """
    instruction, given = checked_text(record.get("instruction"), "instruction", location), _input(record, location)
    before, _, after = (INSTRUCTION_WITH_INPUT if given.strip() else INSTRUCTION_ALONE).partition("{instruction}")
    return before + instruction + after.replace("{input}", given, 1)


def instruction_messages(record: Mapping[Any, object], location: str) -> list[dict[str, str]]:
    """The instruction with its input as a user's message, and the output, if there is one, as the answer.

    Raises:
        CorpusError: A field is no text.
    """
    request, given = checked_text(record.get("instruction"), "instruction", location), _input(record, location)
    messages = [{"role": "user", "content": f"{request}\n\n{given}" if given.strip() else request}]
    if "output" in record:
        messages.append({"role": "assistant", "content": checked_text(record["output"], "output", location)})
    return messages


def _input(record: Mapping[Any, object], location: str) -> str:
    given = record.get("input")
    return "" if given is None else checked_text(given, "input", location)


def target_positions(record: Mapping[Any, object], ids: np.ndarray, ids_field: str, location: str) -> np.ndarray:
    """The positions that a record's labels or mask name, as flags; all if it has neither.

    Args:
        record: The record.
        ids: Its token ids.
        ids_field: The field that they are from, for messages.
        location: The record's location, for messages.

    Raises:
        CorpusError: Labels or mask do not fit the token ids.
    """
    labels = record.get("labels")
    masks = [field for field in MASK_FIELDS if record.get(field) is not None]
    if labels is not None and masks:
        raise CorpusError(f"{location}: has both labels and {masks[0]}; expected one of them; leave one out")
    if labels is None:
        return _marked_by_all(record, masks, ids, ids_field, location)
    aligned = _aligned(labels, "labels", ids, ids_field, location)
    mask = aligned != NO_TARGET
    wrong = np.flatnonzero(mask & (aligned != ids))
    if wrong.size:
        at = int(wrong[0])
        raise CorpusError(
            f"{location}: labels[{at}] is {aligned[at]}; expected {ids[at]}, the token of {ids_field} there, "
            f"or {NO_TARGET} for no target; labels are not shifted"
        )
    return mask


def _marked_by_all(
    record: Mapping[Any, object], masks: Sequence[str], ids: np.ndarray, ids_field: str, location: str
) -> np.ndarray:
    """The positions that every mask marks with 1."""
    marked = np.ones(len(ids), dtype=bool)
    for field in masks:
        mask = _aligned(record.get(field), field, ids, ids_field, location)
        wrong = np.flatnonzero((mask != 0) & (mask != 1))
        if wrong.size:
            raise CorpusError(f"{location}: {field}[{wrong[0]}] is {mask[wrong[0]]}; expected 0 or 1")
        marked &= mask == 1
    return marked


def _aligned(value: object, field: str, ids: np.ndarray, ids_field: str, location: str) -> np.ndarray:
    numbers = whole_numbers(value, field, location)
    if len(numbers) != len(ids):
        raise CorpusError(
            f"{location}: {field} has {len(numbers)} entries, {ids_field} {len(ids)}; expected one for each token"
        )
    return numbers


def whole_numbers(value: object, field: str, location: str) -> np.ndarray:
    """The whole numbers of an array, which have 32 bits.

    Raises:
        CorpusError: It is no array of such numbers.
    """
    to_list = getattr(value, "tolist", None)  # of an array or a tensor
    if to_list is not None:
        value = to_list()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise CorpusError(f'{location}: field "{field}" is {json_kind(value)}; expected an array of whole numbers')
    for number, one in enumerate(value):
        if isinstance(one, bool) or not isinstance(one, (int, np.integer)) or not -(2**31) <= one < 2**31:
            shown = one if type(one) in (int, float) else json_kind(one)
            raise CorpusError(f"{location}: {field}[{number}] is {shown}; expected a whole number of 32 bits")
    return np.array(value, dtype=np.int64)


def metadata_text(fields: Mapping[Any, object]) -> str:
    """Fields as one JSON object; nothing if there is none.

    Fields that are null are left out. Values that JSON does not have are written as text, and
    binary values as their length.
    """
    plain = {str(name): _plain(value, 0) for name, value in fields.items() if value is not None}
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":")) if plain else ""


def _plain(value: Any, depth: int) -> Any:
    """The value in the types that JSON has."""
    if value is None or type(value) in (str, bool):
        return value
    if isinstance(value, (int, float)):
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return value if abs(value) < 2**64 else f"{value:.17g}" if isinstance(value, float) else _digits(value)
    if depth >= _DEEPEST:
        return f"a {type(value).__name__} nested more than {_DEEPEST} deep"
    if isinstance(value, Mapping):
        return {str(name): _plain(inner, depth + 1) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, depth + 1) for inner in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"{len(value)} bytes"
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), depth + 1)
    if isinstance(value, np.generic):
        return _plain(value.item(), depth)
    return str(value)


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # more digits than Python converts
        return f"a number of {value.bit_length()} bits"
