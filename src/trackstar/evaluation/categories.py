"""Categories of a fact's proponents (paper, Figure 3), from entailing the fact to sharing no word with it."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
from jaxtyping import Int64

from trackstar.corpus.matching import names_entity, shares_word
from trackstar.errors import OptionError
from trackstar.evaluation.entailment import THRESHOLD
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.frequency import frequency_bucket

Category = Literal["entails", "both entities", "one entity", "partial match", "neither"]

CATEGORIES: tuple[Category, ...] = get_args(Category)
"""By priority: a proponent belongs to the first category that fits."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CategoryShares:
    """Categories of the proponents of all facts in a frequency bucket.

    Attributes:
        bucket: Bucket of the facts' frequency; see `frequency_bucket`.
        facts: Number of facts in it.
        proponents: Number of their proponents.
        shares: Category to its share of the proponents, in the order of `CATEGORIES`; the shares
            sum to 1.
    """

    bucket: int
    facts: int
    proponents: int
    shares: Mapping[Category, float]


def proponent_category(fact: Fact, text: str, *, entails: bool = False) -> Category:
    """Category of a proponent; names are matched as in `trackstar.corpus.matching`.

    Args:
        fact: The fact.
        text: The proponent's text.
        entails: Whether a model judged that the text entails the fact, or the text is a gold
            example.

    Returns:
        `entails`; else `both entities` or `one entity`, if the text names subject and object or one
        of them by a name or an alias; else `partial match`, if it has a word of a name that is not
        a stop word; else `neither`.
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
    """Categories of proponents by the frequency of the fact in the training data (paper, Figure 3).

    Args:
        facts: The facts.
        proponents: Texts of each fact's proponents.
        entailment: Entailment score of each proponent, from 0 to 1; 1 and 0 if gold examples
            replace a model.
        frequencies: Frequency of each fact in the training data.
        threshold: Score above which a proponent entails its fact.

    Returns:
        One entry per bucket with at least one proponent, in the order of the buckets.

    Raises:
        OptionError: The arguments have different lengths.
    """
    if not len(facts) == len(proponents) == len(entailment) == len(frequencies):
        raise OptionError(
            f"`facts`, `proponents`, `entailment`, `frequencies`: expected the same length, found {len(facts)}, "
            f"{len(proponents)}, {len(entailment)}, {len(frequencies)}"
        )
    counts: dict[int, Counter[Category]] = defaultdict(Counter)
    members: Counter[int] = Counter()
    for fact, texts, scores, frequency in zip(facts, proponents, entailment, frequencies, strict=True):
        if len(texts) != len(scores):
            raise OptionError(
                f"fact {fact.fact_id}: expected one score per proponent, found {len(texts)} proponents and "
                f"{len(scores)} scores"
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
