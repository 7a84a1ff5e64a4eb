"""Methods that rank by gradients kept in an index: TrackStar and what is left of it without its parts (paper, Table 1).

| method       | V | R              | unit norm | known as                                                           |
|--------------|---|----------------|-----------|--------------------------------------------------------------------|
| experiment 1 |   |                |           | gradient dot product, TracIn (Pruthi et al. 2020), one checkpoint   |
| experiment 2 |   |                | yes       | gradient cosine                                                    |
| experiment 3 |   | R_train        | yes       | LoGra (Choe et al. 2024) with unit norm                            |
| experiment 4 | V |                | yes       | LESS (Xia et al. 2024), Akyürek et al. 2022                         |
| experiment 5 | V | R_train        | yes       |                                                                    |
| TrackStar    | V | R_eval, R_train | yes      | this paper                                                         |
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
    """A way to rank by inner products of projected gradients.

    Attributes:
        name: Its name in tables.
        second_moment: Whether gradients are divided by √V: which of two indexes serves it.
        correction: Which R both sides are whitened by: none, R_train alone, or mixed with the task's (Eq. 3).
        unit_norm: Whether both sides are normalised.
        output: What is differentiated.
        projection: Whether P is two-sided, or dense for flattened gradients.
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
"""Table A.3: TrackStar with other output functions than the loss."""


ONE_SIDED = GradientMethod(name="TrackStar, one-sided", second_moment=True, correction="task", projection="one-sided")
"""TrackStar with one dense projection of flattened gradients for every two-sided one: a reference, for small models."""


class IndexedGradients:
    """An index with its model: φ of the candidates is there, φ of queries is computed once for all methods.

    Args:
        index: The candidates.
        model: The model that was indexed.
        batch_tokens: Most tokens of a batch of queries, padding included.
        workers: Who computes queries' gradients.
        progress: Whether passes are shown at a terminal.
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
        self._kept: dict[tuple[tuple[str, str, str], ...], Tensor] = {}

    def of(self, queries: Sequence[Query]) -> Float[Tensor, "queries dimensions"]:
        """φ of each query; that of the last few sets of queries is kept."""
        key = tuple((query.query_id, query.prompt, query.completion) for query in queries)
        if key not in self._kept:
            while len(self._kept) >= 2:
                self._kept.pop(next(iter(self._kept)))
            phi, _ = query_gradients(
                self.index,
                self.model,
                queries,
                batch_tokens=self._batch_tokens,
                workers=self._workers,
                progress=self.progress,
            )
            self._kept[key] = phi
        return self._kept[key]


class GradientRetriever:
    """A gradient method over an index.

    Args:
        method: How candidates are scored.
        gradients: The index that serves it.
        task: The queries that R_eval and λ are taken from; None is the queries themselves. Only for methods whose
            correction is the task's.
        mixing: λ; None follows the paper's rule.
        damping: Fraction of a block's mean eigenvalue added to R; None is chosen by shrinkage.

    Raises:
        IndexMismatchError: The index was made with V or an output function other than the method's.
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
        """See `Retriever.scores`; where no task was given, R_eval and λ depend on all the queries."""
        return all_scores(self._gradients.index, self._scorer(queries))

    def _scorer(self, asked: Sequence[Query]) -> Scorer:
        index, phi = self._gradients.index, self._gradients.of(asked)
        if self._method.correction == "none":
            if self._method.unit_norm:
                return cosine_scorer(index, phi)
            return dot_product_scorer(index, phi)
        task = phi if self._task is None else self._gradients.of(self._task)
        mixing = 0.0 if self._method.correction == "train" else self._mixing
        correction = task_correction(index, task, mixing=mixing, damping=self._damping)
        queries = correction.coordinates(phi)
        if self._method.unit_norm:
            return trackstar_scorer(
                index, queries, correction.whitening, key=correction.key, progress=self._gradients.progress
            )
        return Scorer(vectors=correction.whitening.apply_inverse(queries), multipliers=torch.ones(index.rows))


def check_index(index: Index, method: GradientMethod) -> None:
    """See that an index was made for the method.

    Raises:
        IndexMismatchError: It was made with or without V, for another output function, with another projection, or
            whitened for a method without R.
    """
    manifest = index.manifest
    if manifest.coordinates == "whitened" and method.correction == "none":
        raise IndexMismatchError(
            f"{index.path}: rows are whitened by R_train, which {method.name} does not want; index again with "
            "--coordinates projected --codec float16"
        )
    if manifest.projection.kind != method.projection:
        raise IndexMismatchError(
            f"{index.path}: was made with a {manifest.projection.kind} projection, expected a {method.projection} one "
            f"for {method.name}; index again with --projection {method.projection}"
        )
    if manifest.output != method.output:
        raise IndexMismatchError(
            f"{index.path}: holds gradients of the {manifest.output}, expected the {method.output} for "
            f"{method.name}; index again with --output {method.output}"
        )
    has_second_moment = manifest.second_moment.kind != "none"
    if has_second_moment != method.second_moment:
        found, option = ("none", "auto") if method.second_moment else ("one", "none")
        raise IndexMismatchError(
            f"{index.path}: was made with {found} second moment, which {method.name} does not want; index again with "
            f"--second-moment {option}"
        )
