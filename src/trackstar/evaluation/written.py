"""A report as files: Markdown, CSV, JSON with commit-independent versions, and figures."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

from trackstar.evaluation.categories import CATEGORIES
from trackstar.evaluation.comparisons import estimate
from trackstar.evaluation.frequency import bucket_name, frequency_bucket
from trackstar.evaluation.run import EvaluationReport
from trackstar.evaluation.tables import tables
from trackstar.results import replace_text

_PACKAGES = ("trackstar-tda", "torch", "transformers", "tokenizers", "numpy")


def write_report(report: EvaluationReport, out: Path) -> Path:
    """Write `report.md`, `report.json`, a CSV a table under `tables/`, and figures under `figures/`.

    Returns:
        The path of `report.md`.

    Raises:
        OptionError: They cannot be written.
    """
    made = tables(report)
    for table in made:
        replace_text(out / "tables" / f"{table.name}.csv", table.to_csv())
    replace_text(out / "report.json", json.dumps(to_json(report), indent=1, ensure_ascii=False) + "\n")
    figures = _figures(report, out / "figures")
    right = int(report.correct.sum())
    lines = [
        "# Fact tracing",
        "",
        *(f"* {line}" for line in report.description),
        f"* queries: {len(report.facts):,}, half {report.config.half}; the model answers {right:,} right "
        f"({right / len(report.facts):.1%})",
        "",
        *(table.to_markdown() for table in made),
        *(f"![{path.stem}](figures/{path.name})\n" for path in figures),
    ]
    replace_text(out / "report.md", "\n".join(lines))
    return out / "report.md"


def to_json(report: EvaluationReport) -> dict[str, Any]:
    """Every figure of the report with its interval, its settings and versions; no texts."""
    methods: dict[str, Any] = {}
    for (method, template), ranking in report.rankings.items():
        metrics = ranking.metrics()
        methods.setdefault(method, {})[f"template {template}"] = {
            name: _estimate(getattr(metrics, name)) for name in ("reciprocal_rank", "recall", "gold_share", "precision")
        }
    effects = None
    if report.effects is not None:
        effects = {
            "step": report.effects.step,
            "queries": len(report.effects.queries),
            "mean_effect": {f"{m}, top {k}": _estimate(v) for (m, k), v in report.effects.by_method.items()},
        }
    return {
        "description": list(report.description),
        "queries": len(report.facts),
        "candidates": report.candidates,
        "answered_right": int(report.correct.sum()),
        "methods": methods,
        "by_side": {str(side): _estimate(r.metrics().reciprocal_rank) for side, r in report.by_side.items()},
        "tail_patch": effects,
        "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in _PACKAGES}},
    }


def _estimate(values: np.ndarray) -> dict[str, float]:
    found = estimate(values)
    return {"mean": found.mean, "low": found.low, "high": found.high, "queries": found.queries}


def _figures(report: EvaluationReport, folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    if report.by_side:
        figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
        sides = sorted(report.by_side)
        found = [estimate(report.by_side[side].metrics().reciprocal_rank) for side in sides]
        low = [one.mean - one.low for one in found]
        high = [one.high - one.mean for one in found]
        axes.errorbar(sides, [one.mean for one in found], yerr=[low, high], marker="o", capsize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sides, [str(side) for side in sides])
        axes.set_xlabel("side of a layer block's projection")
        axes.set_ylabel("MRR")
        axes.set_title("TrackStar by projection size (Figure 2)")
        made.append(_saved(figure, folder / "projection-size.png"))
    for method in [m for m in ("TrackStar", "BM25") if m in report.categories]:
        buckets = np.array([frequency_bucket(int(count)) for count in report.frequencies])
        figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
        names = sorted(set(buckets.tolist()))
        bottom = np.zeros(len(names))
        for category in CATEGORIES:
            shares = []
            for bucket in names:
                flat = [c for n in np.flatnonzero(buckets == bucket) for c in report.categories[method][n]]
                shares.append(flat.count(category) / len(flat) if flat else 0.0)
            axes.bar([bucket_name(bucket) for bucket in names], shares, bottom=bottom, label=category)
            bottom += np.array(shares)
        axes.set_xlabel("candidates that name both entities of the fact")
        axes.set_ylabel(f"share of the top {report.config.top_k}")
        axes.set_title(f"What {method}'s proponents are (Figure 3)")
        figure.legend(loc="outside right upper", frameon=False)
        made.append(_saved(figure, folder / f"categories-{method.lower()}.png"))
    plt.close("all")
    return made


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path
