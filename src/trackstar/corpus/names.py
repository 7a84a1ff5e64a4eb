"""Read a list of example names from a text file."""

import os

from trackstar.corpus.local_files import check_not_special
from trackstar.errors import CorpusError


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """The names in a file, one per line, in order; blank lines are skipped.

    Every name of a corpus can be such a line: `open_corpus` refuses line breaks in names and white
    space around them.

    Raises:
        CorpusError: The file cannot be read, is not UTF-8 or holds no name; the message names it.
    """
    name = os.fspath(path)
    check_not_special(name)
    try:
        with open(name, "rb") as file:
            content = file.read()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise CorpusError(
            f"{name}: cannot be read ({error.strerror}); expected a file of names, one per line"
        ) from error
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{name}: byte {error.start} is not UTF-8; expected a text file of names, one per line"
        ) from error
    names = [line for line in (line.rstrip("\r") for line in text.split("\n")) if line.strip()]
    if not names:
        raise CorpusError(f"{name}: holds no name; expected one per line")
    return names
