"""The text of a study, as sections with figures: a page in Markdown, and a notebook that draws the
figures again.

Every number and every verdict in the text is taken from the study.
"""

import base64
import dataclasses
import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from trackstar.microscope.accuracy import Interval
from trackstar.microscope.equation import SIDE
from trackstar.microscope.study import ANGLES, PROJECTIONS, Study
from trackstar.microscope.variants import CONDITIONS, VARIANTS

_COLUMNS = 108


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        text: Paragraphs in Markdown.
        figure: Name of its figure; None for none.
    """

    title: str
    text: str
    figure: str | None = None


def page(study: Study) -> str:
    """The page in Markdown; its figures are `NAME.png` beside it."""
    parts = ["# The microscope: Eq. 2 from right to left", _wrapped(_introduction(study))]
    for section in sections(study):
        parts += [f"## {section.title}", _wrapped(section.text)]
        if section.figure is not None:
            parts.append(f"![{section.title}]({section.figure}.png)")
    return "\n\n".join(parts) + "\n"


def notebook(study: Study, data: str | None, figures: Mapping[str, bytes]) -> str:
    """The same as a notebook, whose cells run the study and draw the figures, with the figures in it.

    Args:
        study: The study.
        data: Path of the images, as the cells open them; None for scikit-learn's digits.
        figures: Each figure's name and PNG file.
    """
    cells = [
        _text("# The microscope: Eq. 2 from right to left\n\n" + _introduction(study)),
        _code(_study_again(study, data)),
    ]
    for section in sections(study):
        cells.append(_text(f"## {section.title}\n\n{section.text}"))
        if section.figure is not None:
            cells.append(_code(f'figures.FIGURES["{section.figure}"](study)', figures[section.figure]))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps(
        {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5},
        indent=1, ensure_ascii=False,
    ) + "\n"  # fmt: skip


def _study_again(study: Study, data: str | None) -> str:
    """The lines of Python that run the study."""
    settings = "".join(f"    {name}={value!r},\n" for name, value in dataclasses.asdict(study.settings).items())
    function, images = ("digits", "digits()") if data is None else ("read_images", f"read_images(Path({data!r}))")
    path = "" if data is None else "from pathlib import Path\n\n"
    return (
        f"{path}from trackstar.microscope import figures\n"
        f"from trackstar.microscope.images import {function}\n"
        "from trackstar.microscope.study import Settings, run_study\n\n"
        f"settings = Settings(\n{settings})\n"
        f"study = run_study({images}, {json.dumps(study.source)}, settings)"
    )


def _wrapped(text: str) -> str:
    """The text with its paragraphs and items wrapped; tables and formulas stay as they are."""
    lines = []
    for line in text.split("\n"):
        if line.startswith(("|", " ")) or not line:
            lines.append(line)
        else:
            indent = "  " if line.startswith("* ") else ""
            lines += textwrap.wrap(
                line, _COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
    return "\n".join(lines)


def _text(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def _code(source: str, png: bytes | None = None) -> dict[str, Any]:
    outputs = []
    if png is not None:
        data = {"image/png": base64.b64encode(png).decode("ascii")}
        outputs = [{"output_type": "display_data", "data": data, "metadata": {}}]
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "source": source, "outputs": outputs}


def _introduction(study: Study) -> str:
    settings = study.settings
    return (
        "This page is what `trackstar microscope` writes; it needs the extra `trackstar-tda[microscope]`.\n\n"
        "The score of a training example z for a query q is the inner product of two vectors of unit length,\n\n"
        "    R^(-1/2) P (∇Loss(z)/√V)   and   R^(-1/2) P (∇Loss(q)/√V).\n\n"
        "This page builds that vector up from right to left on a network that is small enough to compute everything "
        "exactly: gradient, V, P, R. "
        f"The images are {study.source}. A network has one hidden layer of {settings.hidden} units and "
        f"{study.parameters['clean']:,} parameters, weights and biases, and is trained on {settings.train:,} "
        f"images for {settings.epochs} epochs. {settings.queries} other images are the queries, with their right "
        "labels. "
        f"*Nuisance* images have {settings.nuisance} further features, normal numbers of standard deviation "
        f"{settings.scale:g}, that have nothing to do with the label.\n\n"
        "Two tests say how good a score is:\n\n"
        "* **Same class:** how often a training image of the query's class beats one of another class.\n"
        "* **Right label:** how often a training image of the query's class beats the same image with a wrong "
        "label.\n\n"
        "Both are 50% for a score that knows nothing. "
        f"Intervals are of 95%, over {settings.seeds} networks and their queries. Figures of a single network show "
        "the first."
    )


def sections(study: Study) -> list[Section]:
    """The sections, in the order of the equation from right to left."""
    return [
        Section(title="The networks", text=_networks(study), figure="accuracy"),
        Section(title="∇Loss, and the unit length", text=_gradients(study)),
        Section(title="√V", text=_second_moment(study), figure="coordinates"),
        Section(title="P", text=_projections(study), figure="projections"),
        Section(title="R, and the Hessian that it stands for", text=_curvature(study), figure="curvature"),
        Section(title="Why R_train alone hurts here", text=_leading(study), figure="leading"),
        Section(title="R_eval and the mix", text=_mixing(study), figure="mixing"),
        Section(title="All forms of the score", text=_table(study), figure="variants"),
        Section(title="The published toy's orderings", text=_claims(study)),
    ]


def _percent(found: Interval) -> str:
    return f"{found.mean:.1f}% [{found.low:.1f}, {found.high:.1f}]"


def _same(study: Study, name: str, condition: str = "clean") -> str:
    return _percent(study.tested[condition][name].same_class)  # pyright: ignore[reportArgumentType]


def _networks(study: Study) -> str:
    said = [
        f"on {_percent(study.accuracy[condition][0])} of the training images and "
        f"{_percent(study.accuracy[condition][1])} of the queries that are {condition}"
        for condition in CONDITIONS
    ]
    return f"The networks are right {'; '.join(said)}."


def _gradients(study: Study) -> str:
    return (
        "The gradient of one layer is the outer product of what comes back and what came in, g aᵀ. Its plain inner "
        f"product finds the class in {_same(study, 'dot product')} of the pairs, its cosine in "
        f"{_same(study, 'cosine')}: the length of a gradient says how wrong the network is about an image, which "
        "has nothing to do with what the image teaches about another.\n\n"
        "Nuisance features are large, and so are the gradients of their weights. The dot product then finds the class "
        f"in {_same(study, 'dot product', 'nuisance')} and the cosine in {_same(study, 'cosine', 'nuisance')}."
    )


def _second_moment(study: Study) -> str:
    before, after = study.coordinates["nuisance"]
    return (
        "V is the mean square of each coordinate of the gradient over the training images. Divided by its root, all "
        f"coordinates are equally large: on nuisance images the {study.settings.nuisance} × {study.settings.hidden} "
        f"largest were up to {before[0] / _middle(before):,.0f} times as large as the median, and are "
        f"{after[0] / _middle(after):.2f} times as large afterwards. The cosine then finds the class in "
        f"{_same(study, 'cosine, V', 'nuisance')} of the pairs of nuisance images and {_same(study, 'cosine, V')} of "
        "clean ones."
    )


def _middle(descending: list[float]) -> float:
    positive = [value for value in descending if value > 0]
    return positive[len(positive) // 2]


def _projections(study: Study) -> str:
    dimensions = study.dimensions["clean"]
    errors = {name: dict(study.projection_errors[name])[dimensions] for name in PROJECTIONS}
    powers = {name: _power(study.projection_errors[name]) for name in PROJECTIONS}
    return (
        f"Two-sided, a weight matrix's gradient becomes P₀GP₁ᵀ of {SIDE} × {SIDE} numbers and a bias's P₀g of {SIDE}: "
        f"{dimensions} in all. One-sided, one dense matrix takes all {study.parameters['clean']:,} coordinates to "
        f"{dimensions}. Both keep inner products on average. The error of a cosine at {dimensions} dimensions is "
        f"{errors['two-sided']:.3f} two-sided and {errors['one-sided']:.3f} one-sided. Over the figure it falls with "
        f"the dimensions to the power of {powers['two-sided']:.2f} and {powers['one-sided']:.2f}. Two-sided, both "
        "halves of a gradient are squeezed into few dimensions, and their errors multiply. "
        "But its P has the size of the rows and columns of a layer, where the one-sided P has a row for every "
        f"parameter. The class is found in {_same(study, 'two-sided P')} two-sided and {_same(study, 'one-sided P')} "
        "one-sided."
    )


def _power(points: Sequence[tuple[int, float]]) -> float:
    """The power of x with which y grows from the first point to the last."""
    (x, y), (last_x, last_y) = points[0], points[-1]
    return math.log(last_y / y) / math.log(last_x / x)


def _curvature(study: Study) -> str:
    two, one = (study.curvature[name] for name in PROJECTIONS)
    return (
        "Influence functions have the inverse Hessian between the two gradients. R, the mean of φφᵀ over the training "
        "images, stands for it, as it needs no second derivatives. On this network the Hessian can be computed, "
        "exactly, by one Hessian-vector product for each row of P. As vectors of their entries, R_train and the "
        f"projected Hessian have a cosine of {two.agreement:.2f} two-sided and {one.agreement:.2f} one-sided. Of the "
        f"angles between the spaces of their {ANGLES} leading eigenvectors (two-sided), the smallest is "
        f"{two.angles[0]:.0f}° and the median {two.angles[len(two.angles) // 2]:.0f}°. Both would be about the "
        "same if the labels were drawn from the network's own predictions: R would then be the Hessian's Gauss-Newton "
        "part."
    )


def _leading(study: Study) -> str:
    best = max(study.leading, key=lambda row: row[1])
    last = study.leading[-1]
    with_r, without = (study.tested["clean"][name].same_class.mean for name in ("two-sided P, R_train", "two-sided P"))
    text = (
        f"With R_train^(-1/2), the class is found in {_same(study, 'two-sided P, R_train')} two-sided; without R, in "
        f"{_same(study, 'two-sided P')}. The figure reduces φ to the leading eigenvectors of R_train, with whitening "
        f"and without. Whitened, it finds the class most often, in {best[1]:.1f}%, with {best[0]} of them, and in "
        f"{last[1]:.1f}% with all {last[0]}. Without whitening, these are {best[2]:.1f}% and {last[2]:.1f}%."
    )
    if with_r >= without or best[0] == last[0]:
        return text + " So the directions behind the leading ones help here."
    return text + (
        f"\n\nSo the class shows in the leading directions. The network has {study.classes} classes to tell apart, and "
        "what the gradients of a class have in common is large. Whitening makes the other directions as large, and "
        "with them what images of a class do not have in common. A language model's examples share much that a query "
        "is not about, such as format and frequent words; there the leading directions are those to be made small."
    )


def _mixing(study: Study) -> str:
    rule = {name: sum(study.mixing[name]) / len(study.mixing[name]) for name in PROJECTIONS}
    best = {name: max(study.weights[name], key=lambda row: row[1]) for name in PROJECTIONS}
    report = study.curvature["two-sided"]
    ranks = report.effective_ranks
    return (
        "R_eval is the same mean over the queries, and R = λ R_eval + (1-λ) R_train. The paper's rule gives λ = "
        f"{rule['two-sided']:.3f} two-sided and {rule['one-sided']:.3f} one-sided, on average. The class is then found "
        f"in {_same(study, 'two-sided P, mixed R')} and {_same(study, 'one-sided P, mixed R')}. Among the λ of the "
        f"figure, the best two-sided is {best['two-sided'][0]:g}, with {best['two-sided'][1]:.1f}%, and the best "
        f"one-sided {best['one-sided'][0]:g}, with {best['one-sided'][1]:.1f}%. A λ with which R is singular is left "
        "out.\n\n"
        "The mix is meant to make small what all queries share and training examples do not, such as the form of a "
        "question. Here, queries and training images are of the same kind. R_eval is a mean of squares, in which the "
        "few queries count that the network is not sure of: its effective rank (tr R)²/tr R² is "
        f"{ranks[1]:.1f}, that of R_train {ranks[0]:.1f} (two-sided), and the spaces of their leading {ANGLES} "
        f"eigenvectors have {100 * report.shared:.0f}% in common."
    )


def _table(study: Study) -> str:
    lines = [
        "In brackets the published toy, whose network and nuisance features are not specified; in the figure, a mark.",
        "",
        "| score | formula | " + " | ".join(f"{c}: same class | {c}: right label" for c in CONDITIONS) + " |",
        "|---|---|" + "---|" * (2 * len(CONDITIONS)),
    ]
    for variant in VARIANTS:
        published = {condition: (same, right) for condition, same, right in variant.published}
        cells = []
        for condition in CONDITIONS:
            tested = study.tested[condition][variant.name]
            for place, found in enumerate((tested.same_class, tested.right_label)):
                other = f" ({published[condition][place]})" if condition in published else ""
                cells.append(f"{found.mean:.1f} [{found.low:.1f}, {found.high:.1f}]{other}")
        lines.append(f"| {variant.name} | {variant.formula} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _claims(study: Study) -> str:
    lines = [
        "Differences are of same-class accuracy, in percent points. An ordering is undecided if the interval includes "
        "zero.",
        "",
        "| ordering | images | difference | here |",
        "|---|---|---|---|",
    ]
    for claim in study.claims:
        found = claim.difference
        difference = f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
        lines.append(f"| {claim.statement} | {claim.condition} | {difference} | {claim.verdict} |")
    return "\n".join(lines)
