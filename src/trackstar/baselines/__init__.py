"""Rank candidates by the methods that TrackStar is compared with (paper, §5.1, Tables 1 and 2).

In: a pool of candidates, or an index, and queries. Out: a score of every candidate for every query.
No gradients: BM25, sentence embeddings, gold examples, a random order; from an index of gradients:
TrackStar without its parts, and TRAK.
"""

from trackstar.baselines.bm25 import BM25Retriever
from trackstar.baselines.embeddings import EmbeddingRetriever, Encoder, load_encoder
from trackstar.baselines.gold import GoldRetriever
from trackstar.baselines.interface import Pool, Retriever
from trackstar.baselines.random_ranking import RandomRetriever

__all__ = [
    "BM25Retriever",
    "EmbeddingRetriever",
    "Encoder",
    "GoldRetriever",
    "Pool",
    "RandomRetriever",
    "Retriever",
    "load_encoder",
]
