"""That no example is in an index twice, where indexes grow and are joined: it would count twice.

The same corpus is known by its digest. Read with another limit or by other fields it has another digest and the same
examples all the same, which is looked at too; whether different corpora have texts in common is not.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from trackstar.corpus import Corpus
from trackstar.errors import CorpusError, OptionError
from trackstar.store import CorpusEntry, Index, StoredExample
from trackstar.text import abridged

# So many examples in the same places of two corpora that may be one are compared.
_COMPARED = 64


def check_new(index: Index, corpus: Corpus, entry: CorpusEntry) -> None:
    """See that an index has not been made of a corpus.

    Args:
        index: The index.
        corpus: The corpus, of which everything is read for each other way that the index's corpora were read in.
        entry: What a manifest says of it.

    Raises:
        OptionError: It has.
    """
    if any(_is_of(there, corpus, entry) for there in index.manifest.corpora):
        raise OptionError(
            f"--data {corpus.name}: {index.path} has been made of this corpus, whose examples would count twice; give "
            "only what is new"
        )


def _is_of(there: CorpusEntry, corpus: Corpus, entry: CorpusEntry) -> bool:
    """Whether an index's corpus is this one: with another limit or other fields it has another digest all the same."""
    if (there.text_field, there.id_field, there.limit) == (entry.text_field, entry.id_field, entry.limit):
        return there.digest == entry.digest
    alike = dataclasses.replace(corpus, text_field=there.text_field, id_field=there.id_field, limit=there.limit)
    try:
        return alike.digest() == there.digest
    except CorpusError:
        return False  # it cannot be read that way


def check_disjoint(indexes: Sequence[Index]) -> None:
    """See that no two indexes hold the same example of the same corpus.

    Raises:
        OptionError: They do.
    """
    held: list[tuple[Index, CorpusEntry, dict[tuple[int, int], int]]] = []
    entries = [corpus for index in indexes for corpus in index.manifest.corpora]
    for index in indexes:
        corpora = index.manifest.corpora
        ends = [corpus.first_record for corpus in corpora[1:]] + [records_of(index)]
        for corpus, end in zip(corpora, ends, strict=True):
            if sum(_may_be_same(corpus, entry) for entry in entries) < 2:
                continue
            places = {
                (record - corpus.first_record, window): shard.first_row + row
                for shard in index.shards
                for row, (record, window) in enumerate(zip(shard.records.tolist(), shard.windows.tolist(), strict=True))
                if corpus.first_record <= record < end
            }
            for other, entry, theirs in held:
                shared = sorted(places.keys() & theirs.keys()) if _may_be_same(corpus, entry) else []
                found = f"{len(shared)}"
                if shared and corpus.digest != entry.digest:
                    shared = shared[:: -(-len(shared) // _COMPARED)]
                    mine, known = ([of[place] for place in shared] for of in (places, theirs))
                    shared = _alike(index.some_examples(mine), other.some_examples(known))
                    found = f"{len(shared)} or more"
                if shared:
                    raise OptionError(
                        f"{index.path}: {found} of its examples are those of {other.path} too (corpus "
                        f"{abridged(corpus.source)}), and would count twice; leave one out, or `trackstar remove` them"
                    )
            held.append((index, corpus, places))


def _may_be_same(one: CorpusEntry, other: CorpusEntry) -> bool:
    """Whether two corpora are one, or read with another limit or by other fields could be."""
    read = [(entry.text_field, entry.id_field, entry.limit) for entry in (one, other)]
    return one.digest == other.digest or (one.source == other.source and read[0] != read[1])


def _alike(some: Sequence[StoredExample], others: Sequence[StoredExample]) -> list[str]:
    """Names of examples with the tokens of those in the same place among others."""
    pairs = zip(some, others, strict=True)
    return [a.example.example_id for a, b in pairs if np.array_equal(a.example.token_ids, b.example.token_ids)]


def records_of(index: Index) -> int:
    """How many records an index's corpora have together."""
    completion = index.manifest.completion
    assert completion is not None, "an open index is finished"
    return completion.records
