"""Rank by the gradients of an index: TrackStar, and TrackStar without some of its parts (paper, Table 1).

| method       | V | R               | unit norm | also known as                                  |
|--------------|---|-----------------|-----------|------------------------------------------------|
| experiment 1 |   |                 |           | TracIn (Pruthi et al. 2020) of one checkpoint  |
| experiment 2 |   |                 | yes       | gradient cosine                                |
| experiment 3 |   | R_train         | yes       | LoGra (Choe et al. 2024) with unit norm        |
| experiment 4 | V |                 | yes       | LESS (Xia et al. 2024), Akyürek et al. 2022    |
| experiment 5 | V | R_train         | yes       |                                                |
| TrackStar    | V | R_eval, R_train | yes       | this paper                                     |
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from trackstar.attribution.answering import query_gradients
from trackstar.choices import Output, ProjectionKind
from trackstar.corpus import Query
from trackstar.curvature.task import task_correction
from trackstar.errors import IndexMismatchError
from trackstar.model.language_model import LanguageModel
from trackstar.retrieval.scoring import Scorer, all_scores, cosine_scorer, dot_product_scorer, trackstar_scorer
from trackstar.store import Index
from trackstar.workers.protocol import THIS_PROCESS, Workers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GradientMethod:
    """A method that ranks by inner products of projected gradients.

    Attributes:
        name: Name in tables.
        second_moment: Whether gradients are divided by √V, and so whether the index must be made
            with V.
        correction: The R that both sides are whitened by: `none`, `train` (R_train) or `task`
            (mixed with R_eval, Eq. 3).
        unit_norm: Whether both sides are scaled to unit norm.
        output: The function that is differentiated.
        projection: `two-sided` (Eq. 4), or `one-sided`: dense, of flattened gradients.
    """

    name: str
    second_moment: bool
    correction: Literal["none", "train", "task"]
    unit_norm: bool = True
    output: Output = "loss"
    projection: ProjectionKind = "two-sided"


EXPERIMENTS = (
    GradientMethod(name="experiment 1", second_moment=False, correction="none", unit_norm=False),
    GradientMethod(name="experiment 2", second_moment=False, correction="none"),
    GradientMethod(name="experiment 3", second_moment=False, correction="train"),
    GradientMethod(name="experiment 4", second_moment=True, correction="none"),
    GradientMethod(name="experiment 5", second_moment=True, correction="train"),
)
"""Table 1's experiments 1-5."""

TRACKSTAR = GradientMethod(name="TrackStar", second_moment=True, correction="task")

OTHER_OUTPUTS = (
    GradientMethod(name="TrackStar, margin", second_moment=True, correction="task", output="margin"),
    GradientMethod(name="TrackStar, logit", second_moment=True, correction="task", output="logit"),
)
"""TrackStar with output functions other than the loss (Table A.3)."""

ONE_SIDED = GradientMethod(name="TrackStar, one-sided", second_moment=True, correction="task", projection="one-sided")
"""TrackStar with a dense projection of flattened gradients: a reference for small models."""


class IndexedGradients:
    """An index and its model. The index holds φ of candidates; φ of queries is computed once for all methods.

    Args:
        index: The index.
        model: The indexed model.
        batch_tokens: Most tokens per batch of queries, padding included.
        workers: The workers that compute gradients of queries.
        progress: Whether progress is shown.
    """

    def __init__(
        self,
        index: Index,
        model: LanguageModel,
        *,
        batch_tokens: int = 2048,
        workers: Workers = THIS_PROCESS,
        progress: bool = False,
    ) -> None:
        self.index = index
        self.model = model
        self.progress = progress
        self._batch_tokens = batch_tokens
        self._workers = workers
        self._cache: dict[tuple[tuple[str, str, str], ...], Tensor] = {}

    def phi_of(self, queries: Sequence[Query]) -> Float[Tensor, "queries dimensions"]:
        """φ of each query; the φ of the last two sets of queries are cached."""
        key = tuple((query.query_id, query.prompt, query.completion) for query in queries)
        if key not in self._cache:
            while len(self._cache) >= 2:
                self._cache.pop(next(iter(self._cache)))
            phi, _ = query_gradients(
                self.index,
                self.model,
                queries,
                batch_tokens=self._batch_tokens,
                workers=self._workers,
                progress=self.progress,
            )
            self._cache[key] = phi
        return self._cache[key]


class GradientRetriever:
    """A gradient method on an index.

    Args:
        method: The method.
        gradients: An index made for the method, with its model.
        task: The queries that R_eval and λ come from; None takes the queries themselves. Used if
            the method's correction is `task`.
        mixing: λ; None follows the paper's rule.
        damping: Ridge added to R_train, as a fraction of its mean eigenvalue per block; None is
            chosen by `shrinkage_damping`.

    Raises:
        IndexMismatchError: The index was made with another V, output function or projection than
            the method's.
    """

    def __init__(
        self,
        method: GradientMethod,
        gradients: IndexedGradients,
        *,
        task: Sequence[Query] | None = None,
        mixing: float | None = None,
        damping: float | None = None,
    ) -> None:
        check_index(gradients.index, method)
        self._method = method
        self._gradients = gradients
        self._task = task
        self._mixing = mixing
        self._damping = damping

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return self._method.name

    def scores(self, queries: Sequence[Query]) -> Float[Tensor, "queries candidates"]:
        """See `Retriever.scores`; if no task was given, R_eval and λ depend on all the queries."""
        return all_scores(self._gradients.index, self._scorer(queries))

    def _scorer(self, queries: Sequence[Query]) -> Scorer:
        index, phi = self._gradients.index, self._gradients.phi_of(queries)
        if self._method.correction == "none":
            if self._method.unit_norm:
                return cosine_scorer(index, phi)
            return dot_product_scorer(index, phi)
        task_phi = phi if self._task is None else self._gradients.phi_of(self._task)
        mixing = 0.0 if self._method.correction == "train" else self._mixing
        correction = task_correction(index, task_phi, mixing=mixing, damping=self._damping)
        vectors = correction.coordinates(phi)
        if self._method.unit_norm:
            return trackstar_scorer(
                index, vectors, correction.whitening, key=correction.key, progress=self._gradients.progress
            )
        return Scorer(vectors=correction.whitening.apply_inverse(vectors), multipliers=torch.ones(index.rows))


def check_index(index: Index, method: GradientMethod) -> None:
    """Raise if an index was not made for a method.

    Raises:
        IndexMismatchError: Its V, output function or projection is not the method's, or its rows
            are whitened and the method has no R.
    """
    manifest = index.manifest
    if manifest.coordinates == "whitened" and method.correction == "none":
        raise IndexMismatchError(
            f"{index.path}: expected projected coordinates for {method.name}, found whitened ones; call `build_index` "
            'again with `coordinates="projected", codec="float16"`'
        )
    if manifest.projection.kind != method.projection:
        raise IndexMismatchError(
            f"{index.path}: expected a {method.projection} projection for {method.name}, found a "
            f'{manifest.projection.kind} one; call `build_index` again with `projection="{method.projection}"`'
        )
    if manifest.output != method.output:
        raise IndexMismatchError(
            f"{index.path}: expected gradients of the {method.output} for {method.name}, found those of the "
            f'{manifest.output}; call `build_index` again with `output="{method.output}"`'
        )
    has_second_moment = manifest.second_moment.kind != "none"
    if has_second_moment != method.second_moment:
        expected, found, value = ("V", "none", "auto") if method.second_moment else ("no V", "one", "none")
        raise IndexMismatchError(
            f"{index.path}: expected {expected} for {method.name}, found {found}; call `build_index` again with "
            f'`second_moment="{value}"`'
        )
