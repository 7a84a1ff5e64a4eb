"""How often a corpus holds a fact: examples that name both its subject and its object (paper, §4.2)."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int64

from trackstar.corpus import Example
from trackstar.errors import OptionError
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.matching import STOP_WORDS, content_words, spelled, words
from trackstar.progress import Progress

if TYPE_CHECKING:
    from ahocorasick_rs import AhoCorasick

LAST_BUCKET = 5


def fact_frequencies(
    facts: Sequence[Fact], examples: Iterable[Example], *, progress: bool = True
) -> Int64[np.ndarray, "facts"]:
    """In how many examples any name of a fact's subject and any name of its object stand together.

    Names match as `matching.names_entity` says. All names of all facts are looked for in one pass over each text
    (Aho-Corasick).

    Args:
        facts: What to count.
        examples: Where to count; read once, one at a time.
        progress: Whether there may be a bar.

    Returns:
        A count each fact, in the facts' order.
    """
    finder = _Finder()
    subjects = [_numbers(finder, fact.subject.names) for fact in facts]
    objects = [_numbers(finder, fact.object.names) for fact in facts]
    facts_of: dict[int, list[int]] = defaultdict(list)
    for fact, names in enumerate(subjects):
        for name in names:
            facts_of[name].append(fact)
    counts = np.zeros(len(facts), dtype=np.int64)
    with Progress("Counting facts", unit="examples", shown=progress) as bar:
        for example in examples:
            found = finder.found(example.text)
            both = {fact for name in found for fact in facts_of.get(name, ()) if not found.isdisjoint(objects[fact])}
            counts[list(both)] += 1
            bar.advance(1)
    return counts


def frequency_bucket(frequency: int) -> int:
    """The bucket of a fact's frequency: 0 for none, b for 10^(b-1) up to but not 10^b, 5 for 10,000 and more.

    The public release's results have as many buckets, from 0 to 5 (the most common); its edges are not in it, and
    these are ours: powers of ten.

    Raises:
        OptionError: The frequency is negative.
    """
    if frequency < 0:
        raise OptionError(f"a frequency of {frequency}; expected a count from 0")
    return min(LAST_BUCKET, len(str(frequency))) if frequency else 0


def bucket_name(bucket: int) -> str:
    """What a bucket holds, for tables: `0`, `1-9`, `10-99` ... `10,000+`.

    Raises:
        OptionError: There is no such bucket.
    """
    if not 0 <= bucket <= LAST_BUCKET:
        raise OptionError(f"bucket {bucket}; expected 0 to {LAST_BUCKET}")
    if bucket == 0:
        return "0"
    low = 10 ** (bucket - 1)
    return f"{low:,}+" if bucket == LAST_BUCKET else f"{low:,}-{10 * low - 1:,}"


class _Name(NamedTuple):
    """A name as it is looked for, and whether in the text without its stop words."""

    spelled: str
    content: bool


class _Finder:
    """Which of many names a text holds."""

    def __init__(self) -> None:
        self._numbers: dict[_Name, int] = {}
        self._automata: list[tuple[bool, AhoCorasick, list[int]]] | None = None

    def number(self, name: str) -> int | None:
        """The name's number; names that differ only in case, punctuation or stop words have one. None for no word."""
        content = content_words(name)
        looked_for = content or words(name)
        if not looked_for:
            return None
        return self._numbers.setdefault(_Name(spelled(looked_for), bool(content)), len(self._numbers))

    def found(self, text: str) -> set[int]:
        """The numbers of the names that the text holds; all names must have been numbered before."""
        if self._automata is None:
            self._automata = list(self._built())
        every = words(text)
        numbers: set[int] = set()
        for content, automaton, own in self._automata:
            haystack = spelled(word for word in every if word not in STOP_WORDS) if content else spelled(every)
            numbers.update(own[match[0]] for match in automaton.find_matches_as_indexes(haystack, overlapping=True))
        return numbers

    def _built(self) -> "Iterator[tuple[bool, AhoCorasick, list[int]]]":
        from ahocorasick_rs import AhoCorasick

        for content in (True, False):
            names = {name.spelled: number for name, number in self._numbers.items() if name.content is content}
            if names:
                yield content, AhoCorasick(list(names), store_patterns=False), list(names.values())


def _numbers(finder: _Finder, names: Iterable[str]) -> frozenset[int]:
    numbers = (finder.number(name) for name in names)
    return frozenset(number for number in numbers if number is not None)
