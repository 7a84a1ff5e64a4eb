"""Parse JSON into frozen dataclasses; refuse missing, unknown and repeated fields and other types."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from trackstar.text import Words, abridged, cut

T = TypeVar("T")


class FieldError(ValueError):
    """A field of a JSON text has an invalid value; the message is `FIELD is FOUND, expected EXPECTED`."""

    def __init__(self, field: str, found: object, expected: str) -> None:
        super().__init__(f"{cut(field)} is {abridged(found)}, expected {expected}")


def read_strictly(text: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        FieldError: The text is not a JSON object, repeats a key, or has a number that JSON does not
            allow (NaN, Infinity).
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        fields: dict[str, object] = {}
        for key, value in pairs:
            if key in fields:
                raise FieldError(abridged(key), Words("repeated"), "one value")
            fields[key] = value
        return fields

    def constant(name: str) -> object:
        raise FieldError("a number", Words(name), "a finite number")

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except FieldError:
        raise
    except RecursionError as error:
        raise FieldError("the text", Words("nested too deeply"), "a JSON object") from error
    except ValueError as error:  # not JSON, or an integer of thousands of digits
        raise FieldError("the text", Words(f"not JSON ({error})"), "a JSON object") from error
    if not isinstance(content, dict):
        raise FieldError("the text", content, "a JSON object")
    return content


def parse_object(kind: type[T], content: object, field: str = "") -> T:
    """Parse a JSON value as an instance of a dataclass.

    Args:
        kind: The dataclass; its fields' types are the expected types.
        content: The value, as `read_strictly` returns it.
        field: Name of the value, which messages put before the names of its fields.

    Raises:
        FieldError: A field is missing, is unknown or has another type.
    """
    if not isinstance(content, dict):
        raise FieldError(field or "the text", content, "a JSON object")
    hints = typing.get_type_hints(kind)
    prefix = f"{field}." if field else ""
    missing = [name for name in hints if name not in content]
    if missing:
        raise FieldError(f"{prefix}{missing[0]}", Words("missing"), _described(hints[missing[0]]))
    unknown = [name for name in content if name not in hints]
    if unknown:
        raise FieldError(f"{prefix}{unknown[0]}", Words("unknown"), "no field of this name")
    return kind(**{name: _parse(hint, content[name], f"{prefix}{name}") for name, hint in hints.items()})


def _parse(hint: Any, value: Any, field: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return parse_object(typing.cast("type", hint), value, field)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else _parse(inner, value, field)
    if origin is tuple:
        return _parse_list(arguments, value, field)
    if origin is Mapping:
        return _parse_mapping(value, field)
    if origin is Literal:
        accepted = isinstance(value, str) and value in arguments
    elif hint is float:
        accepted = type(value) is float and math.isfinite(value)
    elif hint is int:
        # Such numbers can be shown, and so can numbers computed from them.
        accepted = type(value) is int and abs(value) < 2**64
    else:
        accepted = type(value) is hint
    if not accepted:
        raise FieldError(field, value, _described(hint))
    return value


def _parse_list(arguments: tuple[Any, ...], value: Any, field: str) -> tuple[Any, ...]:
    any_length = arguments[-1] is Ellipsis
    if not isinstance(value, list):
        raise FieldError(field, value, "a list")
    if not any_length and len(value) != len(arguments):
        raise FieldError(field, value, f"a list of {len(arguments)}")
    hints = [arguments[0]] * len(value) if any_length else arguments
    return tuple(
        _parse(hint, item, f"{field}[{index}]") for index, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _parse_mapping(value: Any, field: str) -> dict[str, str]:
    """Strings by name, in the order of the names."""
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FieldError(field, value, "a JSON object of strings")
    if list(value) != sorted(value):
        raise FieldError(field, Words("not sorted"), "names in ascending order")
    return value


def _described(hint: Any) -> str:
    names = {
        str: "a string",
        int: "a whole number below 2^64",
        float: "a finite number with a decimal point",
        bool: "true or false",
    }
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _described(part) for part in arguments)
    if origin is tuple:
        return "a list"
    return names.get(hint, "a JSON object")
