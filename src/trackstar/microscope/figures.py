"""The figures of a study; each function returns one, for a page or a notebook."""

from typing import Any

import numpy as np

from trackstar.microscope.study import PROJECTIONS, Study
from trackstar.microscope.variants import CONDITIONS, VARIANTS

_COLOURS = {"clean": "#2563a8", "nuisance": "#d97a1e"}
_OF_PROJECTION = {"two-sided": "#2563a8", "one-sided": "#d97a1e"}


def _axes(columns: int = 1, *, width: float = 6.4, height: float = 3.6) -> Any:
    """A figure without a screen, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def network_accuracy(study: Study) -> Any:
    """How often the networks are right, on training images and on others."""
    figure, (axes,) = _axes(height=3.0)
    for number, condition in enumerate(CONDITIONS):
        for place, found in enumerate(study.accuracy[condition]):
            error = [[found.mean - found.low], [found.high - found.mean]]
            x = place + (number - 0.5) * 0.38
            label = condition if place == 0 else None
            axes.bar(x, found.mean, 0.36, yerr=error, capsize=3, color=_COLOURS[condition], label=label)
            axes.text(x, 2, f"{found.mean:.1f}", ha="center", color="white")
    axes.set_xticks([0, 1], ["training images", "queries"])
    axes.set_ylabel("right class, %")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    return figure


def coordinates(study: Study) -> Any:
    """Sizes of the gradient's coordinates before and after the division by √V."""
    figure, panels = _axes(2, width=8.0)
    lines = (("G", "#888888"), ("G/√V", "#2563a8"))
    for axes, condition in zip(panels, CONDITIONS, strict=True):
        for values, (label, colour) in zip(study.coordinates[condition], lines, strict=True):
            positive = [value for value in values if value > 0]
            axes.loglog(range(1, len(positive) + 1), positive, label=label, color=colour)
        axes.set_title(condition)
        axes.set_xlabel("coordinate, from the largest")
    panels[0].set_ylabel("root mean square")
    panels[0].legend(frameon=False)
    return figure


def projection_errors(study: Study) -> Any:
    """Error of the projected cosines against the number of dimensions."""
    figure, (axes,) = _axes()
    for name in PROJECTIONS:
        dimensions, errors = zip(*study.projection_errors[name], strict=True)
        axes.loglog(dimensions, errors, "o-", label=name, color=_OF_PROJECTION[name])
    axes.axvline(study.dimensions["clean"], color="#aaaaaa", linestyle=":")
    axes.set_xlabel("dimensions")
    axes.set_ylabel("error of a cosine (root mean square)")
    axes.legend(frameon=False)
    return figure


def curvature(study: Study, projection: str = "two-sided") -> Any:
    """R_train and the projected Hessian on one scale, relative to the largest diagonal entry; spectra."""
    report = study.curvature[projection]
    figure, panels = _axes(3, width=10.0, height=3.4)
    image: Any = None
    for axes, (name, matrix) in zip(
        panels[:2], (("R_train", report.autocorrelation), ("projected Hessian", report.hessian)), strict=True
    ):
        shown = (matrix / matrix.diagonal().max()).numpy()
        image = axes.imshow(shown, cmap="RdBu_r", vmin=-0.3, vmax=0.3, interpolation="nearest")
        axes.set_title(name)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(image, ax=list(panels[:2]), shrink=0.8)
    for name, values in report.spectra.items():
        positive = np.array([value for value in values if value > 0])
        panels[2].loglog(np.arange(1, len(positive) + 1), positive / positive[0], label=name)
    panels[2].set_xlabel("eigenvalue, from the largest")
    panels[2].set_ylabel("relative to the largest")
    panels[2].set_ylim(bottom=1e-8)
    panels[2].legend(frameon=False)
    return figure


def leading(study: Study) -> Any:
    """Same-class accuracy in the leading eigenvectors of R_train, whitened and not."""
    figure, (axes,) = _axes()
    counts, whitened, reduced = zip(*study.leading, strict=True)
    axes.semilogx(counts, reduced, "o-", color="#888888", label="only reduced to the leading directions")
    axes.semilogx(counts, whitened, "o-", color="#2563a8", label="and whitened")
    axes.set_xlabel("leading eigenvectors of R_train")
    axes.set_ylabel("same class, %")
    axes.legend(frameon=False)
    return figure


def weights(study: Study) -> Any:
    """Same-class accuracy by λ."""
    figure, (axes,) = _axes(height=3.0)
    for name in PROJECTIONS:
        values, accuracies = zip(*study.weights[name], strict=True)
        axes.plot(values, accuracies, "o-", color=_OF_PROJECTION[name], label=name)
        axes.axvline(study.mixing[name][0], color=_OF_PROJECTION[name], linestyle=":")
    axes.set_xscale("symlog", linthresh=0.01)
    axes.set_xlabel("λ, the weight of R_eval (dotted: the paper's rule)")
    axes.set_ylabel("same class, %")
    axes.legend(frameon=False)
    return figure


def variants(study: Study) -> Any:
    """Both tests of every form of the score, with 95% intervals and the published toy's numbers."""
    figure, panels = _axes(2, width=10.0, height=4.6)
    places = np.arange(len(VARIANTS))[::-1]
    for axes, title in zip(panels, ("same class", "right label"), strict=True):
        for number, condition in enumerate(CONDITIONS):
            for place, variant in zip(places, VARIANTS, strict=True):
                tested = study.tested[condition][variant.name]
                found = tested.same_class if title == "same class" else tested.right_label
                y = place + (0.5 - number) * 0.38
                axes.barh(
                    y, found.mean, 0.36, color=_COLOURS[condition], label=condition if place == 0 else None,
                    xerr=[[found.mean - found.low], [found.high - found.mean]], capsize=2,
                )  # fmt: skip
                for of, same, right in variant.published:
                    if of == condition:
                        axes.plot(same if title == "same class" else right, y, "k|", markersize=9)
        axes.set_xlim(50, 101)
        axes.set_title(f"{title}, %")
        axes.set_yticks(places, [variant.name for variant in VARIANTS] if axes is panels[0] else [])
    panels[0].legend(loc="lower right", frameon=False)
    return figure


FIGURES = {
    "accuracy": network_accuracy,
    "coordinates": coordinates,
    "projections": projection_errors,
    "curvature": curvature,
    "leading": leading,
    "mixing": weights,
    "variants": variants,
}
"""Each figure's name and the function that draws it."""
