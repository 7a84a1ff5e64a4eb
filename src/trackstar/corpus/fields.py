"""The fields of one record: parse a line's JSON object, and check its text and name."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trackstar.corpus.data_files import decoded
from trackstar.errors import CorpusError
from trackstar.text import abridged, one_line

_MOST_SHOWN = 12
_DEEPEST = 64


class RepeatedFieldError(ValueError):
    """An object names one field twice."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedFieldError(next(name for number, name in enumerate(names) if name in names[:number]))
    return fields


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
"""Decodes JSON, and raises `RepeatedFieldError` if an object names one field twice."""


def json_object(line: bytes, location: str) -> dict[str, object]:
    """The JSON object of a line.

    Raises:
        CorpusError: It is not UTF-8, not JSON, not an object, or names a field twice; the message
            names the location.
    """
    try:
        value = DECODER.decode(decoded(line, location))
    except RepeatedFieldError as error:
        raise repeated_field(error, location) from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos}"
        raise CorpusError(f"{location}: broken JSON ({reason}); expected one whole JSON object per line") from None
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            f"{location}: JSON that cannot be read ({one_line(error)}); expected a plain object"
        ) from None
    if not isinstance(value, dict):
        way = "; let the name of a file that is one array end in .json" if isinstance(value, list) else ""
        raise CorpusError(f"{location}: found {json_kind(value)}, expected one JSON object per line{way}")
    return value


def repeated_field(error: RepeatedFieldError, location: str) -> CorpusError:
    """The error for an object that names one field twice."""
    name = one_line(error, 60)
    return CorpusError(f'{location}: field "{name}" is repeated; expected each field once; leave one out')


def check_writable(record: Mapping[Any, object], location: str) -> None:
    """Raise if a record cannot be written as JSON, as results repeat the fields of their queries.

    Raises:
        CorpusError: A name or a value, at any depth, is half a surrogate pair, NaN, infinite, a
            whole number of more than 64 bits, nested more than 64 deep, or nothing that JSON has;
            the message names the location and the field.
    """
    pending: list[tuple[str, object, int]] = [("", record, 0)]
    while pending:
        field, value, depth = pending.pop()
        what = f'{location}: field "{one_line(field, 80)}"'
        if depth > _DEEPEST:
            raise CorpusError(f"{what} is nested more than {_DEEPEST} deep; expected a flatter value; leave it out")
        if isinstance(value, str):
            encodable(value, what)
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise CorpusError(f"{what} is {value}, which is no JSON; expected a finite number or null; correct it")
        elif isinstance(value, int):
            if not -(2**63) <= value < 2**64:
                raise CorpusError(f"{what} is a number of more than 64 bits; expected a smaller one; write it as text")
        elif isinstance(value, (dict, list, tuple)):
            pending.extend((path, member, depth + 1) for path, member in _members(field, value, location))
        elif value is not None:
            kind = type(value).__name__
            raise CorpusError(f"{what} is of type {kind}; expected a value that JSON has; convert it or leave it out")


def _members(field: str, value: Any, location: str) -> Iterator[tuple[str, object]]:
    """Each member of an object or array, with its path."""
    if not isinstance(value, dict):
        yield from ((f"{field}[{number}]", member) for number, member in enumerate(value))
        return
    for name, member in value.items():
        if not isinstance(name, str):
            raise CorpusError(f"{location}: a field is named by a {type(name).__name__}; expected a string")
        encodable(name, f'{location}: the name of a field "{one_line(name, 80)}"')
        yield (f"{field}.{name}" if field else name), member


MISSING = object()
"""What `value_at` gives for a field that a record does not have."""


def value_at(record: Mapping[Any, object], path: str) -> object:
    """The value of a field, or `MISSING`; `doc.text` is the field `text` of the object `doc`, unless the
    record has a field of the whole name.
    """
    if path in record:
        return record[path]
    value: object = record
    for name in path.split(".") if "." in path else ():
        if not isinstance(value, Mapping) or name not in value:
            return MISSING
        value = value[name]
    return MISSING if value is record else value


def without_paths(record: Mapping[Any, object], paths: Sequence[str]) -> dict[Any, object]:
    """A copy of a record without some fields, which may lie in nested objects."""
    rest = dict(record)
    for path in paths:
        if path in rest:
            del rest[path]
        elif "." in path:
            head, _, tail = path.partition(".")
            inner = rest.get(head)
            if isinstance(inner, Mapping):
                left = without_paths(inner, [tail])
                if left:
                    rest[head] = left
                else:
                    del rest[head]
    return rest


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


def checked_text(value: object, field: str, location: str) -> str:
    """The value of a field, if it is text that can be encoded.

    Raises:
        CorpusError: It is not; the message names the location.
    """
    if not isinstance(value, str):
        raise CorpusError(f'{location}: field "{field}" is {json_kind(value)}; expected a string')
    return encodable(value, f"{location}: the text")


def checked_name(value: object, field: str, location: str) -> str:
    """The value of a record's name field as a string.

    Raises:
        CorpusError: It is neither a string on one line nor a whole number of at most 64 bits; the
            message names the location.
    """
    if isinstance(value, str) and value:
        return one_line_name(value, f'{location}: field "{field}"')
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64:
        return str(value)
    kind = "an empty string" if isinstance(value, str) else json_kind(value)
    raise CorpusError(f'{location}: field "{field}" is {kind}; expected a name: a string or a whole number')


def one_line_name(name: str, description: str) -> str:
    """The name itself, if a file of names can hold it on a line of its own.

    Raises:
        CorpusError: It is empty, holds a line break or half a surrogate pair, or begins or ends
            with white space; the message begins with the description.
    """
    if name != name.strip() or len(name.splitlines()) != 1 or name.startswith("\ufeff"):
        fault = "is blank" if not name.strip() else "holds a line break, or begins or ends with white space"
        raise CorpusError(
            f"{description} {fault} ({abridged(name)}); expected a name on one line, as files of names need; correct it"
        )
    return encodable(name, description)


def listed(field_names: Sequence[str]) -> str:
    """The first names of a record's fields, on one line."""
    shown = ", ".join(field_names[:_MOST_SHOWN]) + (" ..." if len(field_names) > _MOST_SHOWN else "")
    return one_line(shown) or "no fields"


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
