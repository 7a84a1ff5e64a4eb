"""Match answers and entities in texts (paper, §4.2, §6, A.3): lower case, without stop words and punctuation.

A text becomes its words: runs of letters and digits in lower case, separated by anything else, also
hyphens and apostrophes. English stop words are left out, unless a name consists of nothing else
("It"): then all words of name and text are compared. Names match as whole words, in order and side
by side.
"""

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal

STOP_WORDS = frozenset(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with".split()
)
"""Lucene's English stop words, which BM25 leaves out too."""

_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(
    r"([-+−]?)[$€£¥]?((?>\d{1,3}(?:,\d{3})+|\d+|(?=\.\d)))((?>\.\d+)?)(?![\d/]|[.,]\d|(?:s|st|nd|rd|th)(?![^\W_]))",
    re.IGNORECASE,
)
"""A number at a text's beginning, with its sign and perhaps a currency's."""


def words(text: str) -> tuple[str, ...]:
    """Words of a text in lower case (Unicode NFKC), stop words included."""
    return tuple(_WORD.findall(unicodedata.normalize("NFKC", text).lower()))


def content_words(text: str) -> tuple[str, ...]:
    """Words of a text in lower case, without stop words."""
    return tuple(word for word in words(text) if word not in STOP_WORDS)


def answer_is_correct(answer: str, completion: str, aliases: Iterable[str] = ()) -> bool:
    """Whether a model's answer begins with the completion or one of its aliases.

    The rest of the answer does not count, since the model continues until its token limit: for the
    completion "Paris", "Paris, the capital" is correct and "the city of Paris" is not. A completion
    that is a number is compared as one: "1,000 m", "1000.0" and "1000" are the same, "-3" and "3" or "12"
    and "12.5kg" are not.

    Args:
        answer: The model's answer, as from `generate`.
        completion: The correct answer.
        aliases: Other names of it.
    """
    forms, number = _Forms(answer), _leading_number(answer)
    for name in (completion, *aliases):
        expected = _whole_number(name)
        if expected is not None:
            is_right = number == expected
        elif words(name):
            is_right = forms.begin_with(name)
        else:  # signs alone, such as "+"
            is_right = bool(name.strip()) and answer.strip().startswith(name.strip())
        if is_right:
            return True
    return False


def names_entity(text: str, names: Iterable[str]) -> bool:
    """Whether a text names an entity by one of its names, as whole words."""
    forms = _Forms(text)
    return any(forms.contain(name) for name in names)


def shares_word(text: str, names: Iterable[str]) -> bool:
    """Whether a text has a word of an entity's names that is not a stop word."""
    text_words = set(content_words(text))
    return any(word in text_words for name in names for word in content_words(name))


def _leading_number(text: str) -> Decimal | None:
    """The number that a text begins with; None if it begins with none."""
    match = _NUMBER.match(text.lstrip(" \t\r\n*=:"))
    return None if match is None else _value(match)


def _whole_number(text: str) -> Decimal | None:
    """The number that a text is; None if it is anything else."""
    match = _NUMBER.fullmatch(text.strip())
    return None if match is None else _value(match)


def _value(match: re.Match[str]) -> Decimal:
    sign, whole, fraction = match.groups()
    value = Decimal(whole.replace(",", "") + (fraction or "") or "0")
    return -value if sign in ("-", "−") else value


def spelled(parts: Iterable[str]) -> str:
    """Words with a space before, between and after them, so that a match is a sequence of whole words."""
    return f" {' '.join(parts)} "


class _Forms:
    """A text with and without stop words; a name is compared without them, unless it has no other words."""

    def __init__(self, text: str) -> None:
        every = words(text)
        self._every = spelled(every)
        self._content = spelled(word for word in every if word not in STOP_WORDS)

    def contain(self, name: str) -> bool:
        if content := content_words(name):
            return spelled(content) in self._content
        every = words(name)
        return bool(every) and spelled(every) in self._every

    def begin_with(self, name: str) -> bool:
        if content := content_words(name):
            return self._content.startswith(spelled(content))
        every = words(name)
        return bool(every) and self._every.startswith(spelled(every))


def name_spans(text: str, names: Iterable[str]) -> list[tuple[int, int]]:
    """Character ranges, half-open, at which a text names an entity; longest names first, without overlaps.

    Names match as their words, whole and in order, with anything that is not a word between them,
    in any case. Unlike `names_entity`, this does not leave out stop words: it is for highlighting,
    not for counting.
    """
    patterns = [r"[\W_]+".join(map(re.escape, parts)) for name in names if (parts := _WORD.findall(name))]
    if not patterns:
        return []
    longest_first = "|".join(sorted(set(patterns), key=len, reverse=True))
    matches = re.finditer(rf"(?<![^\W_])(?:{longest_first})(?![^\W_])", text, re.IGNORECASE)
    return [match.span() for match in matches]
