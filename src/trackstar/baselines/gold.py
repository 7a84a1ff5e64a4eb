"""The ground truth as a method: examples known to state a fact rank first (paper, Table 1)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.baselines.interface import Pool
from trackstar.corpus import Query
from trackstar.errors import CorpusError


class GoldRetriever:
    """Gold examples in the given order, then all other candidates, which score 0.

    The j-th of n gold examples, counted from 0, scores 1 - j/(2n): the first scores 1, and all
    score above ½.

    Args:
        pool: The candidates.
        gold: Query id to the ids of its gold examples, the best first.

    Raises:
        CorpusError: A gold example is not in the pool, or is named twice for a query.
    """

    name = "gold"

    def __init__(self, pool: Pool, gold: Mapping[str, Sequence[str]]) -> None:
        self._candidates = len(pool)
        self._rows = {query_id: _rows(pool, query_id, example_ids) for query_id, example_ids in gold.items()}

    def scores(self, queries: Sequence[Query]) -> Float[Tensor, "queries candidates"]:
        """See `Retriever.scores`.

        Raises:
            CorpusError: The gold examples of a query were not given; the message names the query.
        """
        scores = torch.zeros(len(queries), self._candidates)
        for number, query in enumerate(queries):
            rows = self._rows.get(query.query_id)
            if rows is None:
                raise CorpusError(f"query {query.query_id}: no entry in `gold`; add its gold examples or leave it out")
            scores[number, rows] = 1 - torch.arange(len(rows)) / (2 * max(len(rows), 1))
        return scores


def _rows(pool: Pool, query_id: str, example_ids: Sequence[str]) -> list[int]:
    for example_id in example_ids:
        if example_id not in pool.row_of:
            raise CorpusError(
                f"query {query_id}: gold example {example_id} is not in the pool; expected all gold examples there"
            )
    if len(set(example_ids)) < len(example_ids):
        raise CorpusError(f"query {query_id}: names a gold example twice; expected each once")
    return [pool.row_of[example_id] for example_id in example_ids]
