"""Re-ranking: exact influences of chosen candidates, or of all, from recomputed gradients (Eq.
1-2).

A low-bit store ranks coarsely. The gradients of its best N candidates are recomputed from their
tokens, which the index stores, and the candidates are ranked by Eq. 1 without rounding. The chance
that one of the true first k is not among the N is estimated from the N themselves:

Given a candidate's coarse score, its exact score is modelled as normal around a line in the coarse
score, with the same spread everywhere. Line and spread are fitted to the N re-ranked candidates.
Their selection by coarse score does not bias the fit, since the fit is conditional on the coarse
score. A candidate that was not re-ranked then belongs to the first k with the probability that it
exceeds the k-th exact score.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from trackstar.choices import CodecName
from trackstar.corpus import TokenizedExample
from trackstar.corpus.digests import digest_of_bytes
from trackstar.curvature.low_rank import GradientDirections, TaskWhitening
from trackstar.curvature.task import TaskCorrection
from trackstar.errors import OptionError
from trackstar.gradients.projector import GradientProjector, projected
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.retrieval.scoring import Scorer, inverse_of, scores_of
from trackstar.retrieval.top_candidates import RunningTop, TopCandidates, best_of, top_candidates
from trackstar.store import Index, StoredExample, have_shapes
from trackstar.workers.protocol import THIS_PROCESS, Advance, Workers
from trackstar.workers.setups import GradientSetup
from trackstar.workers.stored_losses import check_losses, check_tokens

# Examples whose gradients are held at once.
_ROWS_AT_ONCE = 256
# Coarse scores that the miss estimate reads: those of the best 4 N candidates, and of a sample of
# 2,048 of the index, each of which stands for many.
_NEAR = 4
_SAMPLED = 2048
# Fewer pairs of scores than this do not determine the error of the codes.
_FEWEST_PAIRS = 12

RERANKED: dict[CodecName, int] = {
    "float32": 0, "bfloat16": 0, "float16": 0, "int8": 20, "4-bit": 50, "2-bit": 200, "1-bit": 500,
}  # fmt: skip
"""Candidates per query that are re-ranked by default: they hold 98.9% of the exact first ten for
1-bit codes, and all of them for the other codecs (docs/stores.md)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Influences:
    """Influences on the queries of examples whose gradients are computed."""

    correction: TaskCorrection
    vectors: Float[Tensor, "queries dimensions"]

    def __call__(
        self, projector: GradientProjector, examples: Sequence[TokenizedExample], advance: Advance
    ) -> tuple[Float[Tensor, "queries examples"], Float[Tensor, "examples"]]:
        """Influences, and the examples' losses in nats."""
        phi, losses = projected(projector, examples, advance)
        return influences(self.correction, self.vectors, phi), losses


def influences(
    correction: TaskCorrection,
    vectors: Float[Tensor, "queries dimensions"],
    phi: Float[Tensor, "examples dimensions"],
) -> Float[Tensor, "queries examples"]:
    """Influences of examples from their φ, without rounding (Eq. 1).

    Args:
        correction: The correction for the task.
        vectors: The queries' vectors; see `unit_queries`.
        phi: φ of the examples.
    """
    coordinates = correction.coordinates(phi)
    return vectors @ coordinates.T * inverse_of(correction.whitening.norms(coordinates))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Products:
    """What influences of an index in whitened coordinates are made of, without whitening candidates.

    Attributes:
        vectors: The queries' vectors in φ's space, W_trainᵀ v_q.
        task: The task's directions there.
    """

    vectors: Float[Tensor, "queries dimensions"]
    task: GradientDirections

    def __call__(
        self, projector: GradientProjector, examples: Sequence[TokenizedExample], advance: Advance
    ) -> tuple[Float64[Tensor, "queries_and_2 examples"], Float[Tensor, "examples"]]:
        """Products of the queries' vectors with φ, and below them the squares along the task; and the
        examples' losses in nats.
        """
        phi, losses = projected(projector, examples, advance)
        return torch.cat([(self.vectors.to(phi) @ phi.T).double(), self.task.squares(phi)]), losses

    def influences(
        self, products: Float64[Tensor, "queries_and_2 examples"], norms: Float[Tensor, "examples"]
    ) -> Float[Tensor, "queries examples"]:
        """Eq. 1 from the products and ‖u‖ of the examples."""
        return products[:-2].float() * inverse_of(self.task.norms(norms, products[-2:]))


def _work(correction: TaskCorrection, vectors: Float[Tensor, "queries dimensions"]) -> "_Influences | _Products":
    """How exact influences are computed: without whitening, where the norms under R_train are stored and
    the task has so few directions that this costs less.
    """
    whitening, train = correction.whitening, correction.train
    if train is None or not isinstance(whitening, TaskWhitening) or 2 * whitening.rank > whitening.directions.shape[2]:
        return _Influences(correction=correction, vectors=vectors)
    return _Products(vectors=train.apply_transposed(vectors), task=whitening.in_gradients(train))


class ExactScores:
    """Influences of an index's candidates, from recomputed gradients.

    Args:
        index: The candidates.
        model: The model that was indexed.
        setup: How φ is computed.
        correction: The correction for the task.
        vectors: The queries' vectors; see `unit_queries`.
        workers: Where gradients are computed.
        progress: Whether progress is shown.
    """

    def __init__(
        self,
        index: Index,
        model: LanguageModel,
        setup: GradientSetup,
        correction: TaskCorrection,
        vectors: Float[Tensor, "queries dimensions"],
        *,
        workers: Workers = THIS_PROCESS,
        progress: bool = False,
    ) -> None:
        self._index = index
        self._model = model
        self._setup = setup
        self._vectors = vectors.float()
        self._correction = correction
        self._workers = workers
        self._progress = progress

    @functools.cached_property
    def _work(self) -> "_Influences | _Products":
        """Made when it is first used, since a ranking by the store alone does not use it."""
        return _work(self._correction, self._vectors)

    @property
    def queries(self) -> int:
        """Number of queries."""
        return len(self._vectors)

    def queries_digest(self) -> str:
        """Digest of the queries' vectors."""
        return digest_of_bytes(self._vectors.contiguous().numpy().tobytes(), bits=64)

    def of_each(self, rows: Int64[Tensor, "queries own"]) -> Float[Tensor, "queries own"]:
        """Each query's scores of its own rows. Memory holds these and the scores of some hundred rows."""
        union = rows.unique()
        places = torch.searchsorted(union, rows)
        scores = torch.empty(rows.shape)
        for first, part in self.parts(union.tolist()):
            inside = (places >= first) & (places < first + part.shape[1])
            chosen = part.gather(1, (places - first).clamp(0, part.shape[1] - 1))
            scores[inside] = chosen[inside]
        return scores

    def parts(self, rows: Sequence[int]) -> Iterator[tuple[int, Float[Tensor, "queries part"]]]:
        """Scores of the rows, some hundred at a time: the place of the first, and queries × rows.

        Raises:
            IndexMismatchError: An example's loss is not the stored one.
            DamagedIndexError: A stored example is damaged.
        """
        first = 0
        work = self._work
        taken: collections.deque[list[StoredExample]] = collections.deque()

        def examples() -> Iterator[list[TokenizedExample]]:
            for start in range(0, len(rows), _ROWS_AT_ONCE):
                stored = self._index.some_examples(rows[start : start + _ROWS_AT_ONCE])
                check_tokens(self._index.path, self._model, stored)
                taken.append(stored)
                yield [one.example for one in stored]

        with Progress("Re-ranking", unit="examples", total=len(rows), shown=self._progress) as bar:
            for part, losses in self._workers.gradients(
                self._model, self._setup, work, examples(), advance=bar.advance, note=bar.note
            ):
                stored = taken.popleft()
                check_losses(self._index, self._model, stored, losses)
                if isinstance(work, _Products):
                    norms = self._index.some_norms([one.row for one in stored])
                    part = work.influences(part.cpu(), norms)
                yield first, part
                first += part.shape[1]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CoarseRanking:
    """The store's ranking: of each query the best and worst candidates, and a sample of all others.

    Attributes:
        top: The best and worst candidates, at least the N that are re-ranked.
        sampled: Rows of the sample; not read if `top` holds every candidate.
        sampled_scores: Their scores.
        candidates: Number of candidates in the index.
    """

    top: TopCandidates
    sampled: Int64[Tensor, "sampled"]
    sampled_scores: Float[Tensor, "queries sampled"]
    candidates: int

    @classmethod
    def by_scan(
        cls, index: Index, scorer: Scorer, reranked: int, *, workers: Workers = THIS_PROCESS, progress: bool = False
    ) -> "CoarseRanking":
        """Rank an index's candidates by one pass over its store.

        Args:
            index: The candidates.
            scorer: Scores the candidates.
            reranked: N.
            workers: Where the index is scanned.
            progress: Whether the pass is shown.
        """
        top = top_candidates(index, scorer, min(index.rows, _NEAR * reranked), workers=workers, progress=progress)
        count = min(_SAMPLED, index.rows) if top.proponents.shape[1] < index.rows else 0
        sampled = torch.arange(count) * index.rows // max(count, 1)
        return cls(top=top, sampled=sampled, sampled_scores=scores_of(index, scorer, sampled), candidates=index.rows)

    @classmethod
    def of_scores(cls, scores: Float[Tensor, "queries candidates"], reranked: int) -> "CoarseRanking":
        """Rank candidates whose coarse scores are all known; the sample is all of them.

        Args:
            scores: The coarse scores.
            reranked: N.
        """
        rows = torch.arange(scores.shape[1])
        running = RunningTop(reranked)
        running.add(scores, rows)
        return cls(top=running.top, sampled=rows, sampled_scores=scores, candidates=len(rows))

    def others(
        self, query: int, reranked: Int64[Tensor, "own"]
    ) -> tuple[Float[Tensor, "others"], Float[Tensor, "others"]]:
        """Coarse scores of candidates that were not re-ranked, and the number that each of them
        stands for.
        """
        next_best = self.top.proponent_scores[query][~torch.isin(self.top.proponents[query], reranked)]
        beyond = self.candidates - self.top.proponents.shape[1]
        if not beyond:
            return next_best, torch.ones(len(next_best))
        below = self.sampled_scores[query] < self.top.proponent_scores[query, -1]
        weight = beyond / max(1, int(below.sum()))
        far = self.sampled_scores[query][below & ~torch.isin(self.sampled, reranked)]
        return torch.cat([next_best, far]), torch.cat([torch.ones(len(next_best)), torch.full((len(far),), weight)])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reranked:
    """A ranking whose first candidates are exact.

    Attributes:
        top: The k proponents and opponents of each query.
        missed: Per query, the estimated chance that one of its true first k was not re-ranked; None
            if too few were re-ranked to estimate it.
        rows: Per query, the rows of its re-ranked candidates, ascending. In a small index a row
            stands twice if it is among the best and the worst.
        scores: Their exact scores.
    """

    top: TopCandidates
    missed: tuple[float | None, ...]
    rows: Int64[Tensor, "queries own"]
    scores: Float[Tensor, "queries own"]

    @property
    def recomputed(self) -> int:
        """Number of candidates whose gradients were recomputed, over all queries."""
        return len(self.rows.unique())


def rerank(coarse: CoarseRanking, exact: ExactScores, k: int, *, reranked: int) -> Reranked:
    """The k proponents and opponents of each query: the store's best and worst N, ranked by exact
    scores.

    A query's ranking depends on its own candidates alone, not on the other queries.

    Args:
        coarse: The store's ranking.
        exact: Computes exact scores.
        k: Candidates per query at each end.
        reranked: N, at least k.

    Raises:
        OptionError: N is less than k.
    """
    if reranked < k:
        raise OptionError(f"`reranked`: expected at least `k={k}`, or 0 to skip re-ranking, found {reranked}")
    count = min(reranked, coarse.candidates)
    best_rows, worst_rows = coarse.top.proponents[:, :count], coarse.top.opponents[:, :count]
    rows = torch.cat([best_rows, worst_rows], dim=1).sort(dim=1).values
    scores = exact.of_each(rows)
    # In a small index a candidate may be among the best and the worst; it counts once.
    repeated = torch.zeros_like(rows, dtype=torch.bool)
    repeated[:, 1:] = rows[:, 1:] == rows[:, :-1]
    most = min(k, coarse.candidates)
    proponents = best_of(scores.masked_fill(repeated, -math.inf), rows, most)
    opponents = best_of((-scores).masked_fill(repeated, -math.inf), rows, most)
    missed = []
    for query in range(len(scores)):
        others, weights = coarse.others(query, rows[query])
        missed.append(
            missed_chance(
                coarse.top.proponent_scores[query, :count],
                scores[query, torch.searchsorted(rows[query], best_rows[query].contiguous())],
                others,
                threshold=float(proponents[0][query, -1]),
                weights=weights,
            )
        )
    top = TopCandidates(
        proponents=proponents[1],
        proponent_scores=proponents[0],
        opponents=opponents[1],
        opponent_scores=-opponents[0],
    )
    return Reranked(top=top, missed=tuple(missed), rows=rows, scores=scores)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The exact score as a function of the coarse one: a line, and the spread around it."""

    slope: float
    intercept: float
    spread: float

    def expected(self, coarse: Float[Tensor, "candidates"]) -> Float[Tensor, "candidates"]:
        """The expected exact scores of candidates with these coarse scores."""
        return self.intercept + self.slope * coarse


def calibration(coarse: Float[Tensor, "reranked"], exact: Float[Tensor, "reranked"]) -> Calibration:
    """The least-squares line through the scores of re-ranked candidates."""
    x, y = coarse.double(), exact.double()
    centred = x - x.mean()
    slope = float((centred * y).sum() / centred.square().sum().clamp_min(1e-300))
    residuals = y - y.mean() - slope * centred
    spread = math.sqrt(float(residuals.square().sum()) / max(1, len(x) - 2))
    return Calibration(slope=slope, intercept=float(y.mean() - slope * x.mean()), spread=spread)


def missed_chance(
    coarse: Float[Tensor, "reranked"],
    exact: Float[Tensor, "reranked"],
    others: Float[Tensor, "others"],
    *,
    threshold: float,
    weights: Float[Tensor, "others"] | None = None,
) -> float | None:
    """The estimated chance that a candidate that was not re-ranked belongs to the true first k.

    Args:
        coarse: Coarse scores of the query's re-ranked candidates.
        exact: Their exact scores.
        others: Coarse scores of candidates that were not re-ranked.
        threshold: The k-th best exact score.
        weights: Number of candidates that each of the others stands for; None is one.

    Returns:
        1 - Π(1 - p), p the probability of an exact score above the threshold, over the others. None
        if too few candidates were re-ranked to estimate it.
    """
    if not len(others):
        return 0.0
    if len(exact) < _FEWEST_PAIRS:
        return None
    fitted = calibration(coarse, exact)
    # p = Φ(z) with z in units of the spread, and log(1 - p) = log Φ(-z).
    z = (fitted.expected(others.double()) - threshold) / max(fitted.spread, 1e-300)
    logarithms = torch.special.log_ndtr(-z)
    # Adding zero turns -0 into 0.
    return float(-torch.expm1((logarithms if weights is None else weights * logarithms).sum())) + 0.0


def exact_top(index: Index, exact: ExactScores, k: int, *, key: str) -> TopCandidates:
    """The k proponents and opponents of each query, with every candidate's gradient recomputed.

    Partial results are cached with the index, and a later call resumes from them.

    Args:
        index: The candidates.
        exact: Computes exact scores.
        k: Candidates per query at each end.
        key: Identifies the correction; the cache's name adds the queries and k.
    """
    name = f"exact-{key}-{exact.queries_digest()}-{k}"
    saved = index.load_derived(name)
    if saved is not None and not _have_partial_shapes(saved, exact.queries, k, index.rows):
        saved = None
    done, top = 0, None
    if saved is not None:
        done = int(saved["done"])
        top = TopCandidates(
            proponents=saved["best_rows"],
            proponent_scores=saved["best"],
            opponents=saved["worst_rows"],
            opponent_scores=-saved["worst"],
        )
    running = RunningTop(k, top)
    for first, part in exact.parts(range(done, index.rows)):
        rows = torch.arange(done + first, done + first + part.shape[1])
        running.add(part, rows)
        top = running.top
        index.save_derived(
            name,
            {
                "done": torch.tensor(int(rows[-1]) + 1),
                "best": top.proponent_scores,
                "best_rows": top.proponents,
                "worst": -top.opponent_scores,
                "worst_rows": top.opponents,
            },
        )
    return running.top


def _have_partial_shapes(saved: Mapping[str, Tensor], queries: int, k: int, rows: int) -> bool:
    """Whether a saved partial result has the shapes that `exact_top` writes for this many queries
    and rows.
    """
    if not have_shapes(saved, done=()) or saved["done"].dtype is not torch.int64 or not 1 <= int(saved["done"]) <= rows:
        return False
    shape = (queries, min(k, int(saved["done"])))
    if not have_shapes(saved, best=shape, best_rows=shape, worst=shape, worst_rows=shape):
        return False
    places = torch.cat([saved["best_rows"], saved["worst_rows"]])
    return places.dtype is torch.int64 and bool(((places >= 0) & (places < rows)).all())
