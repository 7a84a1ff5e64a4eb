"""What one record holds: JSON objects from lines, and their fields, checked before anything is made of them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trackstar.corpus.data_files import decoded, one_line
from trackstar.errors import CorpusError

_MOST_SHOWN = 12


class Fields(NamedTuple):
    """Which fields hold a record's text and name; `identifier` is None where records have no name."""

    text: str
    identifier: str | None


def json_object(line: bytes, place: str) -> dict[str, object]:
    """The JSON object that a line holds.

    Raises:
        CorpusError: It is not UTF-8, not JSON, or not an object; the message names the place.
    """
    try:
        found = json.loads(decoded(line, place))
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
        raise CorpusError(f"{place}: broken JSON ({reason}); expected one whole JSON object a line") from None
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{place}: JSON that cannot be read ({one_line(error)}); expected a plain object") from None
    if not isinstance(found, dict):
        raise CorpusError(f"{place}: found {json_kind(found)}, expected a JSON object a line")
    return found


def picked(record: Mapping[Any, object], fields: Fields, place: str) -> tuple[str | None, str]:
    """The record's name and text, checked."""
    for name in fields:
        if name is not None and name not in record:
            raise missing_field(name, fields, [str(key) for key in record], place)
    identifier = None if fields.identifier is None else checked_name(record[fields.identifier], fields, place)
    return identifier, checked_text(record[fields.text], fields, place)


def encodable(text: str, what: str) -> str:
    """The text itself, if a tokenizer can read it.

    Raises:
        CorpusError: It holds half of a surrogate pair, which stands for no character.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise CorpusError(f"{what} holds half a surrogate pair ({found}); expected text; remove it") from None
    return text


def checked_text(value: object, fields: Fields, place: str) -> str:
    """The value of a record's text field, if it is text that a tokenizer can read.

    Raises:
        CorpusError: It is not; the message names the place.
    """
    if not isinstance(value, str):
        raise CorpusError(f'{place}: field "{fields.text}" is {json_kind(value)}; expected a string')
    return encodable(value, f"{place}: the text")


def checked_name(value: object, fields: Fields, place: str) -> str | None:
    """The value of a record's name field as a string; None where there is no such field.

    Raises:
        CorpusError: It is neither a string nor a whole number; the message names the place.
    """
    if fields.identifier is None:
        return None
    if isinstance(value, str) and value:
        return encodable(value, f'{place}: field "{fields.identifier}"')
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    found = "an empty string" if value == "" else json_kind(value)
    raise CorpusError(f'{place}: field "{fields.identifier}" is {found}; expected a name: a string or a whole number')


def missing_field(name: str, fields: Fields, found: Sequence[str], place: str) -> CorpusError:
    """The line that tells which field is missing and which are there."""
    shown = ", ".join(found[:_MOST_SHOWN]) + (" ..." if len(found) > _MOST_SHOWN else "")
    option = "--text-field" if name == fields.text else "--id-field"
    found_fields = one_line(shown) or "no fields"
    return CorpusError(f'{place}: no field "{name}"; found {found_fields}; name the one to read with {option}')


def json_kind(value: object) -> str:
    """What JSON calls the kind of a value, with an article."""
    if value is None:
        return "null"
    kinds: dict[type, str] = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return kinds.get(type(value), f"of type {type(value).__name__}")
