"""A random ranking: what a method must beat."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.baselines.interface import Pool
from trackstar.corpus import Query


class RandomRetriever:
    """A random order of the candidates, a function of the seed and the query's name alone.

    Args:
        pool: The candidates.
        seed: Of the orders; another one gives others.
    """

    name = "random"

    def __init__(self, pool: Pool, *, seed: int = 0) -> None:
        self._candidates = len(pool)
        self._seed = seed

    def scores(self, queries: Sequence[Query]) -> Float[Tensor, "queries candidates"]:
        """See `Retriever.scores`; the scores are the numbers from 0, in random order."""
        rows = [self._order(query.query_id) for query in queries]
        return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(len(queries), self._candidates))

    def _order(self, query_id: str) -> np.ndarray:
        key = f"trackstar random {self._seed}".encode()
        digest = hashlib.blake2b(query_id.encode("utf-8", "surrogatepass"), digest_size=16, key=key)
        return np.random.default_rng(int.from_bytes(digest.digest(), "big")).permutation(self._candidates)
