"""The paper's figures from a report: projection size (Figure 2), proponents' categories by frequency (Figure 3)."""

from pathlib import Path
from typing import Any

import numpy as np

from trackstar.evaluation.categories import CATEGORIES
from trackstar.evaluation.comparisons import estimate
from trackstar.evaluation.frequency import bucket_name, frequency_bucket
from trackstar.evaluation.rankings import Ranking
from trackstar.evaluation.run import EvaluationReport

_CATEGORY_METHODS = ("TrackStar", "BM25")


def draw_figures(report: EvaluationReport, folder: Path) -> list[Path]:
    """Draw what the report has the figures for, as PNG; needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Any] = {}
    if report.variants.by_side:
        sides = [(str(side), ranking) for side, ranking in sorted(report.variants.by_side.items())]
        drawn["projection-size"] = _variants(
            plt, sides, "side of a layer block's projection", "TrackStar by projection size (Figure 2)"
        )
    if report.variants.by_checkpoint:
        steps = [(_step(name), ranking) for name, ranking in report.variants.by_checkpoint.items()]
        drawn["checkpoints"] = _variants(plt, steps, "checkpoint", "TrackStar by checkpoint (Figure 2)")
    for method in _CATEGORY_METHODS:
        if method in report.categories:
            drawn[f"categories-{method.lower()}"] = _categories(plt, report, method)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)
    return [folder / f"{name}.png" for name in drawn]


def _step(name: str) -> str:
    """`1000` of `checkpoint-001000`; other names as they are."""
    number = name.removeprefix("checkpoint-")
    return str(int(number)) if number != name and number.isdecimal() else name


def _variants(plt: Any, found: list[tuple[str, Ranking]], label: str, title: str) -> Any:
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    means = [estimate(ranking.metrics().reciprocal_rank) for _, ranking in found]
    errors = [[one.mean - one.low for one in means], [one.high - one.mean for one in means]]
    axes.errorbar(range(len(found)), [one.mean for one in means], yerr=errors, marker="o", capsize=3)
    axes.set_xticks(range(len(found)), [name for name, _ in found])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("MRR")
    axes.set_title(title)
    return figure


def _categories(plt: Any, report: EvaluationReport, method: str) -> Any:
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    of_fact = np.array([frequency_bucket(int(count)) for count in report.frequencies])
    buckets = sorted(set(of_fact.tolist()))
    bottom = np.zeros(len(buckets))
    for category in CATEGORIES:
        shares = []
        for bucket in buckets:
            flat = [found for n in np.flatnonzero(of_fact == bucket) for found in report.categories[method][n]]
            shares.append(flat.count(category) / len(flat) if flat else 0.0)
        axes.bar([bucket_name(bucket) for bucket in buckets], shares, bottom=bottom, label=category)
        bottom += np.array(shares)
    axes.set_xlabel("candidates that name both entities of the fact")
    axes.set_ylabel(f"share of the top {report.config.top_k}")
    axes.set_title(f"What {method}'s proponents are (Figure 3)")
    figure.legend(loc="outside right upper", frameon=False)
    return figure
