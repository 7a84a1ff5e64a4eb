"""How good a ranking is: metrics against known gold examples, with intervals over queries."""

from trackstar.evaluation.attribution import Attribution, attribution, gold_ranks

__all__ = ["Attribution", "attribution", "gold_ranks"]
