"""Write a report as files: Markdown, CSV, JSON with versions, figures, and result files for the explorer."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

from trackstar.attribution.results import replace_text
from trackstar.evaluation.comparisons import estimate
from trackstar.evaluation.figures import draw_figures
from trackstar.evaluation.release_results import result_file_name, result_lines
from trackstar.evaluation.run import EvaluationReport
from trackstar.evaluation.tables import tables

_PACKAGES = ("trackstar-tda", "torch", "transformers", "tokenizers", "numpy")


def write_report(report: EvaluationReport, out: Path) -> Path:
    """Write a report.

    The files are `report.md`, `report.json`, one CSV file per table in `tables/`, one PNG file per
    figure in `figures/`, and one result file per method in `results/`.

    Returns:
        Path of `report.md`.

    Raises:
        OptionError: A file cannot be written.
    """
    made = tables(report)
    for table in made:
        replace_text(out / "tables" / f"{table.name}.csv", table.to_csv())
    _remove_others(out / "tables", "*.csv", {f"{table.name}.csv" for table in made})
    replace_text(out / "report.json", json.dumps(to_json(report), indent=1, ensure_ascii=False) + "\n")
    for method in report.config.methods:
        lines = result_lines(report, method)
        replace_text(out / "results" / result_file_name(method), "".join(f"{line}\n" for line in lines))
    _remove_others(out / "results", "*.jsonl", {result_file_name(method) for method in report.config.methods})
    figures = draw_figures(report, out / "figures")
    _remove_others(out / "figures", "*.png", {figure.name for figure in figures})
    correct = int(report.correct.sum())
    lines = [
        "# Fact tracing",
        "",
        *(f"* {line}" for line in report.description),
        f"* queries: {len(report.facts):,} (half: {report.config.half}); the model answers {correct:,} correctly "
        f"({correct / len(report.facts):.1%})",
        "",
        *(table.to_markdown() for table in made),
        *(f"![{path.stem}](figures/{path.name})\n" for path in figures),
    ]
    replace_text(out / "report.md", "\n".join(lines))
    return out / "report.md"


def _remove_others(folder: Path, pattern: str, names: set[str]) -> None:
    """Remove files that an earlier run with other settings left."""
    for path in folder.glob(pattern):
        if path.name not in names:
            path.unlink()


def to_json(report: EvaluationReport) -> dict[str, Any]:
    """All figures of a report with their intervals, and versions; no texts of the corpus."""
    methods: dict[str, Any] = {}
    for (method, template), ranking in report.rankings.items():
        metrics = ranking.metrics()
        methods.setdefault(method, {})[f"template {template}"] = {
            name: _estimate(getattr(metrics, name)) for name in ("reciprocal_rank", "recall", "gold_share", "precision")
        }
    effects = None
    if report.effects is not None:
        by_rate = report.effects.by_learning_rate
        effects = {
            "step": report.effects.step,
            "queries": len(report.effects.queries),
            "mean_effect": {f"{m}, top {k}": _estimate(v) for (m, k), v in report.effects.by_method.items()},
            "by_learning_rate": {f"{m}, {rate:g}": _estimate(v) for (m, rate), v in by_rate.items()},
        }
    return {
        "description": list(report.description),
        "queries": len(report.facts),
        "candidates": report.candidates,
        "answered_right": int(report.correct.sum()),
        "methods": methods,
        "by_side": {str(side): _estimate(r.metrics().reciprocal_rank) for side, r in report.variants.by_side.items()},
        "by_checkpoint": {
            name: _estimate(r.metrics().reciprocal_rank) for name, r in report.variants.by_checkpoint.items()
        },
        "tail_patch": effects,
        "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in _PACKAGES}},
    }


def _estimate(values: np.ndarray) -> dict[str, float]:
    interval = estimate(values)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "queries": interval.queries}
