"""Names that two records share, and texts that are repeated, found in one pass with 16 bytes per record.

The pass keeps a hash of 64 bits of each name and of each text. Only if hashes are equal, a second
pass compares the names themselves, so that two names with the same hash are never taken for one.

Window k > 0 of the example `a` is named `a#k`. So a record that is itself named `a#1` shares its name
with a window if there is a record `a`.

Numbering gives each further record of the name `a` the first free one of `a~2`, `a~3`, ..., in the
order of the records. A name is free if no record has it, and no record is named like one of its
windows. The result depends on the corpus alone.
"""

import array
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NoReturn, final

import numpy as np
from jaxtyping import UInt64

from trackstar.corpus.digests import draw_bytes
from trackstar.errors import CorpusError
from trackstar.text import one_line

_WINDOW = re.compile(r"(.+)#[1-9][0-9]*", re.DOTALL)
_MOST_COMPARED = 1000
ADVICE = 'name each once, name another field with `id_field`, or pass `duplicate_ids="number"`'


def parent_name(name: str) -> str | None:
    """`a` for `a#1`, the name of a window of `a`; None for a name that no window has."""
    match = _WINDOW.fullmatch(name)
    return None if match is None else match[1]


def hash_of(text: str) -> int:
    """A hash of 64 bits."""
    return int.from_bytes(draw_bytes(text.encode("utf-8", "surrogatepass"), bits=64), "little")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NameHashes:
    """Hashes of names, sorted.

    Attributes:
        names: Of the names.
        parents: Of `a` for each name `a#k`, which a window of `a` may have.
    """

    names: UInt64[np.ndarray, "names"]
    parents: UInt64[np.ndarray, "windows"]

    @classmethod
    def of(cls, names: Iterable[str]) -> "NameHashes":
        """Hashes of these names."""
        collected = NameCollector()
        for name in names:
            collected.add(name)
        return collected.hashes()

    def may_have(self, name: str) -> bool:
        """Whether one of the names, or of their windows, may be named like this one or one of its windows."""
        parent = parent_name(name)
        return (
            _holds(self.names, hash_of(name))
            or _holds(self.parents, hash_of(name))
            or (parent is not None and _holds(self.names, hash_of(parent)))
        )


@final
class HashCollector:
    """Collects the hashes of texts, 8 bytes each."""

    def __init__(self) -> None:
        self._hashes = array.array("Q")

    def add(self, text: str) -> None:
        """Add a text."""
        self._hashes.append(hash_of(text))

    def sorted(self) -> UInt64[np.ndarray, "texts"]:
        """The hashes so far, ascending."""
        return np.sort(np.array(self._hashes, dtype=np.uint64))

    def repeated(self) -> int:
        """How many of the hashes are equal to an earlier one."""
        return len(self._hashes) - len(np.unique(self.sorted()))


@final
class NameCollector:
    """Collects the hashes of names, in any order."""

    def __init__(self) -> None:
        self._names = HashCollector()
        self._parents = HashCollector()

    def add(self, name: str) -> None:
        """Add a name."""
        self._names.add(name)
        if "#" in name and (parent := parent_name(name)) is not None:
            self._parents.add(parent)

    def hashes(self) -> NameHashes:
        """The hashes so far."""
        return NameHashes(names=self._names.sorted(), parents=self._parents.sorted())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Named:
    """A record's name, number and location.

    Attributes:
        name: Its name.
        record: Its number.
        location: Its location, for messages.
        document: What two records have in common that are parts of one document, which has one
            name; None if each record is a document of its own.
    """

    name: str
    record: int
    location: str
    document: tuple[str, int] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TakenNames:
    """Names that examples already have, where a corpus is added to them.

    Attributes:
        holder: What has them, for messages, such as the path of an index.
        hashes: Their hashes.
        names: Reads them again.
        check_content: Called when the corpus's content is known, before names are compared.
    """

    holder: str
    hashes: NameHashes
    names: Callable[[], Iterator[str]]
    check_content: Callable[[], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """What one pass over a corpus has found.

    Attributes:
        digest: `Corpus.digest`.
        records: Number of records.
        blank_texts: Number of records whose text is not empty, but all white space.
        repeated_texts: Number of records whose text, not blank, an earlier record has.
        numbers: k of each record that is named `NAME~k`, by its number; empty if duplicates are refused.
        metadata_bytes: Length of all records' metadata.
        spelled_out: Number of records whose text begins with the tokenizer's leading token.
        leading: That token; empty for none.
        absent: Fields that are to be kept as metadata and that no record has.
    """

    digest: str
    records: int
    blank_texts: int
    repeated_texts: int
    numbers: Mapping[int, int]
    metadata_bytes: int = 0
    spelled_out: int = 0
    leading: str = ""
    absent: tuple[str, ...] = ()

    def notes(self, name: str) -> Iterator[str]:
        """Lines for the user about the corpus of that name."""
        if self.numbers:
            yield f"{name}: {len(self.numbers):,} records have a name that is taken, and are named NAME~2, NAME~3, ..."
        if self.blank_texts:
            yield f"{name}: the texts of {self.blank_texts:,} of {self.records:,} records are nothing but white space"
        if self.repeated_texts:
            yield (
                f"{name}: the texts of {self.repeated_texts:,} of {self.records:,} records repeat an earlier record's; "
                "each is indexed and ranked by itself"
            )
        if self.spelled_out:
            yield (
                f"{name}: the texts of {self.spelled_out:,} of {self.records:,} records spell out {self.leading}, "
                "which the tokenizer adds; each has it once"
            )
        if self.absent:
            named = one_line(", ".join(self.absent))
            yield f"{name}: no record has a field {named}, which `metadata` names; check the spelling"
        if self.metadata_bytes:
            yield (
                f"{name}: the records' other fields are kept as metadata, {self.metadata_bytes / self.records:,.0f} "
                'bytes per record; `metadata="none"` leaves them out'
            )


@final
class DuplicateCheck:
    """Compares the names of a corpus with each other, and with names that are taken.

    Args:
        names: Hashes of the corpus's names.
        taken: Names that others have; None for none.
        named: Reads the corpus's names again.
        advice: What to do about a duplicate, for messages.
    """

    def __init__(
        self,
        names: NameHashes,
        taken: TakenNames | None,
        named: Callable[[], Iterator[Named]],
        advice: str = ADVICE,
    ) -> None:
        self._names = names
        self._taken = taken
        self._named = named
        self._advice = advice
        values = names.names
        self._repeated = np.unique(values[1:][values[1:] == values[:-1]])
        parents = names.parents[_are_in(names.parents, values)]
        self._window_parents = np.unique(parents)

    def refuse(self) -> None:
        """Raise if two records have the same name, or a record has the name of another's window.

        Raises:
            CorpusError: They do; the message names both places.
        """
        if len(self._repeated) or len(self._window_parents):
            self._refuse_within()
        if self._taken is not None:
            self._refuse_taken(self._taken)

    def numbers(self) -> dict[int, int]:
        """k of each record whose name becomes `NAME~k`, by the record's number."""
        used = [self._names] if self._taken is None else [self._names, self._taken.hashes]
        if self._taken is None and not len(self._repeated) and not len(self._window_parents):
            return {}
        numbers: dict[int, int] = {}
        last: dict[str, int] = {}
        given: dict[tuple[str, int], int] = {}  # by document; 1 for its own name
        for one in self._named():
            if one.document is not None and one.document in given:
                if given[one.document] > 1:
                    numbers[one.record] = given[one.document]
                continue
            hashed, parent = hash_of(one.name), parent_name(one.name)
            repeated = _holds(self._repeated, hashed)
            free = not (self._taken is not None and self._taken.hashes.may_have(one.name))
            free = free and not (parent is not None and _holds(self._names.names, hash_of(parent)))
            if free and not repeated:
                continue
            number = 1
            if not free or one.name in last:
                number = last.get(one.name, 1) + 1
                while any(hashes.may_have(numbered(one.name, number)) for hashes in used):
                    number += 1
                numbers[one.record] = number
            last[one.name] = number
            if one.document is not None:
                given[one.document] = number
        return numbers

    def _refuse_within(self) -> None:
        first: dict[str, Named] = {}  # the names that may be repeated
        windows: dict[str, Named] = {}  # by the name that they may be windows of
        for one in self._named():
            hashed, parent = hash_of(one.name), parent_name(one.name)
            if _holds(self._repeated, hashed) or _holds(self._window_parents, hashed):
                earlier = first.get(one.name)
                if earlier is not None and one.document is not None and one.document == earlier.document:
                    continue
                if earlier is not None:
                    raise CorpusError(
                        f"{one.location}: the name {_shown(one.name)} is also at {earlier.location}; {self._advice}"
                    )
                first[one.name] = one
                if one.name in windows:
                    self._refuse_window(windows[one.name], one.name, one.location)
            if parent is not None and _holds(self._window_parents, hash_of(parent)):
                windows.setdefault(parent, one)
                if parent in first:
                    self._refuse_window(one, parent, first[parent].location)

    def _refuse_window(self, one: Named, parent: str, location: str) -> NoReturn:
        raise CorpusError(
            f"{one.location}: the name {_shown(one.name)} is that of a window of the record {_shown(parent)} at "
            f"{location}; {self._advice}"
        )

    def _refuse_taken(self, taken: TakenNames) -> None:
        found: dict[str, Named] = {}
        windows: dict[str, Named] = {}  # by the name that they may be windows of
        for one in self._named():
            if taken.hashes.may_have(one.name):
                found.setdefault(one.name, one)
                if (parent := parent_name(one.name)) is not None:
                    windows.setdefault(parent, one)
            if len(found) >= _MOST_COMPARED:
                break
        for name in taken.names() if found else ():
            one = found.get(name) or windows.get(name) or found.get(parent_name(name) or name)
            if one is not None:
                also = "" if name == one.name else f" as {_shown(name)}, and windows of NAME are named NAME#1, NAME#2"
                raise CorpusError(
                    f"{one.location}: the name {_shown(one.name)} is already in {taken.holder}{also}; {self._advice}"
                )


def numbered(name: str, number: int) -> str:
    """The name of a further record of a name."""
    return f"{name}~{number}"


def _shown(name: str) -> str:
    return f'"{one_line(name, 80)}"'


def _holds(sorted_values: UInt64[np.ndarray, "values"], value: int) -> bool:
    place = int(np.searchsorted(sorted_values, np.uint64(value)))
    return place < len(sorted_values) and int(sorted_values[place]) == value


def _are_in(values: UInt64[np.ndarray, "values"], sorted_values: UInt64[np.ndarray, "others"]) -> np.ndarray:
    places = np.searchsorted(sorted_values, values)
    if not len(sorted_values):
        return np.zeros(len(values), dtype=bool)
    return (places < len(sorted_values)) & (sorted_values[np.minimum(places, len(sorted_values) - 1)] == values)
