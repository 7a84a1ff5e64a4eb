"""What a fact's proponents have to do with it (paper, Figure 3): from entailing it to sharing nothing with it."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int64

from trackstar.errors import OptionError
from trackstar.evaluation.entailment import THRESHOLD
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.frequency import frequency_bucket
from trackstar.evaluation.matching import names_entity, shares_word

Category = Literal["entails", "both entities", "one entity", "partial match", "neither"]

CATEGORIES: tuple[Category, ...] = get_args(Category)
"""In the order of priority: a proponent is of the first that fits."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CategoryShares:
    """What the proponents of a bucket's facts are.

    Attributes:
        bucket: Of the facts' frequency; see `frequency_bucket`.
        facts: How many facts are in it.
        proponents: How many proponents they have together.
        shares: Each category's share of the proponents, in the order of `CATEGORIES`; their sum is 1.
    """

    bucket: int
    facts: int
    proponents: int
    shares: Mapping[Category, float]


def proponent_category(fact: Fact, text: str, *, entails: bool = False) -> Category:
    """What a proponent has to do with its fact; names match as in `trackstar.evaluation.matching`.

    Args:
        fact: The fact.
        text: The proponent's text.
        entails: Whether a model judged that the text entails the fact, or it is a gold example.

    Returns:
        `entails`; else `both entities` or `one entity` where subject and object, or one of them, are named by name or
        alias; else `partial match` where any word of a name, but a stop word, is there; else `neither`.
    """
    if entails:
        return "entails"
    named = [names_entity(text, entity.names) for entity in (fact.subject, fact.object)]
    if any(named):
        return "both entities" if all(named) else "one entity"
    either = (*fact.subject.names, *fact.object.names)
    return "partial match" if shares_word(text, either) else "neither"


def category_shares(
    facts: Sequence[Fact],
    proponents: Sequence[Sequence[str]],
    entailment: Sequence[Sequence[float | int]],
    frequencies: Sequence[int] | Int64[np.ndarray, "facts"],
    *,
    threshold: float = THRESHOLD,
) -> list[CategoryShares]:
    """The proponents' categories by how often the training data hold the fact (paper, Figure 3).

    Args:
        facts: The facts.
        proponents: The texts of each fact's proponents.
        entailment: Each proponent's score of entailment, from 0 to 1; 1 and 0 where gold examples stand for it.
        frequencies: Each fact's frequency in the training data.
        threshold: Score above which a proponent entails its fact.

    Returns:
        One record a bucket that holds a proponent, in the order of the buckets.

    Raises:
        OptionError: There are not as many proponents, scores or frequencies as facts, or scores as proponents.
    """
    if not len(facts) == len(proponents) == len(entailment) == len(frequencies):
        raise OptionError(
            f"{len(facts)} facts, proponents of {len(proponents)}, scores of {len(entailment)} and frequencies of "
            f"{len(frequencies)}; expected as many of each"
        )
    counts: dict[int, Counter[Category]] = defaultdict(Counter)
    members: Counter[int] = Counter()
    for fact, texts, scores, frequency in zip(facts, proponents, entailment, frequencies, strict=True):
        if len(texts) != len(scores):
            raise OptionError(
                f"fact {fact.fact_id}: {len(texts)} proponents and {len(scores)} scores; expected one each"
            )
        bucket = frequency_bucket(int(frequency))
        members[bucket] += 1
        for text, score in zip(texts, scores, strict=True):
            counts[bucket][proponent_category(fact, text, entails=score > threshold)] += 1
    return [_shares(bucket, members[bucket], counts[bucket]) for bucket in sorted(counts)]


def _shares(bucket: int, facts: int, counts: Counter[Category]) -> CategoryShares:
    total = counts.total()
    shares: dict[Category, float] = {category: counts[category] / total for category in CATEGORIES}
    return CategoryShares(bucket=bucket, facts=facts, proponents=total, shares=shares)
