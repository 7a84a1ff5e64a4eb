"""Join a prompt and its completion: whether a space belongs between them.

Most data sets store `The capital of France is` and `Paris` without the space that a model reads
between them; others store a completion that continues the prompt directly. `auto` adds a space only
where writing has one: between scripts that separate words by spaces, and never at a bracket, a
quotation mark or a hyphen. It cannot know that `Jap` and `anese` are parts of one word; `none` can.
"""

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

from trackstar.choices import JOINS, Join
from trackstar.errors import check_choice

# Scripts that do not separate words by spaces, by the first word of their characters' names.
_WITHOUT_SPACES = frozenset(
    (
        "CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "BOPOMOFO", "IDEOGRAPHIC", "HALFWIDTH", "FULLWIDTH",
        "YI", "NUSHU", "TANGUT", "KHITAN", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "TAI", "NEW", "JAVANESE",
        "BALINESE", "BATAK", "BUGINESE",
    )
)  # fmt: skip
_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # marks without width
_QUOTES = frozenset("\"'`´′″＂＇｀")
_OPERATORS = frozenset("&@*|–—")  # beside the category of mathematical symbols
_OPERATOR_RUN = "".join(sorted(_OPERATORS)) + "<>=+-!:"  # signs of one operator, such as != and ->
_TIGHT = frozenset("/\\#~^°·፡")  # signs that are written without spaces
_INVERTED = frozenset("¿¡")
_NUMBER_GOES_ON = (
    (re.compile(r"\d\.$"), re.compile(r"\d")),  # 3. | 14
    (re.compile(r"\d,$"), re.compile(r"\d{3}(?!\d)")),  # 1, | 000
    (re.compile(r"\d:$"), re.compile(r"\d{2}(?!\d)")),  # 12: | 30
)
_MEMBER_ACCESS = re.compile(r"(?<!\w\.)\b\w+\.$|::$")  # path. | join, std:: | vector; not e.g. | or U.S. |
_AMOUNT_ENDS = re.compile(r"\d\s?.$")  # 5 € |, 50% |
_OPENS_WORD = re.compile(r"[#$]\w|\$\\|\*\*\w")  # | #5, | $x$, | **bold**

_Left = Literal["word", "phrase", "picture", "operator", "tight"]
_Right = Literal["word", "picture", "operator", "tight"]


def joined(prompt: str, completion: str, join: Join = "auto") -> str:
    """The text that the model reads: the prompt, a space or nothing, and the completion.

    Args:
        prompt: The text before the completion.
        completion: The completion.
        join: `auto` adds a space where `needs_space`; `space` adds one unless white space separates
            the two already or one of them is empty; `none` adds none.

    Raises:
        OptionError: `join` is unknown.
    """
    check_choice("join", join, JOINS)
    apart = not prompt or not completion or prompt[-1].isspace() or completion[0].isspace()
    if apart or join == "none" or (join == "auto" and not needs_space(prompt, completion)):
        return prompt + completion
    return f"{prompt} {completion}"


def needs_space(prompt: str, completion: str) -> bool:
    """Whether a space belongs between two texts that have no white space there.

    It does if the prompt ends with a word, a number, an emoji, an operator that stands alone or
    punctuation that ends a phrase, and the completion begins with a word, a number, an emoji or an
    operator that stands alone, and both sides are of scripts that separate words by spaces. A side
    without letters is of the other side's script.
    """
    left, right = prompt.rstrip(_DIRECTIONS), completion.lstrip(_DIRECTIONS)
    if not left or not right or left[-1].isspace() or right[0].isspace():
        return False
    if _without_spaces(reversed(left)) or _without_spaces(right):
        return False
    if _is_wide_punctuation(left[-1]) or _is_wide_punctuation(right[0]):
        return False
    if any(before.search(left) and after.match(right) for before, after in _NUMBER_GOES_ON):
        return False
    if _MEMBER_ACCESS.search(left) and (right[0].islower() or left.endswith("::")):
        return False
    ends, begins = _end_of(left), _beginning_of(right, left)
    return "tight" not in (ends, begins) and not (ends == begins == "picture")


def _without_spaces(characters: Iterable[str]) -> bool:
    """Whether the first letter, or digit of a script, is of a script without spaces between words."""
    for character in characters:
        if character.isalpha() or unicodedata.category(character) in ("Nd", "Nl"):
            script = unicodedata.name(character, "").partition(" ")[0].partition("-")[0]
            if script != "DIGIT":
                return script in _WITHOUT_SPACES
    return False


def _is_wide_punctuation(character: str) -> bool:
    """Whether it is a sign of East Asian width, which has its own room."""
    wide = unicodedata.east_asian_width(character) in ("W", "F")
    return wide and unicodedata.category(character)[0] == "P"


def _end_of(text: str) -> _Left:
    base = len(text)
    while base > 1 and _modifies(text[base - 1]):
        base -= 1
    character = text[base - 1]
    category = unicodedata.category(character)
    if category[0] in "LN":
        return "word"
    if category == "So" and character not in _TIGHT:
        return "picture"
    if _is_operator(character, category):
        before = text[: base - 1].rstrip(_OPERATOR_RUN)
        alone = before[-1:].isspace() and not text.endswith("**")
        return "operator" if alone else "tight"
    if character in "%‰" or category == "Sc":
        return "phrase" if _AMOUNT_ENDS.search(text) else "tight"
    opening = character in _QUOTES or character in _TIGHT or character in _INVERTED
    return "phrase" if category == "Po" and not opening else "tight"


def _beginning_of(text: str, before: str) -> _Right:
    character = text[0]
    category = unicodedata.category(character)
    if category[0] in "LN" or character in _INVERTED:
        return "word"
    if category == "So" and character not in _TIGHT:
        return "picture"
    if _OPENS_WORD.match(text):
        return "tight" if text.startswith("**") and before[-1].isdigit() else "word"
    if category == "Sc":
        return "word" if text[1:2].isdigit() else "tight"
    run = re.match(r"\S+(?=\s)", text)
    alone = run is not None and all(_is_operator(sign, unicodedata.category(sign)) for sign in run.group())
    return "operator" if alone else "tight"


def _is_operator(character: str, category: str) -> bool:
    return character in _OPERATORS or (category == "Sm" and character not in _TIGHT)


def _modifies(character: str) -> bool:
    """Whether it changes the character before it: a combining mark or a skin tone."""
    return unicodedata.category(character)[0] == "M" or "\U0001f3fb" <= character <= "\U0001f3ff"
