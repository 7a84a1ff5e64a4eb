"""What the proponents of answers share with their questions, against what a random training sum shares."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from trackstar.attribution.results import QueryResult
from trackstar.attribution.terminal import print_line, print_table
from trackstar.demo.arithmetic import CARRY, PROPERTIES, Sum, Sums, number_in, shared_with
from trackstar.demo.common import interval, signed_interval
from trackstar.evaluation.comparisons import Estimate, estimate

Verdict = Literal["more", "less", "unclear"]

FEWEST_EXPECTED = 5
"""Expected number of proponents with a property from which on fewer are called less than chance."""


_WORDS: Mapping[Verdict, str] = {
    "more": "more often than",
    "less": "less often than",
    "unclear": "neither more nor less often, as far as the interval shows, than",
}


def verdict_on(difference: Estimate) -> Verdict:
    """Whether the 95% interval of a difference lies above 0, below 0, or includes it."""
    return "more" if difference.low > 0 else "less" if difference.high < 0 else "unclear"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """The proponents of one answer to a sum.

    Attributes:
        asked: The sum.
        answer: The number that is explained; None if the answer is not a number.
        result: The answer's proponents.
    """

    asked: Sum
    answer: int | None
    result: QueryResult

    @classmethod
    def of(cls, result: QueryResult, asked: Sum) -> "Explained":
        """The result of a query for a sum, with the number in its completion."""
        return cls(asked=asked, answer=number_in(result.query.completion), result=result)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedAnswers:
    """Explained answers to the held-out sums.

    Attributes:
        right: The model's right answers.
        wrong: The model's wrong answers.
        truth: The true answers to the sums of `wrong`, in the same order.
    """

    right: tuple[Explained, ...]
    wrong: tuple[Explained, ...]
    truth: tuple[Explained, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """How often proponents share one property with their question, over questions.

    Attributes:
        share: Share of the proponents that do.
        chance: Share of all training sums that do, which is expected of a random training sum.
        lift: Share divided by chance; None if no training sum has the property.
        difference: Share minus chance.
        expected: Number of proponents that would have the property by chance, over all questions.
    """

    share: Estimate
    chance: float
    lift: float | None
    difference: Estimate
    expected: float

    @property
    def verdict(self) -> Verdict:
        """Whether proponents share the property more often than a random training sum.

        It is never `less` if fewer than `FEWEST_EXPECTED` proponents would have the property by chance.
        Then none may have it by chance alone, and the bootstrap interval, of zeros, would have no width.
        """
        found = verdict_on(self.difference)
        return "unclear" if found == "less" and self.expected < FEWEST_EXPECTED else found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SharedTables:
    """What proponents share with their questions, by property; empty without such answers.

    Attributes:
        right: Proponents of right answers.
        wrong: Proponents of wrong answers.
        truth: Proponents of the true answers to the same sums.
        wrong_against_truth: Share minus chance for wrong answers, minus the same for the true ones.
            Chance is subtracted because it depends on the answer for properties of the result.
    """

    right: Mapping[str, Shared]
    wrong: Mapping[str, Shared]
    truth: Mapping[str, Shared]
    wrong_against_truth: Mapping[str, Estimate]


def tables_of(answers: ExplainedAnswers, sums: Sums) -> SharedTables:
    """Compare what proponents share with their questions with what all training sums share with them."""
    right, wrong, truth = (_shares(group, sums) for group in (answers.right, answers.wrong, answers.truth))
    against = {}
    for name in wrong:
        one, other = (shares[name].proponents - shares[name].chance for shares in (wrong, truth))
        against[name] = estimate(one - other)
    return SharedTables(
        right={name: share.compared() for name, share in right.items()},
        wrong={name: share.compared() for name, share in wrong.items()},
        truth={name: share.compared() for name, share in truth.items()},
        wrong_against_truth=against,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Shares:
    """Per question, the shares of its proponents and of all training sums that have a property.

    `expected` is the number of its proponents that would have it by chance.
    """

    proponents: Float[np.ndarray, "questions"]
    chance: Float[np.ndarray, "questions"]
    expected: Float[np.ndarray, "questions"]

    def compared(self) -> Shared:
        share, chance = estimate(self.proponents), float(self.chance.mean())
        return Shared(
            share=share,
            chance=chance,
            lift=share.mean / chance if chance else None,
            difference=estimate(self.proponents - self.chance),
            expected=float(self.expected.sum()),
        )


def _shares(explained: Sequence[Explained], sums: Sums) -> dict[str, _Shares]:
    """Shares by property; none without an answer."""
    if not explained:
        return {}
    rows = {one.name: row for row, one in enumerate(sums.training)}
    tops = [[rows[ranked.example_id] for ranked in one.result.proponents] for one in explained]
    shared = [shared_with(one.asked, one.answer, sums.training) for one in explained]
    counts = np.array([len(top) for top in tops])
    shares = {}
    for name in PROPERTIES:
        chance = np.array([of_all[name].mean() for of_all in shared])
        proponents = np.array([of_all[name][top].mean() for of_all, top in zip(shared, tops, strict=True)])
        shares[name] = _Shares(proponents=proponents, chance=chance, expected=chance * counts)
    return shares


def print_tables(tables: SharedTables) -> None:
    """Print the tables, and below each what its intervals show."""
    print_line(
        "   chance: share expected of a random training sum; lift: share / chance; 95% intervals over questions,"
    )
    print_line("   not corrected for the number of rows; a training sum can count in several rows; unclear: includes 0")
    if tables.right:
        _print_right(tables.right)
    else:
        print_line("   The model gives no right answer to explain.")
    if tables.wrong:
        _print_wrong(tables)
    else:
        print_line("   The model gives no wrong answer to explain.")


def _print_right(table: Mapping[str, Shared]) -> None:
    print_line(f"Right answers, {_questions(table)}:")
    rows = [
        (name, interval(row.share), f"{row.chance:.4f}", _lift(row), signed_interval(row.difference), row.verdict)
        for name, row in table.items()
    ]
    header = ("shared with a + b", "share (95% interval)", "chance", "lift", "share - chance (95%)", "than chance")
    print_table(header, rows)
    carry = table[CARRY]
    print_line(
        f"Proponents of right answers share the carry {_WORDS[carry.verdict]} a random sum does: "
        f"{signed_interval(carry.difference)}."
    )


def _print_wrong(tables: SharedTables) -> None:
    print_line(f"Wrong answers, {_questions(tables.wrong)}: the model's own answer beside the true one")
    rows = []
    for name, own in tables.wrong.items():
        pair = (own, tables.truth[name])
        rows.append((name, *(cell for row in pair for cell in (interval(row.share), f"{row.chance:.4f}", _lift(row)))))
    header = ("shared with a + b", "own answer (95%)", "chance", "lift", "true answer (95%)", "chance", "lift")
    print_table(header, rows)
    print_line("The same beyond chance (share - chance), and own answer minus true answer:")
    rows = [
        (
            name,
            *(f"{row.difference.mean:+z.3f} ({row.verdict})" for row in (tables.wrong[name], tables.truth[name])),
            signed_interval(difference),
            verdict_on(difference),
        )
        for name, difference in tables.wrong_against_truth.items()
    ]
    header = ("shared with a + b", "own - chance", "true - chance", "own - true (95%)", "own than true")
    print_table(header, rows)
    carry = tables.wrong_against_truth[CARRY]
    print_line(
        f"Proponents of wrong answers share the carry {_WORDS[verdict_on(carry)]} those of the true answers do: "
        f"{signed_interval(carry)}."
    )


def _questions(table: Mapping[str, Shared]) -> str:
    return f"{next(iter(table.values())).share.queries:,} questions"


def _lift(row: Shared) -> str:
    return "-" if row.lift is None else f"{row.lift:.1f}"
