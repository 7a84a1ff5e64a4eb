"""Tail-patch: how one training step on one example changes the probability of a query's completion (paper, §5.2)."""

from trackstar.tail_patch.effects import Pair, TailPatch, mean_top_effect, top_effects
from trackstar.tail_patch.measure import tail_patch
from trackstar.tail_patch.step import TrainingStep

__all__ = ["Pair", "TailPatch", "TrainingStep", "mean_top_effect", "tail_patch", "top_effects"]
