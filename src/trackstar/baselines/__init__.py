"""Methods to compare with: each ranks the candidates of a pool for queries, whatever it ranks them by."""

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
