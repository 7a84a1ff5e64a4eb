"""Frequency of a fact in a corpus: the number of examples that name its subject and object (paper, §4.2)."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int64

from trackstar.corpus import Example
from trackstar.corpus.matching import STOP_WORDS, content_words, spelled, words
from trackstar.errors import OptionError, check_at_least
from trackstar.evaluation.facts import Fact
from trackstar.progress import Progress

if TYPE_CHECKING:
    from ahocorasick_rs import AhoCorasick

LAST_BUCKET = 5


def fact_frequencies(
    facts: Sequence[Fact], examples: Iterable[Example], *, progress: bool = True
) -> Int64[np.ndarray, "facts"]:
    """Count the examples that name a fact's subject and its object, each by any of its names.

    Names are matched as by `matching.names_entity`. One pass over each text looks for all names of
    all facts (Aho-Corasick).

    Args:
        facts: The facts to count.
        examples: The examples; they are read once, one at a time.
        progress: Whether progress is shown.

    Returns:
        One count per fact, in the order of the facts.
    """
    finder = _NameFinder()
    subjects = [_numbers(finder, fact.subject.names) for fact in facts]
    objects = [_numbers(finder, fact.object.names) for fact in facts]
    facts_of: dict[int, list[int]] = defaultdict(list)  # number of a subject's name to numbers of facts
    for fact, names in enumerate(subjects):
        for name in names:
            facts_of[name].append(fact)
    counts = np.zeros(len(facts), dtype=np.int64)
    with Progress("Counting facts", unit="examples", shown=progress) as bar:
        for example in examples:
            named = finder.names_in(example.text)
            both = {fact for name in named for fact in facts_of.get(name, ()) if not named.isdisjoint(objects[fact])}
            counts[list(both)] += 1
            bar.advance(1)
    return counts


def frequency_bucket(frequency: int) -> int:
    """Bucket of a frequency: 0 for none, b for 10^(b-1) to 10^b - 1, and 5 for 10,000 and more.

    The public release's results have as many buckets, from 0 to 5 (the most common). Its edges are
    not published; ours are powers of ten.

    Raises:
        OptionError: The frequency is negative.
    """
    check_at_least("frequency", frequency, 0)
    return min(LAST_BUCKET, len(str(frequency))) if frequency else 0


def bucket_name(bucket: int) -> str:
    """Range of a bucket, for tables: `0`, `1-9`, `10-99` ... `10,000+`.

    Raises:
        OptionError: There is no such bucket.
    """
    if not 0 <= bucket <= LAST_BUCKET:
        raise OptionError(f"`bucket`: expected 0 to {LAST_BUCKET}, found {bucket}")
    if bucket == 0:
        return "0"
    low = 10 ** (bucket - 1)
    return f"{low:,}+" if bucket == LAST_BUCKET else f"{low:,}-{10 * low - 1:,}"


class _Name(NamedTuple):
    """A name as its words, and whether it is searched in the text without stop words."""

    spelled: str
    content: bool


class _NameFinder:
    """Find many names in a text at once."""

    def __init__(self) -> None:
        self._numbers: dict[_Name, int] = {}
        self._automata: list[tuple[bool, AhoCorasick, list[int]]] | None = None

    def number(self, name: str) -> int | None:
        """Number of a name; None if it has no word.

        Names that differ only in case, punctuation or stop words have the same number.
        """
        content = content_words(name)
        pattern = content or words(name)
        if not pattern:
            return None
        return self._numbers.setdefault(_Name(spelled(pattern), bool(content)), len(self._numbers))

    def names_in(self, text: str) -> set[int]:
        """Numbers of the names in a text; all names must have been numbered before."""
        if self._automata is None:
            self._automata = list(self._build())
        every = words(text)
        numbers: set[int] = set()
        for content, automaton, numbers_of in self._automata:
            haystack = spelled(word for word in every if word not in STOP_WORDS) if content else spelled(every)
            matches = automaton.find_matches_as_indexes(haystack, overlapping=True)
            numbers.update(numbers_of[match[0]] for match in matches)
        return numbers

    def _build(self) -> "Iterator[tuple[bool, AhoCorasick, list[int]]]":
        """One automaton for names without stop words, one for names that consist of them."""
        from ahocorasick_rs import AhoCorasick

        for content in (True, False):
            names = {name.spelled: number for name, number in self._numbers.items() if name.content is content}
            if names:
                yield content, AhoCorasick(list(names), store_patterns=False), list(names.values())


def _numbers(finder: _NameFinder, names: Iterable[str]) -> frozenset[int]:
    numbers = (finder.number(name) for name in names)
    return frozenset(number for number in numbers if number is not None)
