"""A list of examples' names: one a line of a text file."""

import os

from trackstar.errors import CorpusError


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a file that are not blank, in order, without line ends.

    Raises:
        CorpusError: The file cannot be read, is not UTF-8 or has no name; the message names it.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            content = file.read()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise CorpusError(f"{name}: cannot be read ({error.strerror}); give a file of names, one a line") from error
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{name}: byte {error.start} is not UTF-8; expected a text file of names, one a line"
        ) from error
    names = [line for line in (line.rstrip("\r") for line in text.split("\n")) if line.strip()]
    if not names:
        raise CorpusError(f"{name}: holds no name; expected one a line")
    return names
