"""Detect examples that would be indexed twice when indexes are extended or merged.

An example indexed twice would count twice in R_train and in rankings. A corpus is identified by its
digest. The same corpus read with another limit or other fields has another digest, so these are
compared as well. Whether different corpora share texts is not checked.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from trackstar.corpus import Corpus
from trackstar.errors import CorpusError, OptionError
from trackstar.store import CorpusEntry, Index, StoredExample
from trackstar.text import abridged

# Examples compared between two corpora that may be the same.
_COMPARED_EXAMPLES = 64


def check_new(index: Index, corpus: Corpus, entry: CorpusEntry) -> None:
    """Raise if an index already contains a corpus.

    Args:
        index: The index.
        corpus: The corpus. It is read once for each other limit and choice of fields among the
            index's corpora.
        entry: The corpus's entry in a manifest.

    Raises:
        OptionError: The index contains the corpus.
    """
    if any(_is_same_corpus(indexed, corpus, entry) for indexed in index.manifest.corpora):
        raise OptionError(
            f"`data`: {index.path} already contains {corpus.name}, whose examples would count twice; pass only new "
            "examples"
        )


def _is_same_corpus(indexed: CorpusEntry, corpus: Corpus, entry: CorpusEntry) -> bool:
    """Whether an indexed corpus is this one, also if it was read with another limit or other fields."""
    if (indexed.text_field, indexed.id_field, indexed.limit) == (entry.text_field, entry.id_field, entry.limit):
        return indexed.digest == entry.digest
    reread = dataclasses.replace(corpus, text_field=indexed.text_field, id_field=indexed.id_field, limit=indexed.limit)
    try:
        return reread.digest() == indexed.digest
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
    settings = [(entry.text_field, entry.id_field, entry.limit) for entry in (one, other)]
    return one.digest == other.digest or (one.source == other.source and settings[0] != settings[1])


def _equal_examples(some: Sequence[StoredExample], others: Sequence[StoredExample]) -> list[str]:
    """Ids of the examples whose tokens equal those of the example at the same position among the others."""
    pairs = zip(some, others, strict=True)
    return [a.example.example_id for a, b in pairs if np.array_equal(a.example.token_ids, b.example.token_ids)]


def record_count(index: Index) -> int:
    """Number of records in all corpora of an index, skipped records included."""
    completion = index.manifest.completion
    assert completion is not None, "an open index is finished"
    return completion.records
