"""Text made fit for one line: control characters, length, quoting, and the words of strict JSON readers."""


def printable(text: str) -> str:
    """The text without what could move a terminal's cursor, recolour it or reverse its writing: spaces instead."""
    return "".join(character if character.isprintable() else " " for character in text)


def shortened(text: str, most: int) -> str:
    """The text's beginning, with a sign where more follows."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def one_line(error: BaseException) -> str:
    """An error's text on one line; its kind where it has none."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:200] or type(error).__name__


class Words(str):
    """What was found, where that is no value but something to say of it; shown without quotes."""


def abridged(found: object) -> str:
    """One short line that shows a value, whatever it is."""
    try:
        return cut(str(found) if isinstance(found, Words) else ascii(found))
    except (ValueError, RecursionError):  # a number of thousands of digits, or nested nearly too deeply to be read
        return f"a {type(found).__name__} too large to show"


def cut(shown: str) -> str:
    """The text, or its beginning."""
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
