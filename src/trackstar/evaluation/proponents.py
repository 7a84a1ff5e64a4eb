"""Categories of proponents of facts (Figure 3), and of the model's wrong answers to them (§7.1)."""

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
    """Categories of a method's proponents, per fact; without judgements, gold examples entail their fact."""
    pool = rankings.pool

    def entails(number: int, row: int) -> bool:
        if judgements is None:
            return pool.example_ids[row] in facts[number].gold
        return judgements[number, row] > THRESHOLD

    return tuple(
        tuple(proponent_category(fact, pool.texts[row], entails=entails(number, row)) for row in rows)
        for number, (fact, rows) in enumerate(zip(facts, ranking.rows, strict=True))
    )


def first_phrase(answer: str) -> str:
    """The part of a model's answer before the first punctuation mark."""
    return re.split(r"[.,;:!?\n]", answer.strip(" .,;:!?\n"), maxsplit=1)[0].strip()


def categories_of_wrong_answers(
    facts: Sequence[Fact],
    answers: Sequence[str],
    correct: Bool[np.ndarray, "facts"],
    main: Mapping[str, Ranking],
    rankings: Rankings,
    config: EvaluationConfig,
) -> dict[int, tuple[tuple[Category, ...], tuple[Category, ...]]]:
    """Categories of TrackStar's proponents of the correct answer and of the model's wrong answer (§7.1).

    No example is known to entail a wrong answer. So both sides are judged by names only, each by
    those of its own object.

    Args:
        facts: The facts.
        answers: The model's answers.
        correct: Whether each answer is correct.
        main: Rankings by method.
        rankings: All methods, to rank for the wrong answers.
        config: Settings of the report.

    Returns:
        Number of a fact with a wrong answer to the categories for the correct answer and for the
        wrong one.
    """
    if "TrackStar" not in config.methods:
        return {}
    phrases = [first_phrase(answer) for answer in answers]
    wrong = [number for number in range(len(facts)) if not correct[number] and phrases[number]]
    if not wrong:
        return {}
    wrong_facts = [
        dataclasses.replace(
            facts[number],
            object=Entity(name=phrases[number]),
            prompts=(facts[number].prompts[config.templates[0]],),
        )
        for number in wrong
    ]
    rows_of_wrong = rankings.proponents_of_wrong_answers(wrong_facts, facts)

    def by_names(fact: Fact, rows: Sequence[int]) -> tuple[Category, ...]:
        return tuple(proponent_category(fact, rankings.pool.texts[row]) for row in rows)

    return {
        number: (by_names(facts[number], main["TrackStar"].rows[number]), by_names(wrong_fact, rows))
        for number, wrong_fact, rows in zip(wrong, wrong_facts, rows_of_wrong, strict=True)
    }
