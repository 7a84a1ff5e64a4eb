"""String matching of answers and entities (paper, §4.2, §6 and A.3): lower case, without stop words and punctuation.

A text becomes its words: runs of letters and digits, in lower case. What stands between them, hyphens and apostrophes
too, separates words. English stop words are left out, unless a name consists of nothing else ("It"): then the name's
and the text's words are compared with all of theirs. Names match as whole words, in order and side by side.
"""

import re
import unicodedata
from collections.abc import Iterable

STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)
"""Lucene's English stop words, which BM25 leaves out too."""

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> tuple[str, ...]:
    """A text's words in lower case (Unicode NFKC), stop words included."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).lower()))


def content_words(text: str) -> tuple[str, ...]:
    """A text's words in lower case without stop words."""
    return tuple(word for word in words(text) if word not in STOP_WORDS)


def answer_is_correct(answer: str, completion: str, aliases: Iterable[str] = ()) -> bool:
    """Whether what the model said begins with the completion or with another name of it.

    What follows does not count, since a model that is not told to stop goes on: "Paris, the capital" is right where
    "Paris" is asked for, "the city of Paris" is not.

    Args:
        answer: What the model said, such as `generate` gives.
        completion: The right answer.
        aliases: Its other names.
    """
    said = _Forms(answer)
    return any(said.begins_with(name) for name in (completion, *aliases))


def names_entity(text: str, names: Iterable[str]) -> bool:
    """Whether a text names an entity by any of its names, as whole words."""
    forms = _Forms(text)
    return any(forms.hold(name) for name in names)


def shares_word(text: str, names: Iterable[str]) -> bool:
    """Whether a text has at least one word, other than a stop word, of any of an entity's names."""
    there = set(content_words(text))
    return any(word in there for name in names for word in content_words(name))


def spelled(found: Iterable[str]) -> str:
    """Words side by side with a space before, between and after: one holds another where it holds its words."""
    return f" {' '.join(found)} "


class _Forms:
    """A text with and without its stop words; a name is looked for without them if anything of it is left."""

    def __init__(self, text: str) -> None:
        every = words(text)
        self._every = spelled(every)
        self._content = spelled(word for word in every if word not in STOP_WORDS)

    def hold(self, name: str) -> bool:
        if content := content_words(name):
            return spelled(content) in self._content
        every = words(name)
        return bool(every) and spelled(every) in self._every

    def begins_with(self, name: str) -> bool:
        if content := content_words(name):
            return self._content.startswith(spelled(content))
        every = words(name)
        return bool(every) and self._every.startswith(spelled(every))


def name_spans(text: str, names: Iterable[str]) -> list[tuple[int, int]]:
    """Where a text names an entity, as half-open ranges of characters; longest names first, none overlapping.

    Names match as their words, whole and in order, whatever stands between them and whatever their case. Unlike
    `names_entity` this leaves out no stop word: it is for marking, not for counting.
    """
    patterns = [r"[\W_]+".join(map(re.escape, found)) for name in names if (found := _WORD.findall(name))]
    if not patterns:
        return []
    longest_first = "|".join(sorted(set(patterns), key=len, reverse=True))
    return [found.span() for found in re.finditer(rf"(?<![^\W_])(?:{longest_first})(?![^\W_])", text, re.IGNORECASE)]
