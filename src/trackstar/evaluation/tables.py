"""The paper's tables from a report: Tables 1, 2, A.3, A.5, A.6 and A.7, with intervals and paired tests.

What a table holds is apart from how it is written: a `Table` is cells as text, and Markdown and CSV are made from it.
"""

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float64

from trackstar.baselines.gradients import EXPERIMENTS, ONE_SIDED, TRACKSTAR
from trackstar.evaluation.categories import CATEGORIES
from trackstar.evaluation.comparisons import Estimate, compare, estimate
from trackstar.evaluation.entailment import THRESHOLD
from trackstar.evaluation.open_set import open_set_metrics
from trackstar.evaluation.rankings import Ranking
from trackstar.evaluation.run import EvaluationReport
from trackstar.evaluation.variants import checkpoint_name

OURS = "TrackStar"

TABLE_2 = (
    "gold",
    "random",
    "BM25",
    "embeddings",
    "TRAK",
    "TRAK, R over tokens",
    "experiment 1",
    "experiment 2",
    "TrackStar",
)
_NAMES = {"experiment 1": "gradient dot product", "experiment 2": "gradient cosine", "gold": "T-REx gold"}
"""What Table 2 calls two of Table 1's experiments."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table as text.

    Attributes:
        name: A short name, for files.
        title: What it shows, and of which table of the paper it has the structure.
        header: The columns' titles.
        rows: The cells.
        note: What must be known to read it.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def to_markdown(self) -> str:
        """The table with its title and note."""
        lines = [f"### {self.title}", "", _row(self.header), _row(["---"] * len(self.header))]
        lines += [_row(row) for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])

    def to_csv(self) -> str:
        """Header and rows."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        return text.getvalue()


def tables(report: EvaluationReport) -> list[Table]:
    """Every table that the report has the methods for."""
    made = [
        _table_1(report),
        _main_table(report, "table-2", "Methods side by side (Table 2)", TABLE_2, None),
        _main_table(
            report, "table-a3", "Output functions (Table A.3)", (OURS, "TrackStar, margin", "TrackStar, logit"), None
        ),
        _table_a5(report),
        _table_a6(report),
        _table_of_learning_rates(report),
        _main_table(report, "table-a7-right", "Queries that the model answers right (Table A.7)", None, report.correct),
        _main_table(report, "table-a7-wrong", "Queries that it answers wrong (Table A.7)", None, ~report.correct),
        _figure_2(report, "figure-2", "TrackStar by the side of its projections (Figure 2)", "side"),
        _figure_2(report, "figure-2-checkpoints", "TrackStar by checkpoint (Figure 2)", "checkpoint"),
        _table_of_open_set(report),
        _table_of_categories(report),
        _table_of_wrong_answers(report),
    ]
    return [table for table in made if table is not None and table.rows]


def _table_1(report: EvaluationReport) -> Table | None:
    methods = [m for m in (*EXPERIMENTS, TRACKSTAR) if m.name in report.config.methods]
    base = _main_table(report, "table-1", "What each correction adds (Table 1)", [m.name for m in methods], None)
    if base is None:
        return None
    marks = [
        (
            "yes" if m.second_moment else "",
            {"none": "", "train": "R_train", "task": "mixed"}[m.correction],
            "yes" if m.unit_norm else "",
        )
        for m in methods
    ]
    rows = tuple((row[0], *mark, *row[1:]) for row, mark in zip(base.rows, marks, strict=True))
    return dataclasses.replace(base, header=(base.header[0], "V", "R", "unit norm", *base.header[1:]), rows=rows)


def _main_table(
    report: EvaluationReport,
    name: str,
    title: str,
    methods: Sequence[str] | None,
    which: Bool[np.ndarray, "facts"] | None,
) -> Table | None:
    """MRR, recall, precision and tail-patch of some methods over some queries, each against TrackStar."""
    shown = [m for m in (report.config.methods if methods is None else methods) if m in report.config.methods]
    chosen = np.ones(len(report.facts), dtype=bool) if which is None else which
    if len(shown) < 2 or not chosen.any():
        return None
    header = ["method", "MRR", "recall@10", "precision@10"]
    k = _main_k(report)
    if k:
        header.append(f"tail-patch, top {k} (%)")
    rows = []
    for method in shown:
        cells = [_NAMES.get(method, method) if name == "table-2" else _label(report, method)]
        cells += [
            _cell(report, method, lambda m, metric=metric: _metric(report, m, metric)[chosen])
            for metric in ("reciprocal_rank", "recall", "precision")
        ]
        if k:
            cells.append(_cell(report, method, lambda m: _tail_patch(report, m, k, chosen), percent=True))
        rows.append(tuple(cells))
    return Table(name=name, title=title, header=tuple(header), rows=tuple(rows), note=_note(report, chosen))


def _table_a5(report: EvaluationReport) -> Table | None:
    templates = report.config.templates
    if len(templates) < 2:
        return None
    rows = []
    for method in report.config.methods:
        cells = [
            _number(estimate(report.rankings[method, template].metrics().reciprocal_rank)) for template in templates
        ]
        rows.append((_label(report, method), *cells))
    header = ("method", *(f"MRR, template {template}" for template in templates))
    return Table(
        name="table-a5", title="Prompt templates (Table A.5)", header=header, rows=tuple(rows),
        note=_note(report, dagger=False, effects=False),
    )  # fmt: skip


def _table_a6(report: EvaluationReport) -> Table | None:
    if report.effects is None:
        return None
    asked = report.config.tail_patch
    assert asked is not None
    methods = asked.methods or report.config.methods
    everything = np.ones(len(report.facts), dtype=bool)
    rows = [
        (
            _label(report, method),
            *(
                _cell(report, method, lambda m, k=k: _tail_patch(report, m, k, everything), percent=True)
                for k in asked.top_k
            ),
        )
        for method in methods
    ]
    return Table(
        name="table-a6",
        title="Tail-patch by the number of proponents (Table A.6)",
        header=("method", *(f"top {k} (%)" for k in asked.top_k)),
        rows=tuple(rows),
        note=f"Over {len(report.effects.queries)} queries. The training step: {report.effects.step}. {_dagger(report)}",
    )


def _table_of_learning_rates(report: EvaluationReport) -> Table | None:
    if report.effects is None or not report.effects.by_learning_rate:
        return None
    found = report.effects.by_learning_rate
    methods = list(dict.fromkeys(method for method, _ in found))
    rates = list(dict.fromkeys(rate for _, rate in found))
    rows = [
        (method, *(_cell(report, method, lambda m, rate=rate: found.get((m, rate)), percent=True) for rate in rates))
        for method in methods
    ]
    return Table(
        name="tail-patch-steps",
        title=f"Tail-patch by the step's learning rate, top {_main_k(report)}",
        header=("method", *(f"{rate:g} (%)" for rate in rates)), rows=tuple(rows),
        note=f"Over {len(report.effects.queries)} queries; all other tables have the first rate. {_dagger(report)}",
    )  # fmt: skip


def _figure_2(report: EvaluationReport, name: str, title: str, column: str) -> Table | None:
    """MRR, recall and tail-patch of TrackStar's variants, the report's own among them."""
    variants = report.variants
    found: dict[str, Ranking] = (
        {str(side): ranking for side, ranking in sorted(variants.by_side.items())}
        if column == "side"
        else dict(variants.by_checkpoint)
    )
    own = str(report.config.side[0]) if column == "side" else checkpoint_name(report.config.model)
    labels = {label: OURS if label == own else f"{OURS}, {'side ' * (column == 'side')}{label}" for label in found}
    if found and column == "side" and ONE_SIDED.name in report.config.methods:
        one_sided = f"{min(variants.by_side)}, one-sided"
        found[one_sided] = report.rankings[ONE_SIDED.name, report.config.templates[0]]
        labels[one_sided] = ONE_SIDED.name
    k = _main_k(report)
    everything = np.ones(len(report.facts), dtype=bool)
    rows = []
    for label, ranking in found.items():
        metrics = ranking.metrics()
        cells = [label, _number(estimate(metrics.reciprocal_rank)), _number(estimate(metrics.recall))]
        if k:
            values = _tail_patch(report, labels[label], k, everything)
            cells.append("" if values is None else _number(estimate(values), percent=True))
        rows.append(tuple(cells))
    header = (column, "MRR", "recall@10", *((f"tail-patch, top {k} (%)",) if k else ()))
    note = _note(report, dagger=False)
    if column == "checkpoint":
        note += " V is each checkpoint's own, estimated where it has no optimizer state."
    return Table(name=name, title=title, header=header, rows=tuple(rows), note=note)


def _table_of_open_set(report: EvaluationReport) -> Table | None:
    judgements = report.judgements
    if judgements is None:
        return None
    template = report.config.templates[0]
    at = min(report.config.top_k, report.candidates)
    found = {m: open_set_metrics(report.rankings[m, template], judgements, at=at) for m in report.config.methods}
    rows = [
        (method, *(_cell(report, method, lambda m, part=part: found[m][part]) for part in (0, 1)))
        for method in report.config.methods
    ]
    k = report.config.top_k
    return Table(
        name="open-set", title="Open-set evaluation: proponents that entail the fact (§5.1)",
        header=("method", f"MRR among the first {k}", f"precision@{k}"), rows=tuple(rows),
        note=f"Entailment by {report.config.entailment_model}, windows of three sentences, above {THRESHOLD:g}. "
        + _note(report, effects=False),
    )  # fmt: skip


def _table_of_categories(report: EvaluationReport) -> Table | None:
    rows = []
    for method, by_fact in report.categories.items():
        flat = [category for categories in by_fact for category in categories]
        if flat:
            rows.append(
                (_label(report, method), *(f"{flat.count(category) / len(flat):.1%}" for category in CATEGORIES))
            )
    return Table(
        name="figure-3", title=f"What the top {report.config.top_k} proponents are (Figure 3)",
        header=("method", *CATEGORIES), rows=tuple(rows),
        note="Gold examples stand for those that entail the fact: no entailment model is used."
        if report.judgements is None
        else f"Entailment by {report.config.entailment_model}.",
    )  # fmt: skip


def _table_of_wrong_answers(report: EvaluationReport) -> Table | None:
    """§7.1: TrackStar's proponents for what the model wrongly said, beside those for the truth."""
    if not report.wrong_answers:
        return None
    for_truth = [category for found, _ in report.wrong_answers.values() for category in found]
    for_answer = [category for _, found in report.wrong_answers.values() for category in found]
    by_names = CATEGORIES[1:]
    rows = [
        (label, *(f"{found.count(category) / len(found):.1%}" for category in by_names))
        for label, found in (("the truth", for_truth), ("the model's answer", for_answer))
        if found
    ]
    return Table(
        name="wrong-answers", title="Wrong answers: TrackStar's proponents for them and for the truth (§7.1)",
        header=("proponents of", *by_names), rows=tuple(rows),
        note=f"Over {len(report.wrong_answers)} queries that the model answers wrong. "
        "A wrong answer's entities are the subject and what the model said.",
    )  # fmt: skip


def _metric(report: EvaluationReport, method: str, metric: str) -> Float64[np.ndarray, "facts"]:
    return getattr(report.rankings[method, report.config.templates[0]].metrics(), metric)


def _tail_patch(
    report: EvaluationReport, method: str, k: int, chosen: Bool[np.ndarray, "facts"]
) -> Float64[np.ndarray, "queries"] | None:
    effects = report.effects
    if effects is None or (method, k) not in effects.by_method:
        return None
    return effects.by_method[method, k][chosen[list(effects.queries)]]


def _main_k(report: EvaluationReport) -> int:
    """The paper's tables average over the top 10; fewer where fewer were measured."""
    return max(report.config.tail_patch.top_k) if report.config.tail_patch else 0


def _cell(
    report: EvaluationReport,
    method: str,
    values_of: Callable[[str], Float64[np.ndarray, "queries"] | None],
    *,
    percent: bool = False,
) -> str:
    values = values_of(method)
    if values is None or not len(values):
        return ""
    text = _number(estimate(values), percent=percent)
    ours = values_of(OURS) if OURS in report.config.methods and method != OURS else None
    if ours is not None:
        p_value = compare(values, ours).p_value
        text += " †" if p_value < 0.05 else ""
    return text


def _number(found: Estimate, *, percent: bool = False) -> str:
    if found.queries == 1:  # one query tells nothing of others
        return f"{100 * found.mean:+.2f} (one query)" if percent else f"{found.mean:.3f} (one query)"
    if percent:
        return f"{100 * found.mean:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"
    return f"{found.mean:.3f} ({found.low:.3f}-{found.high:.3f})"


def _note(
    report: EvaluationReport,
    chosen: Bool[np.ndarray, "facts"] | None = None,
    *,
    dagger: bool = True,
    effects: bool = True,
) -> str:
    """What a table is over, and how to read its cells."""
    which = np.ones(len(report.facts), dtype=bool) if chosen is None else chosen
    gold = "examples that plainly state the fact" if report.config.strict else "gold examples"
    measured = ""
    if effects and report.effects is not None:
        measured = f", tail-patch over {int(which[list(report.effects.queries)].sum()):,} of them"
    return (
        f"{int(which.sum()):,} queries over {report.candidates:,} candidates, right are {gold}{measured}. In brackets: "
        f"95% intervals over queries (bootstrap). {_dagger(report) if dagger else ''}"
    ).strip()


def _dagger(report: EvaluationReport) -> str:
    if OURS not in report.config.methods:
        return ""
    return f"†: differs from {OURS} (paired sign-flip test, p < 0.05, not corrected for many tests)."


def _label(report: EvaluationReport, method: str) -> str:
    """A method's name, with its side where that is not the other methods'."""
    sides = report.config.side
    return f"{method} (side {min(sides)})" if method == ONE_SIDED.name and min(sides) < sides[0] else method


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
