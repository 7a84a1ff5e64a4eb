"""Detect examples that would be indexed twice when indexes are extended or merged.

An example indexed twice would count twice in R_train and in rankings. A corpus is identified by its
digest. The same corpus read with another limit or other fields has another digest, so these are
compared as well. Whether different corpora share texts is not checked. Names are compared, because
results, lists of names and gold examples refer to examples by name.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from trackstar.choices import DuplicateIds
from trackstar.corpus import Corpus, TokenizedExample
from trackstar.corpus.duplicates import DuplicateCheck, Named, NameHashes, TakenNames, numbered
from trackstar.errors import CorpusError, OptionError
from trackstar.store import CorpusEntry, Index, StoredExample
from trackstar.text import abridged

Rename = Callable[[TokenizedExample], TokenizedExample]
"""Names an example, whose record is numbered through all indexes."""

_MERGE_ADVICE = (
    'remove one of them with `remove_examples`, or pass `duplicate_ids="number"`, which renames the second in the '
    "new index"
)
# Examples compared between two corpora that may be the same.
_COMPARED_EXAMPLES = 64


def added_corpus(index: Index, corpus: Corpus) -> Corpus:
    """The corpus as it is added to an index: its survey also compares it with the index's corpora
    and names.

    Args:
        index: The index. Its examples are read for their names.
        corpus: The corpus. Its survey reads it once, and once more for each other limit and choice
            of fields among the index's corpora.
    """

    def check_new() -> None:
        if any(_is_same_corpus(indexed, added) for indexed in index.manifest.corpora):
            raise OptionError(
                f"`data`: {index.path} already contains {corpus.name}, whose examples would count twice; pass only new "
                "examples"
            )

    taken = TakenNames(
        holder=str(index.path),
        hashes=NameHashes.of(_names(index)),
        names=lambda: _names(index),
        check_content=check_new,
    )
    added = dataclasses.replace(corpus, first_position=record_count(index), taken=taken)
    return added


def _names(index: Index) -> Iterator[str]:
    """The name of each document of an index, in order; once for windows that follow each other."""
    return (named.name for named in _named(index))


def _named(index: Index) -> Iterator[Named]:
    """Each document's name, with its record in its corpus: other windows of it may be in another index."""
    corpora = index.manifest.corpora
    starts = [corpus.first_record for corpus in corpora]
    last = None
    for stored in index.examples():
        example = stored.example
        if last != (example.record, example.parent_id):
            last = example.record, example.parent_id
            number = bisect.bisect_right(starts, example.record) - 1
            yield Named(
                name=example.parent_id,
                record=example.record,
                location=f"{index.path}, row {stored.row}",
                document=(corpora[number].digest, example.record - starts[number]),
            )


def renaming(indexes: Sequence[Index], duplicate_ids: DuplicateIds) -> Rename | None:
    """How documents are renamed where indexes are merged; None if none is.

    Args:
        indexes: The indexes, in the order of the new index's rows.
        duplicate_ids: `refuse` or `number`.

    Raises:
        CorpusError: Duplicates are refused, and two documents have the same name.
    """
    starts = [0, *itertools.accumulate(record_count(index) for index in indexes)]

    def named() -> Iterator[Named]:
        for start, index in zip(starts, indexes, strict=False):
            for one in _named(index):
                yield dataclasses.replace(one, record=start + one.record)

    check = DuplicateCheck(NameHashes.of(one.name for one in named()), None, named, _MERGE_ADVICE)
    if duplicate_ids == "refuse":
        check.refuse()
        return None
    numbers = check.numbers()

    def rename(example: TokenizedExample) -> TokenizedExample:
        number = numbers.get(example.record)
        if number is None:
            return example
        parent = numbered(example.parent_id, number)
        name = parent + example.example_id.removeprefix(example.parent_id)
        return dataclasses.replace(example, example_id=name, parent_id=parent)

    return rename if numbers else None


def _is_same_corpus(indexed: CorpusEntry, corpus: Corpus) -> bool:
    """Whether an indexed corpus is this one, also if it was read with another limit or other fields."""
    reading = indexed.reading
    if not corpus.in_memory:  # the digest of files does not depend on the metadata that are kept
        reading = dataclasses.replace(reading, metadata=corpus.reading.metadata)
    reread = corpus if reading == corpus.reading else corpus.read_as(reading)
    try:
        return reread.choice_of_digest(indexed.digest) is not None
    except CorpusError:
        return False  # the corpus cannot be read with these fields


def check_disjoint(indexes: Sequence[Index]) -> None:
    """Raise if two indexes contain the same example of the same corpus.

    Raises:
        OptionError: Two indexes share an example; the message names both.
    """
    seen: list[tuple[Index, CorpusEntry, dict[tuple[int, int], int]]] = []
    entries = [corpus for index in indexes for corpus in index.manifest.corpora]
    for index in indexes:
        corpora = index.manifest.corpora
        ends = [corpus.first_record for corpus in corpora[1:]] + [record_count(index)]
        for corpus, end in zip(corpora, ends, strict=True):
            if sum(_may_be_same(corpus, entry) for entry in entries) < 2:
                continue
            # (record of the corpus, window) -> row of the index
            row_of = {
                (record - corpus.first_record, window): shard.first_row + row
                for shard in index.shards
                for row, (record, window) in enumerate(zip(shard.records.tolist(), shard.windows.tolist(), strict=True))
                if corpus.first_record <= record < end
            }
            for other, entry, other_row_of in seen:
                shared = sorted(row_of.keys() & other_row_of.keys()) if _may_be_same(corpus, entry) else []
                amount = f"{len(shared)}"
                if shared and corpus.digest != entry.digest:
                    shared = shared[:: -(-len(shared) // _COMPARED_EXAMPLES)]
                    rows, other_rows = ([rows_of[place] for place in shared] for rows_of in (row_of, other_row_of))
                    shared = _equal_examples(index.some_examples(rows), other.some_examples(other_rows))
                    amount = f"{len(shared)} or more"
                if shared:
                    raise OptionError(
                        f"`indexes`: {index.path} and {other.path} share {amount} examples (corpus "
                        f"{abridged(corpus.source)}), which would count twice; leave one index out, or remove the "
                        "examples from one with `remove_examples`"
                    )
            seen.append((index, corpus, row_of))


def _may_be_same(one: CorpusEntry, other: CorpusEntry) -> bool:
    """Whether two corpora are the same, or may be the same one read with another limit or other fields."""
    return one.digest == other.digest or (one.source == other.source and one.reading != other.reading)


def _equal_examples(some: Sequence[StoredExample], others: Sequence[StoredExample]) -> list[str]:
    """Ids of the examples whose tokens equal those of the example at the same position among the others."""
    pairs = zip(some, others, strict=True)
    return [a.example.example_id for a, b in pairs if np.array_equal(a.example.token_ids, b.example.token_ids)]


def record_count(index: Index) -> int:
    """Number of records in all corpora of an index, skipped records included."""
    completion = index.manifest.completion
    assert completion is not None, "an open index is finished"
    return completion.records
