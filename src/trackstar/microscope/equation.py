"""The parts of Eq. 2 on one network: V, P, R_train, R_eval and their mix, each by the package's own code."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.curvature.autocorrelation import autocorrelation
from trackstar.curvature.mixing import Mixing, mixing_by_spectra, spectrum_of_autocorrelation
from trackstar.curvature.whitening import Whitening, shrinkage_damping, whitening
from trackstar.gradients.projection import inverse_roots
from trackstar.gradients.second_moment import ElementwiseMoment, SecondMoment
from trackstar.microscope.accuracy import Accuracies
from trackstar.microscope.images import Images
from trackstar.microscope.network import Gradients, Network, flattened
from trackstar.microscope.projections import OneSided, Projection, TwoSided
from trackstar.microscope.variants import ProjectionName, Variant
from trackstar.model.layer_blocks import WeightMatrix

SIDE = 8
"""Rows and columns of a projected matrix: 8² dimensions a matrix and 8 a bias, 144 for two layers."""

Role = Literal["train", "wrong", "query"]
ROLES: tuple[Role, ...] = ("train", "wrong", "query")
"""Training images with their labels, the same with wrong labels, and the queries."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curvature:
    """R of one projection, and W with WᵀW = R⁻¹.

    Attributes:
        train: R_train, [1, dimensions, dimensions].
        evaluation: R_eval, of the queries.
        damping: Ridge on R_train, as a fraction of its mean eigenvalue, by shrinkage.
        mixing: λ by the paper's rule.
    """

    train: Float[Tensor, "1 dim dim"]
    evaluation: Float[Tensor, "1 dim dim"]
    damping: float
    mixing: Mixing

    def whitening(self, mixing: float) -> Whitening:
        """W for a λ."""
        return whitening(self.train, self.evaluation, mixing=mixing, damping=self.damping)


class Equation:
    """The scores of one network's training images for queries.

    Args:
        network: The network.
        train: Its training images.
        wrong: The same images, each with a wrong label.
        queries: Images that were not trained on.
        seed: Seed of the projections.
        side: Rows and columns of a projected matrix.
    """

    def __init__(
        self, network: Network, *, train: Images, wrong: Images, queries: Images, seed: int, side: int = SIDE
    ) -> None:
        self.network = network
        self.same = queries.labels[:, None] == train.labels[None, :]
        """Whether a training image has the query's class: [queries, train]."""
        self._gradients: Mapping[Role, Gradients] = {
            "train": network.gradients(train),
            "wrong": network.gradients(wrong),
            "query": network.gradients(queries),
        }
        two_sided = TwoSided(network.shapes, side=side, seed=seed)
        self.projections: dict[ProjectionName, Projection] = {
            "two-sided": two_sided,
            "one-sided": OneSided(network.shapes, dimensions=two_sided.dimensions, seed=seed),
        }

    @functools.cached_property
    def inverse_root(self) -> dict[str, Tensor]:
        """1/√V of each parameter, with V the mean square of the training images' gradients."""
        squares = {name: gradient.square().mean(dim=0) for name, gradient in self._gradients["train"].items()}
        moments = {name: ElementwiseMoment(entries=square.reshape(len(square), -1)) for name, square in squares.items()}
        second_moment = SecondMoment(kind="elementwise", moments=moments, source="the training images")
        roots = {}
        for name, square in squares.items():
            matrix = WeightMatrix(
                name=name, layer=0, kind="mlp", block=0, rows=len(square), columns=square[0].numel(), transposed=False
            )
            root = inverse_roots(matrix, second_moment)
            assert isinstance(root, Tensor), "V is elementwise"
            roots[name] = root.reshape(square.shape)
        return roots

    def gradients(self, role: Role, *, second_moment: bool) -> dict[str, Tensor]:
        """∇Loss of each image, or ∇Loss/√V."""
        found = self._gradients[role]
        if not second_moment:
            return dict(found)
        return {name: gradient * self.inverse_root[name] for name, gradient in found.items()}

    def vectors(self, role: Role, projection: ProjectionName, *, second_moment: bool) -> Float[Tensor, "images dim"]:
        """G or φ of each image, neither whitened nor normalised."""
        gradients = self.gradients(role, second_moment=second_moment)
        return flattened(gradients) if projection == "none" else self.projections[projection].apply(gradients)

    @functools.cache  # noqa: B019  (an equation lives as long as its figures are drawn)
    def curvature(self, projection: ProjectionName) -> Curvature:
        """R of one projection of ∇Loss/√V."""
        train, query = (self.vectors(role, projection, second_moment=True) for role in ("train", "query"))
        of_train, of_query = autocorrelation(train, 1), autocorrelation(query, 1)
        mixing = mixing_by_spectra(
            spectrum_of_autocorrelation(of_query), spectrum_of_autocorrelation(of_train),
            dimensions=train.shape[1], queries=len(query),
        )  # fmt: skip
        damping = shrinkage_damping(of_train, len(train))
        return Curvature(train=of_train, evaluation=of_query, damping=damping, mixing=mixing)

    def accuracies(self, variant: Variant, *, mixing: float | None = None) -> Accuracies:
        """Both tests of a form of the score.

        Args:
            variant: The form.
            mixing: λ if R is mixed; None is the paper's rule.
        """
        vectors: dict[Role, Tensor] = {
            role: self.vectors(role, variant.projection, second_moment=variant.second_moment) for role in ROLES
        }
        if variant.whitened is not None:
            curvature = self.curvature(variant.projection)
            weight = curvature.mixing.value if mixing is None else mixing
            whitened = curvature.whitening(weight if variant.whitened == "mixed" else 0.0)
            vectors = {role: whitened.apply(each) for role, each in vectors.items()}
        return self.tested(vectors, unit=variant.unit)

    def tested(self, vectors: Mapping[Role, Tensor], *, unit: bool) -> Accuracies:
        """Both tests of the inner products of given vectors."""
        if unit:
            vectors = {role: torch.nn.functional.normalize(each, dim=1) for role, each in vectors.items()}
        right, wrong = (vectors["query"] @ vectors[role].T for role in ("train", "wrong"))
        return Accuracies.of(right, wrong, self.same)

    def projected_hessian(self, projection: ProjectionName, train: Images) -> Float[Tensor, "dim dim"]:
        """P H Pᵀ of the mean training loss, with 1/√V on both sides, by Hessian-vector products."""
        root = torch.cat([each.flatten() for each in self.inverse_root.values()])
        directions = self.projections[projection].rows() * root
        return directions @ self.network.hessian_products(train, directions).T
