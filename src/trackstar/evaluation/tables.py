"""Tables of a report, as in the paper (Tables 1, 2, A.3, A.5, A.6, A.7), with intervals and paired tests.

`answer_tables.py` has those of the model's own answers.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float64

from trackstar.baselines.gradients import EXPERIMENTS, ONE_SIDED, TRACKSTAR
from trackstar.choices import KINDS
from trackstar.evaluation.answer_tables import table_of_answers, table_of_shared_proponents, table_of_wrong_answers
from trackstar.evaluation.categories import CATEGORIES
from trackstar.evaluation.comparisons import compare, estimate
from trackstar.evaluation.entailment import THRESHOLD
from trackstar.evaluation.open_set import open_set_metrics
from trackstar.evaluation.pool_sizes import POOL_KINDS
from trackstar.evaluation.rankings import Ranking
from trackstar.evaluation.run import EvaluationReport
from trackstar.evaluation.table import Table, number
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
_TABLE_2_NAMES = {"experiment 1": "gradient dot product", "experiment 2": "gradient cosine", "gold": "T-REx gold"}
"""Names of methods that differ in Table 2."""


def tables(report: EvaluationReport) -> list[Table]:
    """All tables that the report has results for."""
    made = [
        _table_1(report),
        _main_table(report, "table-2", "Comparison of methods (Table 2)", TABLE_2, None),
        _main_table(
            report, "table-a3", "Output functions (Table A.3)", (OURS, "TrackStar, margin", "TrackStar, logit"), None
        ),
        _table_a5(report),
        _table_a6(report),
        _table_of_learning_rates(report),
        table_of_answers(report),
        *_tables_a7(report),
        _figure_2(report, "figure-2", "TrackStar by side of the projections (Figure 2)", "side"),
        _figure_2(report, "figure-2-checkpoints", "TrackStar by checkpoint (Figure 2)", "checkpoint"),
        _table_of_pool_sizes(report, "table-pool-sizes", "MRR", "reciprocal_rank"),
        _table_of_pool_sizes(report, "table-pool-sizes-recall", "recall@10", "recall"),
        _table_of_open_set(report),
        _table_of_categories(report),
        table_of_wrong_answers(report),
        table_of_shared_proponents(report),
    ]
    return [table for table in made if table is not None and table.rows]


def _table_1(report: EvaluationReport) -> Table | None:
    methods = [m for m in (*EXPERIMENTS, TRACKSTAR) if m.name in report.config.methods]
    base = _main_table(report, "table-1", "Effect of each correction (Table 1)", [m.name for m in methods], None)
    if base is None:
        return None
    mixed = "mixed" if any(fact.kind == "fact" for fact in report.facts) else "R_train (λ = 0)"
    marks = [
        (
            "yes" if m.second_moment else "",
            {"none": "", "train": "R_train", "task": mixed}[m.correction],
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
    """MRR, recall, precision and tail-patch of some methods on some queries, each compared with TrackStar."""
    present = [m for m in (report.config.methods if methods is None else methods) if m in report.config.methods]
    chosen = np.ones(len(report.facts), dtype=bool) if which is None else which
    if len(present) < 2 or not chosen.any():
        return None
    metrics = ("reciprocal_rank", "recall", "precision") if (chosen & report.with_gold).any() else ()
    header = ["method", *("MRR", "recall@10", "precision@10")[: len(metrics)]]
    k = _main_k(report)
    if k:
        header.append(f"tail-patch, top {k} (%)")
    if len(header) == 1:
        return None
    rows = []
    for method in present:
        cells = [_TABLE_2_NAMES.get(method, method) if name == "table-2" else _label(report, method)]
        cells += [
            _cell(report, method, lambda m, metric=metric: _metric(report, m, metric, chosen)) for metric in metrics
        ]
        if k:
            cells.append(_cell(report, method, lambda m: _tail_patch(report, m, k, chosen), percent=True))
        rows.append(tuple(cells))
    return Table(name=name, title=title, header=tuple(header), rows=tuple(rows), note=_note(report, chosen))


def _table_a5(report: EvaluationReport) -> Table | None:
    templates = report.config.templates
    if len(templates) < 2 or not report.with_gold.any():
        return None
    rows = []
    for method in report.config.methods:
        cells = [
            number(estimate(report.rankings[method, template].metrics().reciprocal_rank)) for template in templates
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
    settings = report.config.tail_patch
    assert settings is not None
    methods = settings.methods or report.config.methods
    everything = np.ones(len(report.facts), dtype=bool)
    rows = [
        (
            _label(report, method),
            *(
                _cell(report, method, lambda m, k=k: _tail_patch(report, m, k, everything), percent=True)
                for k in settings.top_k
            ),
        )
        for method in methods
    ]
    return Table(
        name="table-a6",
        title="Tail-patch by number of proponents (Table A.6)",
        header=("method", *(f"top {k} (%)" for k in settings.top_k)),
        rows=tuple(rows),
        note=f"{len(report.effects.queries)} queries. Training step: {report.effects.step}. {_dagger(report)}",
    )


def _table_of_learning_rates(report: EvaluationReport) -> Table | None:
    if report.effects is None or not report.effects.by_learning_rate:
        return None
    effects = report.effects.by_learning_rate
    methods = list(dict.fromkeys(method for method, _ in effects))
    rates = list(dict.fromkeys(rate for _, rate in effects))
    rows = [
        (method, *(_cell(report, method, lambda m, rate=rate: effects.get((m, rate)), percent=True) for rate in rates))
        for method in methods
    ]
    return Table(
        name="tail-patch-steps",
        title=f"Tail-patch by learning rate of the training step, top {_main_k(report)}",
        header=("method", *(f"{rate:g} (%)" for rate in rates)), rows=tuple(rows),
        note=f"{len(report.effects.queries)} queries. All other tables use the first rate. {_dagger(report)}",
    )  # fmt: skip


def _figure_2(report: EvaluationReport, name: str, title: str, column: str) -> Table | None:
    """MRR, recall and tail-patch of TrackStar's variants, the report's own included."""
    variants = report.variants
    by_label: dict[str, Ranking] = (
        {str(side): ranking for side, ranking in sorted(variants.by_side.items())}
        if column == "side"
        else dict(variants.by_checkpoint)
    )
    main = str(report.config.side[0]) if column == "side" else checkpoint_name(report.config.model)
    names = {label: OURS if label == main else f"{OURS}, {'side ' * (column == 'side')}{label}" for label in by_label}
    if by_label and column == "side" and ONE_SIDED.name in report.config.methods:
        one_sided = f"{min(variants.by_side)}, one-sided"
        by_label[one_sided] = report.rankings[ONE_SIDED.name, report.config.templates[0]]
        names[one_sided] = ONE_SIDED.name
    k = _main_k(report)
    everything = np.ones(len(report.facts), dtype=bool)
    rows = []
    for label, ranking in by_label.items():
        metrics = ranking.metrics()
        cells = [label, *(number(estimate(v)) if len(v) else "" for v in (metrics.reciprocal_rank, metrics.recall))]
        if k:
            values = _tail_patch(report, names[label], k, everything)
            cells.append("" if values is None else number(estimate(values), percent=True))
        rows.append(tuple(cells))
    header = (column, "MRR", "recall@10", *((f"tail-patch, top {k} (%)",) if k else ()))
    note = _note(report, dagger=False)
    if column == "checkpoint":
        note += " V is that of each checkpoint, estimated if it has no optimizer state."
    return Table(name=name, title=title, header=header, rows=tuple(rows), note=note)


def _table_of_pool_sizes(report: EvaluationReport, name: str, title: str, metric: str) -> Table | None:
    """A metric of every method in pools of every size and kind."""
    pools = report.pool_sizes
    if pools is None:
        return None
    rows = []
    for kind in POOL_KINDS:
        for method in pools.methods:
            metrics = [pools.metrics(kind, method, size) for size in pools.sizes]
            cells = ["" if one is None else number(estimate(getattr(one, metric))) for one in metrics]
            rows.append((kind, _label(report, method), *cells))
    header = ("pool", "method", *(f"{size:,}" for size in pools.sizes[:-1]), f"all {pools.sizes[-1]:,}")
    return Table(
        name=name, title=f"{title} by number of candidates per query", header=header, rows=tuple(rows),
        note="Every query has pools of its own, which hold its gold examples; a smaller pool is a subset of a larger "
        "one. R and V are those of all candidates, but for the kernel of the pool. " + _note(report, dagger=False,
        effects=False),
    )  # fmt: skip


def _table_of_open_set(report: EvaluationReport) -> Table | None:
    judgements = report.judgements
    if judgements is None:
        return None
    template = report.config.templates[0]
    at = min(report.config.top_k, report.candidates)
    facts = [number for number, fact in enumerate(report.facts) if fact.kind == "fact"]
    metrics = {
        m: [part[facts] for part in open_set_metrics(report.rankings[m, template], judgements, at=at)]
        for m in report.config.methods
    }
    rows = [
        (method, *(_cell(report, method, lambda m, part=part: metrics[m][part]) for part in (0, 1)))
        for method in report.config.methods
    ]
    k = report.config.top_k
    return Table(
        name="open-set", title="Open-set evaluation: proponents that entail the fact (§5.1)",
        header=("method", f"MRR among the first {k}", f"precision@{k}"), rows=tuple(rows),
        note=f"Entailment is judged by {report.config.entailment_model} on windows of three sentences; threshold "
        f"{THRESHOLD:g}. "
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
        name="figure-3", title=f"Categories of the top {report.config.top_k} proponents (Figure 3)",
        header=("method", *CATEGORIES), rows=tuple(rows),
        note="Gold examples count as entailing the fact; no entailment model is used."
        if report.judgements is None
        else f"Entailment is judged by {report.config.entailment_model}.",
    )  # fmt: skip


def _tables_a7(report: EvaluationReport) -> list[Table | None]:
    """The split by the model's answers, of all questions and, if there are several kinds, of each."""
    kinds = [kind for kind in KINDS if kind != "open" and any(fact.kind == kind for fact in report.facts)]
    made = []
    for kind in [None, *(kinds if len(kinds) > 1 else [])]:
        of_kind = np.array([kind in (None, fact.kind) for fact in report.facts]) & report.judged
        for name, answered, chosen in (
            ("right", "correctly", report.correct), ("wrong", "incorrectly", ~report.correct),
        ):  # fmt: skip
            which = "Queries" if kind is None else f"Queries of the kind {kind}"
            title = f"{which} that the model answers {answered} (Table A.7)"
            file = f"table-a7-{name}" + ("" if kind is None else f"-{kind}")
            made.append(_main_table(report, file, title, None, chosen & of_kind))
    return made


def _metric(
    report: EvaluationReport, method: str, metric: str, chosen: Bool[np.ndarray, "facts"]
) -> Float64[np.ndarray, "queries"]:
    """A metric of the chosen queries that have gold examples."""
    values = getattr(report.rankings[method, report.config.templates[0]].metrics(), metric)
    return values[chosen[report.with_gold]]


def _tail_patch(
    report: EvaluationReport, method: str, k: int, chosen: Bool[np.ndarray, "facts"]
) -> Float64[np.ndarray, "queries"] | None:
    effects = report.effects
    if effects is None or (method, k) not in effects.by_method:
        return None
    return effects.by_method[method, k][chosen[list(effects.queries)]]


def _main_k(report: EvaluationReport) -> int:
    """Largest number of proponents that effects are averaged over, as in all tables; 0 without tail-patch."""
    return max(report.config.tail_patch.top_k) if report.config.tail_patch else 0


def _cell(
    report: EvaluationReport,
    method: str,
    values_of: Callable[[str], Float64[np.ndarray, "queries"] | None],
    *,
    percent: bool = False,
) -> str:
    values = values_of(method)
    # A gold ranking of a question without gold examples lists nothing, whose effect is unknown (NaN).
    known = np.zeros(0, dtype=bool) if values is None else ~np.isnan(values)
    if values is None or not known.any():
        return ""
    text = number(estimate(values[known]), percent=percent)
    ours = values_of(OURS) if OURS in report.config.methods and method != OURS else None
    if ours is not None:
        p_value = compare(values[known], ours[known]).p_value
        text += " †" if p_value < 0.05 else ""
    return text


def _note(
    report: EvaluationReport,
    chosen: Bool[np.ndarray, "facts"] | None = None,
    *,
    dagger: bool = True,
    effects: bool = True,
) -> str:
    """Number of queries and candidates of a table, and an explanation of its cells."""
    which = np.ones(len(report.facts), dtype=bool) if chosen is None else chosen
    gold = "Gold examples that plainly state the fact" if report.config.strict else "Gold examples"
    measured = ""
    if effects and report.effects is not None:
        measured = f" Tail-patch is measured on {int(which[list(report.effects.queries)].sum()):,} of the queries."
    if not report.with_gold[which].all():
        gold = f"Rankings are scored on {int(report.with_gold[which].sum()):,} queries with gold examples. {gold}"
    return (
        f"{int(which.sum()):,} queries, {report.candidates:,} candidates. {gold} count as correct.{measured} "
        f"Intervals in brackets: 95%, bootstrap over queries. {_dagger(report) if dagger else ''}"
    ).strip()


def _dagger(report: EvaluationReport) -> str:
    if OURS not in report.config.methods:
        return ""
    return f"†: differs from {OURS} (paired sign-flip test, p < 0.05, without correction for multiple tests)."


def _label(report: EvaluationReport, method: str) -> str:
    """Name of a method, with its side if that differs from the other methods'."""
    sides = report.config.side
    return f"{method} (side {min(sides)})" if method == ONE_SIDED.name and min(sides) < sides[0] else method
