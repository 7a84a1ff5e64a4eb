"""What proponents have to do with their facts (Figure 3), and with what the model wrongly says instead (§7.1)."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool

from trackstar.evaluation.categories import Category, proponent_category
from trackstar.evaluation.config import EvaluationConfig
from trackstar.evaluation.entailment import THRESHOLD
from trackstar.evaluation.facts import Entity, Fact
from trackstar.evaluation.open_set import Judgements
from trackstar.evaluation.rankings import Ranking, Rankings


def proponent_categories(
    ranking: Ranking, facts: Sequence[Fact], rankings: Rankings, judgements: Judgements | None
) -> tuple[tuple[Category, ...], ...]:
    """Categories of a method's first proponents, by fact; without judgements gold examples are those that entail it."""
    pool = rankings.pool

    def entails(place: int, row: int) -> bool:
        if judgements is None:
            return pool.example_ids[row] in facts[place].gold
        return judgements[place, row] > THRESHOLD

    return tuple(
        tuple(proponent_category(fact, pool.texts[row], entails=entails(place, row)) for row in rows)
        for place, (fact, rows) in enumerate(zip(facts, ranking.rows, strict=True))
    )


def first_phrase(answer: str) -> str:
    """What the model said before it went on: up to the first mark of punctuation."""
    return re.split(r"[.,;:!?\n]", answer.strip(" .,;:!?\n"), maxsplit=1)[0].strip()


def categories_of_wrong_answers(
    facts: Sequence[Fact],
    answers: Sequence[str],
    correct: Bool[np.ndarray, "facts"],
    main: Mapping[str, Ranking],
    rankings: Rankings,
    config: EvaluationConfig,
) -> dict[int, tuple[tuple[Category, ...], tuple[Category, ...]]]:
    """TrackStar's proponents for the truth and for what the model wrongly said, each by its own fact's names (§7.1).

    No example is known to entail what is wrong, so that neither side's are judged by more than names.
    """
    if "TrackStar" not in config.methods:
        return {}
    said_first = [first_phrase(answer) for answer in answers]
    wrong = [n for n in range(len(facts)) if not correct[n] and said_first[n]]
    if not wrong:
        return {}
    said = [
        dataclasses.replace(
            facts[n],
            object=Entity(name=said_first[n]),
            prompts=(facts[n].prompts[config.templates[0]],),
        )
        for n in wrong
    ]
    ranking = rankings.ranking_of_answers(said, facts)

    def by_names(fact: Fact, rows: Sequence[int]) -> tuple[Category, ...]:
        return tuple(proponent_category(fact, rankings.pool.texts[row]) for row in rows)

    found = {}
    for place, (number, fact) in enumerate(zip(wrong, said, strict=True)):
        found[number] = (by_names(facts[number], main["TrackStar"].rows[number]), by_names(fact, ranking[place]))
    return found
