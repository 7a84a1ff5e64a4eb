"""Categories of proponents of facts (Figure 3), and proponents of the model's wrong answers beside those of
the right ones (§7.1).
"""

import dataclasses
from collections.abc import Mapping, Sequence

from trackstar.evaluation.categories import Category, proponent_category
from trackstar.evaluation.config import EvaluationConfig
from trackstar.evaluation.entailment import THRESHOLD
from trackstar.evaluation.facts import Fact
from trackstar.evaluation.open_set import Judgements
from trackstar.evaluation.own_answers import OwnAnswers, wrong_fact
from trackstar.evaluation.rankings import Ranking, Rankings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WrongAnswer:
    """A wrong answer, and TrackStar's proponents of it.

    No example is known to entail a wrong answer. So categories are by names only, of both sides, each
    by those of its own object.

    Attributes:
        completion: The part of the model's answer that is traced; of a choice, the preferred alternative.
        rows: Rows of the first k candidates.
        scores: Their influences.
        shared: Share of these that are among the first k for the right answer, too.
        categories: Of a fact: the categories of the proponents of the right answer, and of this one;
            None for another kind.
    """

    completion: str
    rows: tuple[int, ...]
    scores: tuple[float, ...]
    shared: float
    categories: tuple[tuple[Category, ...], tuple[Category, ...]] | None


def proponent_categories(
    ranking: Ranking, facts: Sequence[Fact], rankings: Rankings, judgements: Judgements | None
) -> tuple[tuple[Category, ...], ...]:
    """Categories of a method's proponents, per fact; without judgements, gold examples entail their fact.

    A question of another kind has no entities, and so no categories.
    """
    pool = rankings.pool

    def entails(number: int, row: int) -> bool:
        if judgements is None:
            return pool.example_ids[row] in facts[number].gold
        return judgements[number, row] > THRESHOLD

    return tuple(
        tuple(proponent_category(fact, pool.texts[row], entails=entails(number, row)) for row in rows)
        if fact.kind == "fact"
        else ()
        for number, (fact, rows) in enumerate(zip(facts, ranking.rows, strict=True))
    )


def traced_wrong_answers(
    facts: Sequence[Fact],
    answers: OwnAnswers,
    main: Mapping[str, Ranking],
    rankings: Rankings,
    config: EvaluationConfig,
) -> dict[int, WrongAnswer]:
    """TrackStar's proponents of the model's wrong answers (§7.1).

    Args:
        facts: The questions.
        answers: The model's answers.
        main: Rankings by method.
        rankings: All methods, to rank for the wrong answers.
        config: Settings of the report.

    Returns:
        Number of a question with a wrong answer to its proponents.
    """
    if "TrackStar" not in config.methods:
        return {}
    wrong = {
        number: found
        for number, fact in enumerate(facts)
        if answers.judged[number] and not answers.correct[number]
        if (found := wrong_fact(fact, answers.texts[number], config.templates[0])) is not None
    }
    if not wrong:
        return {}
    traced = rankings.proponents_of_wrong_answers(list(wrong.values()), facts)

    def by_names(fact: Fact, rows: Sequence[int]) -> tuple[Category, ...]:
        return tuple(proponent_category(fact, rankings.pool.texts[row]) for row in rows)

    found = {}
    for (number, wrong_one), (rows, scores) in zip(wrong.items(), traced, strict=True):
        right_rows = main["TrackStar"].rows[number]
        found[number] = WrongAnswer(
            completion=wrong_one.object.name,
            rows=rows,
            scores=scores,
            shared=len({*rows} & {*right_rows}) / len(rows),
            categories=(by_names(facts[number], right_rows), by_names(wrong_one, rows))
            if facts[number].kind == "fact"
            else None,
        )
    return found
