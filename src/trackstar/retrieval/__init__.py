"""Scores of candidates, the top k, and re-ranking from recomputed gradients (Eq. 1).

In: an index and one vector per query. Out: the k most positive and most negative candidates of each
query.
"""
