"""Tail-patch: how one training step changes the probability of a query's completion (paper, §5.2).

In: a model, a training step, and pairs of queries and proponents. Out: p(completion | prompt)
before and after one step on the proponent. `exact` makes the optimizer's step; `fast` computes the
same from low-rank factors.
"""

from trackstar.tail_patch.effects import Pair, TailPatch, mean_top_effect, top_effects
from trackstar.tail_patch.measure import tail_patch
from trackstar.tail_patch.step import TrainingStep

__all__ = ["Pair", "TailPatch", "TrainingStep", "mean_top_effect", "tail_patch", "top_effects"]
