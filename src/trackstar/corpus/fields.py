"""The fields of one record: parse a line's JSON object, and check its text and name."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trackstar.corpus.data_files import decoded
from trackstar.errors import CorpusError
from trackstar.text import one_line

_MOST_SHOWN = 12


class Fields(NamedTuple):
    """Names of the fields that hold a record's text and name; `identifier` is None if there is no name."""

    text: str
    identifier: str | None


def json_object(line: bytes, location: str) -> dict[str, object]:
    """The JSON object of a line.

    Raises:
        CorpusError: It is not UTF-8, not JSON, or not an object; the message names the location.
    """
    try:
        value = json.loads(decoded(line, location))
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
        raise CorpusError(f"{location}: broken JSON ({reason}); expected one whole JSON object per line") from None
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            f"{location}: JSON that cannot be read ({one_line(error)}); expected a plain object"
        ) from None
    if not isinstance(value, dict):
        raise CorpusError(f"{location}: found {json_kind(value)}, expected one JSON object per line")
    return value


def name_and_text(record: Mapping[Any, object], fields: Fields, location: str) -> tuple[str | None, str]:
    """The record's name and text, checked.

    Raises:
        CorpusError: A field is missing or holds no such value; the message names the location.
    """
    for name in fields:
        if name is not None and name not in record:
            raise missing_field(name, fields, [str(key) for key in record], location)
    identifier = None if fields.identifier is None else checked_name(record[fields.identifier], fields, location)
    return identifier, checked_text(record[fields.text], fields, location)


def encodable(text: str, description: str) -> str:
    """The text itself, if it can be encoded as UTF-8.

    Raises:
        CorpusError: It holds half of a surrogate pair; the message begins with the description.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise CorpusError(f"{description} holds half a surrogate pair ({half}); expected text; remove it") from None
    return text


def checked_text(value: object, fields: Fields, location: str) -> str:
    """The value of a record's text field, if it is text that can be encoded.

    Raises:
        CorpusError: It is not; the message names the location.
    """
    if not isinstance(value, str):
        raise CorpusError(f'{location}: field "{fields.text}" is {json_kind(value)}; expected a string')
    return encodable(value, f"{location}: the text")


def checked_name(value: object, fields: Fields, location: str) -> str | None:
    """The value of a record's name field as a string; None if records have no such field.

    Raises:
        CorpusError: It is neither a string nor a whole number; the message names the location.
    """
    if fields.identifier is None:
        return None
    if isinstance(value, str) and value:
        return encodable(value, f'{location}: field "{fields.identifier}"')
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    kind = "an empty string" if value == "" else json_kind(value)
    raise CorpusError(f'{location}: field "{fields.identifier}" is {kind}; expected a name: a string or a whole number')


def missing_field(name: str, fields: Fields, field_names: Sequence[str], location: str) -> CorpusError:
    """The error for a missing field; the message lists the fields that the record has."""
    shown = ", ".join(field_names[:_MOST_SHOWN]) + (" ..." if len(field_names) > _MOST_SHOWN else "")
    parameter = "text_field" if name == fields.text else "id_field"
    found = one_line(shown) or "no fields"
    return CorpusError(f'{location}: no field "{name}"; found {found}; name the one to read with `{parameter}`')


def json_kind(value: object) -> str:
    """JSON's name for the type of a value, with an article."""
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
