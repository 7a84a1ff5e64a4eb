"""Measure every form of the score over several seeds, and what explains the numbers on one of them."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.errors import CurvatureError, OptionError, check_at_least
from trackstar.microscope.accuracy import Accuracies, Interval, interval
from trackstar.microscope.equation import ROLES, Curvature, Equation, Role
from trackstar.microscope.images import Images
from trackstar.microscope.network import Network
from trackstar.microscope.projections import OneSided, TwoSided
from trackstar.microscope.variants import BY_NAME, CONDITIONS, VARIANTS, Condition, ProjectionName, Variant

PROJECTIONS: tuple[ProjectionName, ...] = ("two-sided", "one-sided")
_SIDES = (2, 3, 4, 6, 8, 12, 16)
_PROJECTION_SEEDS = 4
_WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99)
_LEADING = (2, 4, 6, 9, 12, 16, 24, 36, 54, 80, 110, 144)
ANGLES = 10
"""Number of leading eigenvectors of R and of the Hessian that are compared."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the networks are made and asked.

    Attributes:
        seeds: Number of networks of each condition, each with images, weights and projections of its own.
        train: Training images.
        queries: Other images that are asked about.
        hidden: Hidden units.
        epochs: Passes over the training images.
        nuisance: Number of nuisance features.
        scale: Their standard deviation; pixels are from 0 to 1.

    Raises:
        OptionError: A number is too small.
    """

    seeds: int = 5
    train: int = 1_000
    queries: int = 200
    hidden: int = 32
    epochs: int = 30
    nuisance: int = 16
    scale: float = 10.0

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("train", 20), ("queries", 8), ("hidden", 2), ("epochs", 1), ("nuisance", 1)):
            check_at_least(name, getattr(self, name), least)

    def check(self, images: Images) -> None:
        """Raise if there are too few images.

        Raises:
            OptionError: There are fewer than the training images and queries together.
        """
        if len(images) < self.train + self.queries:
            raise OptionError(
                f"`data`: expected {self.train + self.queries:,} images or more, {self.train:,} to train on and "
                f"{self.queries} to ask about, found {len(images):,}; pass more images"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trained:
    """One network with its images, and the parts of the equation on it."""

    train: Images
    queries: Images
    equation: Equation

    @classmethod
    def of(cls, images: Images, condition: Condition, seed: int, settings: Settings) -> "Trained":
        """Draw images, train a network, and draw projections; a function of the seed."""
        generator = torch.Generator().manual_seed(seed)
        if condition == "nuisance":
            images = images.with_nuisance(settings.nuisance, settings.scale, generator)
        rows = torch.randperm(len(images), generator=generator)
        train = images.part(rows[: settings.train])
        queries = images.part(rows[settings.train : settings.train + settings.queries])
        others = torch.randint(1, images.classes, (len(train),), generator=generator)
        wrong = train.labelled((train.labels + others) % images.classes)
        network = Network.train(train, hidden=settings.hidden, epochs=settings.epochs, seed=seed)
        equation = Equation(network, train=train, wrong=wrong, queries=queries, seed=seed)
        return cls(train=train, queries=queries, equation=equation)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """An ordering of two forms of the score.

    Attributes:
        statement: What the published toy says.
        better: The form that is said to be better.
        worse: The other.
        condition: The images.
        difference: Same-class accuracy of the better less that of the other, in percent points.
    """

    statement: str
    better: str
    worse: str
    condition: Condition
    difference: Interval

    @property
    def verdict(self) -> str:
        """Whether it holds here: `holds`, `does not hold`, or `undecided` if the interval includes zero."""
        if self.difference.low > 0:
            return "holds"
        return "does not hold" if self.difference.high < 0 else "undecided"


_CLAIMS: tuple[tuple[str, str, str, Condition], ...] = (
    ("the cosine is better than the dot product on nuisance images", "cosine", "dot product", "nuisance"),
    ("V rescues nuisance images", "cosine, V", "cosine", "nuisance"),
    ("without R, the one-sided projection is better", "one-sided P", "two-sided P", "clean"),
    ("R_train alone hurts (two-sided)", "two-sided P", "two-sided P, R_train", "clean"),
    ("R_train alone hurts (one-sided)", "one-sided P", "one-sided P, R_train", "clean"),
    ("mixing recovers (two-sided)", "two-sided P, mixed R", "two-sided P, R_train", "clean"),
    ("mixing recovers (one-sided)", "one-sided P, mixed R", "one-sided P, R_train", "clean"),
    ("with R_train, the two-sided projection is better", "two-sided P, R_train", "one-sided P, R_train", "clean"),
    ("with the mixed R, the two-sided projection is better", "two-sided P, mixed R", "one-sided P, mixed R", "clean"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    """Both tests of a form of the score on one kind of images, in percent."""

    same_class: Interval
    right_label: Interval


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CurvatureReport:
    """R_train and the projected Hessian of one network and projection.

    Attributes:
        autocorrelation: R_train.
        hessian: P H Pᵀ, with 1/√V on both sides of H.
        agreement: Cosine of the angle between both as vectors of their entries.
        angles: Angles between their leading subspaces in degrees, ascending.
        shared: Share of the leading subspace of R_train that lies in that of R_eval: the mean squared cosine
            of the angles between both.
        effective_ranks: (tr R)²/tr R² of R_train and R_eval: the number of directions that carry them.
    """

    autocorrelation: Float[Tensor, "dim dim"]
    hessian: Float[Tensor, "dim dim"]
    agreement: float
    angles: list[float]
    shared: float
    effective_ranks: tuple[float, float]

    @classmethod
    def of(cls, curvature: Curvature, hessian: Float[Tensor, "dim dim"]) -> "CurvatureReport":
        """Compare R_train with the Hessian, and with R_eval."""
        r, evaluation, h = curvature.train[0].double(), curvature.evaluation[0].double(), hessian.double()
        h = (h + h.T) / 2
        cosines = _subspace_cosines(r, h)
        return cls(
            autocorrelation=r,
            hessian=h,
            agreement=float((r * h).sum() / (r.norm() * h.norm())),
            angles=torch.rad2deg(torch.arccos(cosines)).sort().values.tolist(),
            effective_ranks=(_effective_rank(r), _effective_rank(evaluation)),
            shared=float(_subspace_cosines(r, evaluation).square().mean()),
        )

    @property
    def spectra(self) -> dict[str, list[float]]:
        """Eigenvalues of both, from the largest."""
        return {
            name: torch.linalg.eigvalsh(matrix).flip(0).tolist()
            for name, matrix in (("R_train", self.autocorrelation), ("Hessian", self.hessian))
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Study:
    """All that the page, the figures and the notebook show.

    Attributes:
        source: Name of the images.
        settings: How the networks were made.
        classes: Number of classes.
        parameters: Number of parameters of a network, by condition.
        dimensions: Dimensions of φ, by condition.
        accuracy: Accuracy of the networks on training images and queries in percent, by condition.
        tested: Both tests by condition and form of the score.
        claims: The published orderings.
        mixing: λ by the paper's rule, by projection; clean images, one per seed.
        damping: Ridge on R_train, likewise.
        coordinates: Root mean square of each coordinate of G and of G/√V over the training images, sorted
            from the largest, by condition; first seed.
        projection_errors: Root mean square error of the cosines of projected G/√V, by projection: one
            pair of dimensions and error for each side; clean, first seed.
        weights: Same-class accuracy in percent by λ, by projection; clean, first seed.
        leading: Same-class accuracy in percent if φ is reduced to the leading eigenvectors of R_train and
            whitened, or only reduced, by number; clean, two-sided, first seed.
        curvature: R_train and the Hessian, by projection; clean, first seed.
    """

    source: str
    settings: Settings
    classes: int
    parameters: Mapping[Condition, int]
    dimensions: Mapping[Condition, int]
    accuracy: Mapping[Condition, tuple[Interval, Interval]]
    tested: Mapping[Condition, Mapping[str, Tested]]
    claims: tuple[Claim, ...]
    mixing: Mapping[str, list[float]]
    damping: Mapping[str, list[float]]
    coordinates: Mapping[Condition, tuple[list[float], list[float]]]
    projection_errors: Mapping[str, list[tuple[int, float]]]
    weights: Mapping[str, list[tuple[float, float]]]
    leading: list[tuple[int, float, float]]
    curvature: Mapping[str, CurvatureReport]

    def to_json(self) -> str:
        """All numbers but the matrices, as JSON."""
        fields: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "curvature"
        }
        fields["claims"] = [{**dataclasses.asdict(claim), "verdict": claim.verdict} for claim in self.claims]
        fields["curvature"] = {
            name: {
                "agreement": report.agreement,
                "angles": report.angles,
                "shared": report.shared,
                "effective_ranks": report.effective_ranks,
                "spectra": report.spectra,
            }
            for name, report in self.curvature.items()
        }
        return json.dumps(fields, indent=1, default=dataclasses.asdict, ensure_ascii=False) + "\n"


def run_study(
    images: Images, source: str, settings: Settings, *, advance: Callable[[int], object] = lambda count: None
) -> Study:
    """Train the networks and measure everything; `advance` is called after each of `steps` of it.

    Raises:
        OptionError: There are too few images.
    """
    settings.check(images)
    accuracies: dict[tuple[Condition, str], list[Accuracies]] = {}
    accuracy: dict[Condition, list[tuple[float, float]]] = {condition: [] for condition in CONDITIONS}
    mixing: dict[str, list[float]] = {name: [] for name in PROJECTIONS}
    damping: dict[str, list[float]] = {name: [] for name in PROJECTIONS}
    first: dict[Condition, Trained] = {}
    for seed in range(settings.seeds):
        for condition in CONDITIONS:
            trained = Trained.of(images, condition, seed, settings)
            network = trained.equation.network
            accuracy[condition].append((network.accuracy(trained.train), network.accuracy(trained.queries)))
            for variant in VARIANTS:
                found = trained.equation.accuracies(variant)
                accuracies.setdefault((condition, variant.name), []).append(found)
            if condition == "clean":
                for name in PROJECTIONS:
                    mixing[name].append(trained.equation.curvature(name).mixing.value)
                    damping[name].append(trained.equation.curvature(name).damping)
            first.setdefault(condition, trained)
            advance(1)
    clean = first["clean"]
    study = Study(
        source=source,
        settings=settings,
        classes=images.classes,
        parameters={condition: trained.equation.network.parameters for condition, trained in first.items()},
        dimensions={
            condition: trained.equation.projections["two-sided"].dimensions for condition, trained in first.items()
        },
        accuracy={condition: _accuracy(values) for condition, values in accuracy.items()},
        tested={
            condition: {variant.name: _tested(accuracies[condition, variant.name]) for variant in VARIANTS}
            for condition in CONDITIONS
        },
        claims=tuple(_claim(accuracies, *row) for row in _CLAIMS),
        mixing=mixing,
        damping=damping,
        coordinates={condition: _coordinates(trained.equation) for condition, trained in first.items()},
        projection_errors=_projection_errors(clean.equation),
        weights={name: list(_by_weight(clean.equation, name)) for name in PROJECTIONS},
        leading=list(_by_leading(clean.equation)),
        curvature={
            name: CurvatureReport.of(
                clean.equation.curvature(name), clean.equation.projected_hessian(name, clean.train)
            )
            for name in PROJECTIONS
        },
    )
    advance(1)
    return study


def _subspace_cosines(first: Float[Tensor, "dim dim"], second: Float[Tensor, "dim dim"]) -> Float[Tensor, "angles"]:
    """Cosines of the angles between the spaces of the leading eigenvectors."""
    leading = [torch.linalg.eigh(each).eigenvectors[:, -ANGLES:] for each in (first, second)]
    return torch.linalg.svdvals(leading[0].T @ leading[1]).clamp(max=1)


def _effective_rank(r: Float[Tensor, "dim dim"]) -> float:
    return float(r.trace() ** 2 / r.square().sum())


def steps(settings: Settings) -> int:
    """How often `run_study` calls `advance`."""
    return settings.seeds * len(CONDITIONS) + 1


def _accuracy(values: list[tuple[float, float]]) -> tuple[Interval, Interval]:
    """Training and query accuracy in percent over seeds."""
    table = 100 * np.array(values, dtype=np.float64)  # [seeds, 2]
    return interval(table[:, :1]), interval(table[:, 1:])


def _tested(found: list[Accuracies]) -> Tested:
    return Tested(
        same_class=interval(100 * np.stack([each.same_class for each in found])),
        right_label=interval(100 * np.stack([each.right_label for each in found])),
    )


def _claim(
    found: Mapping[tuple[Condition, str], list[Accuracies]], statement: str, better: str, worse: str,
    condition: Condition,
) -> Claim:  # fmt: skip
    differences = [
        first.same_class - second.same_class
        for first, second in zip(found[condition, better], found[condition, worse], strict=True)
    ]
    return Claim(
        statement=statement, better=better, worse=worse, condition=condition,
        difference=interval(100 * np.stack(differences)),
    )  # fmt: skip


def _coordinates(equation: Equation) -> tuple[list[float], list[float]]:
    """Root mean square of each coordinate, sorted, before and after √V."""
    before, after = (
        equation.vectors("train", "none", second_moment=second_moment).square().mean(dim=0).sqrt()
        for second_moment in (False, True)
    )
    return before.sort(descending=True).values.tolist(), after.sort(descending=True).values.tolist()


def _projection_errors(equation: Equation) -> dict[str, list[tuple[int, float]]]:
    gradients = {role: equation.gradients(role, second_moment=True) for role in ("query", "train")}
    shapes = equation.network.shapes
    exact = _cosines(*(equation.vectors(role, "none", second_moment=True) for role in ("query", "train")))
    errors: dict[str, list[tuple[int, float]]] = {name: [] for name in PROJECTIONS}
    for side in _SIDES:
        squares = dict.fromkeys(PROJECTIONS, 0.0)
        dimensions = 0
        for seed in range(_PROJECTION_SEEDS):
            two_sided = TwoSided(shapes, side=side, seed=seed)
            dimensions = two_sided.dimensions
            one_sided = OneSided(shapes, dimensions=dimensions, seed=seed)
            for name, projection in zip(PROJECTIONS, (two_sided, one_sided), strict=True):
                found = _cosines(*(projection.apply(gradients[role]) for role in ("query", "train")))
                squares[name] += float((found - exact).square().mean()) / _PROJECTION_SEEDS
        for name, square in squares.items():
            errors[name].append((dimensions, square**0.5))
    return errors


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    normalize = torch.nn.functional.normalize
    return normalize(first, dim=1) @ normalize(second, dim=1).T


def _by_weight(equation: Equation, projection: ProjectionName) -> Iterator[tuple[float, float]]:
    """Same-class accuracy by λ; a λ with which R is singular is left out."""
    variant = _with_projection(projection)
    for weight in _WEIGHTS:
        try:
            found = equation.accuracies(variant, mixing=weight)
        except CurvatureError:
            continue
        yield weight, float(100 * found.same_class.mean())


def _with_projection(projection: ProjectionName) -> Variant:
    return BY_NAME[f"{projection} P, mixed R"]


def _by_leading(equation: Equation) -> Iterator[tuple[int, float, float]]:
    """Same-class accuracy of φ in the leading eigenvectors of R_train: whitened, and only reduced."""
    r = equation.curvature("two-sided").train[0].double()
    values, eigenvectors = torch.linalg.eigh(r)
    order = values.argsort(descending=True)
    values, eigenvectors = values[order].clamp_min(1e-12 * float(values.max())), eigenvectors[:, order]
    phi: dict[Role, Tensor] = {role: equation.vectors(role, "two-sided", second_moment=True).double() for role in ROLES}
    for count in sorted({min(count, len(r)) for count in _LEADING}):
        reduced: dict[Role, Tensor] = {role: each @ eigenvectors[:, :count] for role, each in phi.items()}
        whitened: dict[Role, Tensor] = {role: each / values[:count].sqrt() for role, each in reduced.items()}
        accuracies = [
            float(100 * equation.tested(vectors, unit=True).same_class.mean()) for vectors in (whitened, reduced)
        ]
        yield count, accuracies[0], accuracies[1]
