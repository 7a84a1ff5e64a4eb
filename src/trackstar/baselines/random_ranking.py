"""A random ranking: the lower bound that a method must beat."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.baselines.interface import Pool
from trackstar.corpus import Query
from trackstar.corpus.digests import draw_bytes


class RandomRetriever:
    """A random order of the candidates; it depends on the seed and the query's id only.

    Args:
        pool: The candidates.
        seed: Seed of the orders.
    """

    name = "random"

    def __init__(self, pool: Pool, *, seed: int = 0) -> None:
        self._candidates = len(pool)
        self._seed = seed

    def scores(self, queries: Sequence[Query]) -> Float[Tensor, "queries candidates"]:
        """See `Retriever.scores`; the scores are the whole numbers from 0, in random order."""
        rows = [self._order(query.query_id) for query in queries]
        return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(queries), self._candidates))

    def _order(self, query_id: str) -> np.ndarray:
        drawn = draw_bytes(query_id.encode("utf-8", "surrogatepass"), key=f"trackstar random {self._seed}")
        return np.random.default_rng(int.from_bytes(drawn, "big")).permutation(self._candidates)
