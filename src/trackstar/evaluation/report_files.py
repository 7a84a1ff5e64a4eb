"""Write a report as files: Markdown, CSV, JSON with versions, figures, and result files for the explorer."""

import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from trackstar.choices import KINDS
from trackstar.evaluation.comparisons import estimate
from trackstar.evaluation.figures import draw_figures
from trackstar.evaluation.pool_sizes import PoolSizes
from trackstar.evaluation.release_results import WRONG_ANSWERS_FILE, result_file_name, result_lines, wrong_answer_lines
from trackstar.evaluation.run import EvaluationReport
from trackstar.evaluation.tables import tables
from trackstar.evaluation.workspace import claim_folder
from trackstar.store.files.outputs import replace_bytes, replace_text

# Names of the files of tables, results and figures, as listed in report.json.
_LISTED = re.compile(r"(tables|results|figures)/[\w., -]+\.(csv|jsonl|png)")
_PACKAGES = ("trackstar-tda", "torch", "transformers", "tokenizers", "numpy")


def write_report(report: EvaluationReport, out: Path) -> Path:
    """Write a report.

    The files are `report.md`, `report.json`, one CSV file per table in `tables/`, one PNG file per
    figure in `figures/`, and one result file per method in `results/`. `report.json` lists them, so
    that files of an earlier report are removed and no others.

    Returns:
        Path of `report.md`.

    Raises:
        OptionError: A file cannot be written, or the folder holds something else.
    """
    claim_folder(out)
    made = tables(report)
    figures = draw_figures(report)
    files = {f"tables/{table.name}.csv": table.to_csv().encode("utf-8") for table in made}
    for method in report.config.methods:
        text = "".join(f"{line}\n" for line in result_lines(report, method))
        files[f"results/{result_file_name(method)}"] = text.encode("utf-8")
    if report.wrong_answers:
        files[WRONG_ANSWERS_FILE] = "".join(f"{line}\n" for line in wrong_answer_lines(report)).encode("utf-8")
    files |= {f"figures/{name}.png": content for name, content in figures.items()}
    content = {**to_json(report), "files": sorted(files)}
    numbers = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    for name, content in files.items():
        replace_bytes(out / name, content)
    _remove_stale(out, files)
    replace_text(out / "report.json", numbers + "\n")
    correct, judged = int(report.correct.sum()), int(report.judged.sum())
    answered = (
        f"the model answers {correct:,} correctly ({correct / judged:.1%})" if judged else "none has a right answer"
    )
    lines = [
        "# Fact tracing",
        "",
        *(f"* {line}" for line in report.description),
        f"* queries: {len(report.facts):,} (half: {report.config.half}); {answered}",
        "",
        *(table.to_markdown() for table in made),
        *(f"![{name}](figures/{name}.png)\n" for name in figures),
    ]
    replace_text(out / "report.md", "\n".join(lines))
    return out / "report.md"


def _remove_stale(out: Path, names: Iterable[str]) -> None:
    """Remove the files that an earlier report with other settings lists, and this one does not have."""
    try:
        listed = json.loads((out / "report.json").read_text(encoding="utf-8")).get("files", [])
    except (OSError, ValueError, AttributeError):
        return
    for name in {str(name) for name in listed if _LISTED.fullmatch(str(name))} - set(names):
        (out / name).unlink(missing_ok=True)


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
        "answers": {
            kind: _estimate(report.correct[numbers].astype(np.float64))
            for kind in KINDS
            if kind != "open"
            if (numbers := [number for number, fact in enumerate(report.facts) if fact.kind == kind])
        },
        "methods": methods,
        "by_side": {str(side): _estimate(r.metrics().reciprocal_rank) for side, r in report.variants.by_side.items()},
        "by_checkpoint": {
            name: _estimate(r.metrics().reciprocal_rank) for name, r in report.variants.by_checkpoint.items()
        },
        "pool_sizes": _pool_sizes(report.pool_sizes),
        "tail_patch": effects,
        "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in _PACKAGES}},
    }


def _pool_sizes(pools: PoolSizes | None) -> dict[str, Any] | None:
    """MRR and recall@10 by kind of pool, method and number of candidates."""
    if pools is None:
        return None
    found: dict[str, Any] = {}
    for kind, method, size in pools.ranks:
        metrics = pools.metrics(kind, method, size)
        assert metrics is not None
        of_method = found.setdefault(kind, {}).setdefault(method, {})
        of_method[str(size)] = {name: _estimate(getattr(metrics, name)) for name in ("reciprocal_rank", "recall")}
    return found


def _estimate(values: np.ndarray) -> dict[str, float | None]:
    """An estimate with its interval; numbers that are unknown (NaN) are null."""
    values = values[~np.isnan(values)]
    if not len(values):
        return {"mean": None, "low": None, "high": None, "queries": 0}
    interval = estimate(values)
    found = {"mean": interval.mean, "low": interval.low, "high": interval.high, "queries": interval.queries}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}
