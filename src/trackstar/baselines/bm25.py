"""BM25: lexical retrieval, the paper's strongest baseline for attribution (§5.1)."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.baselines.interface import Pool
from trackstar.corpus import Query, query_text
from trackstar.errors import OptionError

if TYPE_CHECKING:
    import bm25s


class BM25Retriever:
    """BM25 as Lucene defines it, with exact document lengths.

    This is "Lucene (accurate)" of Kamphuis et al., ECIR 2020. The score of a candidate d for a
    query q, with N candidates, n_t of which contain the word t, tf times in d:

        Σ_(t in q) ln(1 + (N - n_t + ½)/(n_t + ½)) · tf / (tf + k1·(1 - b + b·|d|/mean |d|))

    The query is prompt and completion. Words are runs of two or more letters, digits and
    underscores in lower case, without Lucene's 33 English stop words and without stemming; |d|
    counts the remaining words. A word that a query repeats counts each time.

    Args:
        pool: The candidates.
        k1: Saturation of repeated words: the higher, the more a repetition counts; the default of
            bm25s, 1.5.
        b: Strength of the length normalization, from 0 to 1; the default of bm25s, 0.75.
        progress: Whether progress is shown.

    Raises:
        OptionError: `k1` is negative, or `b` is not between 0 and 1.
    """

    name = "BM25"

    def __init__(self, pool: Pool, *, k1: float = 1.5, b: float = 0.75, progress: bool = True) -> None:
        if k1 < 0:
            raise OptionError(f"`k1`: expected 0 or more, found {k1}")
        if not 0 <= b <= 1:
            raise OptionError(f"`b`: expected 0 to 1, found {b}")
        self._candidates = len(pool)
        self._index: bm25s.BM25 | None = None
        shown = progress and sys.stderr.isatty()
        words: Any = _words(pool.texts, shown)
        if words.vocab:
            self._index = _index(words, k1, b, shown)

    def scores(self, queries: Sequence[Query]) -> Float[Tensor, "queries candidates"]:
        """See `Retriever.scores`; a candidate that shares no word with the query scores 0."""
        scores = np.zeros((len(queries), self._candidates), dtype=np.float32)
        if self._index is not None and queries:
            query_words: Any = _words([query_text(query) for query in queries], False)
            vocabulary = list(query_words.vocab)
            for row, ids in enumerate(query_words.ids):
                index_ids = self._index.get_tokens_ids([vocabulary[number] for number in ids])
                scores[row] = self._index.get_scores_from_ids(index_ids)
        return torch.from_numpy(scores)


def _words(texts: Sequence[str], shown: bool) -> Any:
    """Each text's words as numbers (`ids`), and the number of each word (`vocab`)."""
    import bm25s

    return bm25s.tokenize(list(texts), stopwords="en", show_progress=shown)


def _index(words: Any, k1: float, b: float, shown: bool) -> "bm25s.BM25":
    import bm25s

    index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
    index.index(words, create_empty_token=False, show_progress=shown)
    return index
