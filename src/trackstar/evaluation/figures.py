"""Draw a report's figures: projection size and checkpoints (Figure 2), pool sizes, categories (Figure 3)."""

import io
from typing import Any

import numpy as np

from trackstar.baselines.trak import TRAK
from trackstar.evaluation.categories import CATEGORIES
from trackstar.evaluation.comparisons import estimate
from trackstar.evaluation.frequency import bucket_name, frequency_bucket
from trackstar.evaluation.pool_sizes import POOL_KERNEL, POOL_KINDS, PoolSizes
from trackstar.evaluation.rankings import Ranking
from trackstar.evaluation.run import EvaluationReport

_REFERENCES = ("random", "BM25", "embeddings")
_CATEGORY_METHODS = ("TrackStar", "BM25")


def draw_figures(report: EvaluationReport) -> dict[str, bytes]:
    """Draw the figures that a report has results for; no screen is needed.

    Returns:
        Each figure's name, without ending, and its PNG file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures: dict[str, Any] = {}
    if report.variants.by_side and report.with_gold.any():
        sides = [(str(side), ranking) for side, ranking in sorted(report.variants.by_side.items())]
        figures["projection-size"] = _figure_of_variants(
            plt, sides, "side of a layer block's projection", "TrackStar by projection size (Figure 2)"
        )
    if report.variants.by_checkpoint and report.with_gold.any():
        steps = [(_step(name), ranking) for name, ranking in report.variants.by_checkpoint.items()]
        title = "TrackStar by checkpoint (Figure 2)"
        figures["checkpoints"] = _figure_of_variants(plt, steps, "checkpoint", title)
    if report.pool_sizes is not None:
        figures["figure-pool-sizes"] = _figure_of_pool_sizes(plt, report.pool_sizes)
    for method in _CATEGORY_METHODS:
        if any(report.categories.get(method, ())):
            figures[f"categories-{method.lower()}"] = _figure_of_categories(plt, report, method)
    drawn = {}
    for name, figure in figures.items():
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=130)
        plt.close(figure)
        drawn[name] = content.getvalue()
    return drawn


def _step(name: str) -> str:
    """`1000` for `checkpoint-001000`; other names are unchanged."""
    number = name.removeprefix("checkpoint-")
    return str(int(number)) if number != name and number.isdecimal() else name


def _figure_of_variants(plt: Any, variants: list[tuple[str, Ranking]], label: str, title: str) -> Any:
    """MRR of each variant with its 95% interval."""
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    means = [estimate(ranking.metrics().reciprocal_rank) for _, ranking in variants]
    errors = [[one.mean - one.low for one in means], [one.high - one.mean for one in means]]
    axes.errorbar(range(len(variants)), [one.mean for one in means], yerr=errors, marker="o", capsize=3)
    axes.set_xticks(range(len(variants)), [name for name, _ in variants])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)
    axes.set_ylabel("MRR")
    axes.set_title(title)
    return figure


def _figure_of_pool_sizes(plt: Any, pools: PoolSizes) -> Any:
    """MRR against the number of candidates: a panel per kind of pool, a line and its 95% band per method."""
    figure, panels = plt.subplots(ncols=len(POOL_KINDS), sharey=True, figsize=(10, 4.2), layout="constrained")
    palette = plt.get_cmap("tab20").colors
    colour_of = dict(zip(pools.methods, palette[::2] + palette[1::2], strict=False))  # at most 15 methods
    for kind, axes in zip(POOL_KINDS, panels, strict=True):
        for method in pools.methods:
            found = [(size, pools.metrics(kind, method, size)) for size in pools.sizes]
            points = [(size, estimate(metrics.reciprocal_rank)) for size, metrics in found if metrics is not None]
            sizes, means = [size for size, _ in points], [one.mean for _, one in points]
            style = {"color": colour_of[method], "linestyle": "-", "marker": "o"}
            if method in _REFERENCES:
                style |= {"linestyle": ":", "marker": "s"}
            elif method == POOL_KERNEL:
                style |= {"linestyle": "--", "marker": "^", "color": colour_of[TRAK.name]}
            axes.plot(sizes, means, label=method if kind == POOL_KINDS[0] else None, markersize=4, **style)
            low, high = [one.low for _, one in points], [one.high for _, one in points]
            axes.fill_between(sizes, low, high, color=style["color"], alpha=0.1, linewidth=0)
        axes.set_xscale("log")
        axes.set_xticks(pools.sizes, [f"{size:,}" for size in pools.sizes])
        axes.minorticks_off()
        axes.set_ylim(0, 1)
        axes.set_xlabel("candidates per query")
        axes.set_title(f"Pools: {kind}")
    panels[0].set_ylabel("MRR")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _figure_of_categories(plt: Any, report: EvaluationReport, method: str) -> Any:
    """Shares of the categories of a method's proponents, stacked, per frequency bucket of the facts."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    bucket_of = np.array([frequency_bucket(int(count)) for count in report.frequencies])  # (facts,)
    buckets = sorted({int(bucket_of[n]) for n, fact in enumerate(report.facts) if fact.kind == "fact"})
    bottom = np.zeros(len(buckets))
    for category in CATEGORIES:
        shares = []
        for bucket in buckets:
            flat = [each for n in np.flatnonzero(bucket_of == bucket) for each in report.categories[method][n]]
            shares.append(flat.count(category) / len(flat) if flat else 0.0)
        axes.bar([bucket_name(bucket) for bucket in buckets], shares, bottom=bottom, label=category)
        bottom += np.array(shares)
    axes.set_xlabel("candidates that name both entities of the fact")
    axes.set_ylabel(f"share of the top {report.config.top_k}")
    axes.set_title(f"Categories of {method}'s proponents (Figure 3)")
    figure.legend(loc="outside right upper", frameon=False)
    return figure
