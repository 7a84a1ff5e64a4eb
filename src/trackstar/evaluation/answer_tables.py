"""Tables of the model's own answers: how often they are right, and what is behind the wrong ones (§7.1 and
Appendix A.5).
"""

import math

import numpy as np

from trackstar.choices import KINDS
from trackstar.evaluation.categories import CATEGORIES
from trackstar.evaluation.comparisons import estimate
from trackstar.evaluation.release_results import WRONG_ANSWERS_FILE
from trackstar.evaluation.run import EvaluationReport
from trackstar.evaluation.table import Table, number


def table_of_wrong_answers(report: EvaluationReport) -> Table | None:
    """TrackStar's proponents of wrong answers and of the correct ones (§7.1)."""
    if not report.wrong_answers:
        return None
    pairs = [wrong.categories for wrong in report.wrong_answers.values() if wrong.categories is not None]
    of_correct = [category for categories, _ in pairs for category in categories]
    of_wrong = [category for _, categories in pairs for category in categories]
    by_names = CATEGORIES[1:]
    rows = [
        (label, *(f"{categories.count(category) / len(categories):.1%}" for category in by_names))
        for label, categories in (("the correct answer", of_correct), ("the model's answer", of_wrong))
        if categories
    ]
    return Table(
        name="wrong-answers", title="TrackStar's proponents of wrong answers and of the correct ones (§7.1)",
        header=("proponents of", *by_names), rows=tuple(rows),
        note=f"{len(pairs)} queries that the model answers incorrectly. "
        "The entities of a wrong answer are the subject and the model's answer.",
    )  # fmt: skip


def table_of_answers(report: EvaluationReport) -> Table:
    """Accuracy of the model's own answers, by kind of question and task."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, fact in enumerate(report.facts):
        groups.setdefault((fact.kind, "" if fact.kind == "fact" else fact.relation), []).append(place)
    rows = []
    for (kind, task), numbers in groups.items():
        right = report.correct[numbers].astype(np.float64)
        accuracy = "no right answer" if kind == "open" else _share(int(right.sum()), len(right))
        count = "" if kind == "open" else f"{int(right.sum()):,}"
        rows.append((kind, task if task != kind else "", f"{len(numbers):,}", count, accuracy))
    return Table(
        name="answers", title="The model's own answers (Appendix A.5)",
        header=("kind", "task", "questions", "right", "accuracy"), rows=tuple(rows),
        note="A fact or a generation is right where the greedy answer begins with the right one; a choice where the "
        "right completion is more probable than every alternative. Intervals in brackets: 95% (Wilson's).",
    )  # fmt: skip


def _share(right: int, count: int) -> str:
    """A share with Wilson's 95% interval, which has a width also where all or none are right."""
    share, z = right / count, 1.959964
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return f"{share:.3f} ({max(0.0, centre - half):.3f}-{min(1.0, centre + half):.3f})"


def table_of_shared_proponents(report: EvaluationReport) -> Table | None:
    """How many proponents a wrong answer and the right one have in common, by kind."""
    shared: dict[str, list[float]] = {}
    for place, wrong in report.wrong_answers.items():
        shared.setdefault(report.facts[place].kind, []).append(wrong.shared)
    rows = [
        (kind, f"{len(shared[kind]):,}", number(estimate(np.array(shared[kind])))) for kind in KINDS if kind in shared
    ]
    k = min(report.config.top_k, report.candidates)
    return Table(
        name="shared-proponents", title="Proponents that a wrong answer shares with the right one",
        header=("kind", "wrong answers", f"share of the first {k}"), rows=tuple(rows),
        note="TrackStar's proponents of the model's wrong answer that are among as many of the right one. "
        f"{WRONG_ANSWERS_FILE} has the rankings of the wrong answers, to open beside those of the right ones. "
        "Intervals in brackets: 95%, bootstrap over questions.",
    )  # fmt: skip
