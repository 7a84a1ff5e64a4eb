"""Text for one line: control characters, length, and values quoted in messages."""

import re

_CREDENTIALS = re.compile(r"://[^/@]*@")


def printable(text: str) -> str:
    """Replace characters that could move a terminal's cursor, colour or reverse text by spaces."""
    return "".join(character if character.isprintable() else " " for character in text)


def shortened(text: str, most: int) -> str:
    """Cut the text to `most` characters, the last of them an ellipsis if anything was cut."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def without_credentials(path: str) -> str:
    """Return the path or URL without `USER:PASSWORD@`, for messages and manifests."""
    return _CREDENTIALS.sub("://", path)


def one_line(message: object, most: int = 200) -> str:
    """Return any text or error on one line of at most `most` characters, without credentials."""
    return shortened(without_credentials(" ".join(str(message).split())), most)


def first_line(error: BaseException, most: int = 200) -> str:
    """Return the first line of an error's text, or the name of its class if it has none."""
    lines = str(error).splitlines()
    return one_line(lines[0] if lines else "", most) or type(error).__name__


def system_reason(error: BaseException) -> str:
    """Return the operating system's reason for an error, else its text, else the name of its class."""
    return one_line(getattr(error, "strerror", None) or error) or type(error).__name__


class Words(str):
    """A description in place of a value, such as `nothing`; messages show it without quotes."""


def abridged(found: object) -> str:
    """Return any value as at most 80 characters of ASCII, for a message."""
    try:
        return cut(str(found) if isinstance(found, Words) else ascii(found))
    except (ValueError, RecursionError):  # a number of thousands of digits, or deep nesting
        return f"a {type(found).__name__} too large to show"


def cut(shown: str) -> str:
    """Cut the text to 80 characters, the last three of them dots if anything was cut."""
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def duration(seconds: float) -> str:
    """A time in words, such as `0.4 s`, `41 s`, `3 min 20 s`, `2 h 5 min` or `3 days 4 h`."""
    if seconds < 9.5:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for size, unit, part, smaller in ((86400, "day", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            many, rest = divmod(whole, size)
            name = "days" if unit == "day" and many > 1 else unit
            return f"{many:,} {name}" + (f" {rest // part} {smaller}" if rest >= part else "")
    raise AssertionError("a minute or more")


def amount_of_bytes(amount: int | float) -> str:
    """A number of bytes in words, such as `8.1 KiB` or `3.9 GiB`."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if amount >= size:
            return f"{amount / size:,.1f} {unit}"
    return f"{amount / 2**10:,.1f} KiB"
