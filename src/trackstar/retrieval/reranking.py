"""Exact influences of chosen candidates, or of all of them, from gradients computed again (Eq. 1-2).

A store of few bits ranks coarsely: its best N candidates are recomputed from their tokens, which the index keeps, and
ranked by what Eq. 1 gives without any rounding. How likely it is that one of the true first k is not among the N is
estimated from the N themselves.

Given a candidate's coarse score, its exact score is taken to be normal around a line in the coarse one, with the same
spread everywhere. Line and spread are fitted to the candidates ranked again; choosing these by their coarse scores does
not bias such a fit, since the coarse score is what it is given. A candidate that was not ranked again then belongs to
the first k with the probability that it exceeds the k-th exact score.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trackstar.choices import CodecName
from trackstar.corpus import TokenizedExample
from trackstar.curvature.task import TaskCorrection
from trackstar.errors import OptionError
from trackstar.gradients.projector import GradientProjector, projected
from trackstar.model.language_model import LanguageModel
from trackstar.progress import Progress
from trackstar.retrieval.scoring import Scorer, inverse_of, scores_of
from trackstar.retrieval.top_candidates import TopCandidates, best_of, top_candidates
from trackstar.store import Index, have_shapes
from trackstar.workers.protocol import THIS_PROCESS, Advance, Workers
from trackstar.workers.setups import GradientSetup

# Examples whose gradients are held at once.
_ROWS_AT_ONCE = 256
# Of the coarse ranking this many times N are kept: those beyond the N are what may have been missed. Of the candidates
# beyond these, whose number makes up for how unlikely each is, this many are looked at.
_LOOKED_AT = 4
_SAMPLED = 2048
# Fewer pairs of scores than this say nothing of the codes' error.
_FEWEST = 12

RERANKED: dict[CodecName, int] = {
    "float32": 0, "bfloat16": 0, "float16": 0, "int8": 20, "4-bit": 50, "2-bit": 200, "1-bit": 500,
}  # fmt: skip
"""How many candidates of each query are ranked again by default: in docs/stores.md's curve 98.9% of the exact first ten
of 1-bit codes are among them, and all of the others."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reranked:
    """A ranking whose first candidates are exact.

    Attributes:
        top: The candidates.
        missed: For each query the estimated chance that one of its true first k is not among those ranked again; None
            where too few were ranked again to say.
        recomputed: How many candidates' gradients were computed.
    """

    top: TopCandidates
    missed: tuple[float | None, ...]
    recomputed: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Influences:
    """Eq. 1 of examples whose gradients are computed."""

    correction: TaskCorrection
    vectors: Float[Tensor, "queries dimensions"]

    def __call__(
        self, projector: GradientProjector, examples: Sequence[TokenizedExample], advance: Advance
    ) -> Float[Tensor, "queries examples"]:
        return influences(self.correction, self.vectors, projected(projector, examples, advance)[0])


def influences(
    correction: TaskCorrection,
    vectors: Float[Tensor, "queries dimensions"],
    phi: Float[Tensor, "examples dimensions"],
) -> Float[Tensor, "queries examples"]:
    """Eq. 1 of gradients, without any rounding: what queries' vectors meet in the index's coordinates, by its norm."""
    coordinates = correction.coordinates(phi)
    return vectors @ coordinates.T * inverse_of(correction.whitening.norms(coordinates))


class ExactScores:
    """Influences of an index's candidates on queries, from the model instead of the store.

    Args:
        index: The candidates.
        model: The model that was indexed.
        setup: How φ is made.
        correction: R for the task.
        vectors: What each query meets candidates with, in the index's coordinates.
        workers: Who computes gradients.
        progress: Whether progress is shown where stderr is a terminal.
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
        self._work = _Influences(correction=correction, vectors=vectors.float())
        self._workers = workers
        self._progress = progress

    @property
    def queries(self) -> int:
        """Number of queries."""
        return len(self._work.vectors)

    def queries_digest(self) -> str:
        """Names the queries."""
        return hashlib.blake2b(self._work.vectors.contiguous().numpy().tobytes(), digest_size=8).hexdigest()

    def of(self, rows: Sequence[int]) -> Float[Tensor, "queries rows"]:
        """Scores of some rows of the index, in their order."""
        found = torch.empty(len(self._work.vectors), len(rows))
        for first, part in self.parts(rows):
            found[:, first : first + part.shape[1]] = part
        return found

    def of_each(self, rows: Int64[Tensor, "queries own"]) -> Float[Tensor, "queries own"]:
        """Each query's scores of rows of its own; no more is held at a time than these and some hundred rows'."""
        union = rows.unique()
        places = torch.searchsorted(union, rows)
        found = torch.empty(rows.shape)
        for first, part in self.parts(union.tolist()):
            there = (places >= first) & (places < first + part.shape[1])
            chosen = part.gather(1, (places - first).clamp(0, part.shape[1] - 1))
            found[there] = chosen[there]
        return found

    def parts(self, rows: Sequence[int]) -> Iterator[tuple[int, Float[Tensor, "queries part"]]]:
        """The same, some hundred rows at a time: the place of the first, and their scores."""
        first = 0
        with Progress("Ranking again", unit="examples", total=len(rows), shown=self._progress) as bar:
            for part in self._workers.gradients(
                self._model, self._setup, self._work, self._examples(rows), advance=bar.advance, note=bar.note
            ):
                yield first, part
                first += part.shape[1]

    def _examples(self, rows: Sequence[int]) -> Iterator[list[TokenizedExample]]:
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            yield [stored.example for stored in self._index.some_examples(rows[first : first + _ROWS_AT_ONCE])]


def rerank(
    index: Index,
    scorer: Scorer,
    exact: ExactScores,
    k: int,
    *,
    reranked: int,
    workers: Workers = THIS_PROCESS,
    progress: bool = False,
) -> Reranked:
    """The k proponents and opponents of each query: the best N of each by the store, ranked by exact scores.

    Args:
        index: The candidates.
        scorer: How they are scored by the store.
        exact: Gives exact scores.
        k: How many to give.
        reranked: N, at least k.
        workers: Who goes through the index.
        progress: Whether the pass over the index is shown.

    Raises:
        OptionError: N is less than k.
    """
    if reranked < k:
        raise OptionError(f"--rerank {reranked}: expected at least as many as --top {k}, or 0 to leave it out")
    looked_at = min(index.rows, _LOOKED_AT * reranked)
    coarse = top_candidates(index, scorer, looked_at, workers=workers, progress=progress)
    count = min(reranked, index.rows)
    # A query's ranking is of its own candidates alone: it does not depend on what else is asked at the same time.
    own = torch.cat([coarse.proponents[:, :count], coarse.opponents[:, :count]], dim=1).sort(dim=1).values
    scores = exact.of_each(own)
    # In a small index a candidate may be among the best and the worst; it counts once.
    again = torch.zeros_like(own, dtype=torch.bool)
    again[:, 1:] = own[:, 1:] == own[:, :-1]
    most = min(k, index.rows)
    proponents = best_of(scores.masked_fill(again, -math.inf), own, most)
    opponents = best_of((-scores).masked_fill(again, -math.inf), own, most)
    others = _Others(index, scorer, coarse)
    missed = []
    for query in range(len(scores)):
        left, weights = others.of(query, own[query])
        missed.append(
            missed_chance(
                coarse.proponent_scores[query, :count],
                scores[query, torch.searchsorted(own[query], coarse.proponents[query, :count].contiguous())],
                left,
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
    return Reranked(top=top, missed=tuple(missed), recomputed=len(own.unique()))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a coarse score says of the exact one: a line, and the spread around it."""

    slope: float
    intercept: float
    spread: float

    def expected(self, coarse: Float[Tensor, "candidates"]) -> Float[Tensor, "candidates"]:
        """The exact scores to be expected of candidates with these coarse ones."""
        return self.intercept + self.slope * coarse


def calibration(coarse: Float[Tensor, "reranked"], exact: Float[Tensor, "reranked"]) -> Calibration:
    """The line of least squares through candidates whose exact scores are known."""
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
    """The chance that a candidate that was not ranked again belongs to the true first k.

    Args:
        coarse: Coarse scores of the candidates that were ranked again for this query.
        exact: Their exact scores.
        others: Coarse scores of candidates that were not.
        threshold: The k-th best exact score.
        weights: How many candidates each of these stands for; None is one.

    Returns:
        1 - Π(1 - p), each p that of an exact score above the threshold. None where too few were ranked again.
    """
    if not len(others):
        return 0.0
    if len(exact) < _FEWEST:
        return None
    fitted = calibration(coarse, exact)
    # log Π(1 - p) with p = Φ(z), and 1 - p = Φ(-z)
    z = (fitted.expected(others.double()) - threshold) / max(fitted.spread, 1e-300)
    logarithms = torch.special.log_ndtr(-z)
    # Adding zero turns -0 into 0.
    return float(-torch.expm1((logarithms if weights is None else weights * logarithms).sum())) + 0.0


class _Others:
    """Candidates that were not ranked again: the next best of each query, and a sample of all that come after these.

    Args:
        index: The candidates.
        scorer: How the store scores them.
        coarse: Of each query the next best, in order, and before them those that were ranked again.
    """

    def __init__(self, index: Index, scorer: Scorer, coarse: TopCandidates) -> None:
        self._coarse = coarse
        self._beyond = index.rows - coarse.proponents.shape[1]
        count = min(_SAMPLED, index.rows) if self._beyond else 0
        self._sampled = torch.arange(count) * index.rows // max(count, 1)
        self._scores = scores_of(index, scorer, self._sampled)

    def of(self, query: int, again: Int64[Tensor, "again"]) -> tuple[Float[Tensor, "others"], Float[Tensor, "others"]]:
        """Coarse scores, and how many candidates each stands for, but for the rows that were ranked again."""
        near = ~torch.isin(self._coarse.proponents[query], again)
        next_best = self._coarse.proponent_scores[query][near]
        if not self._beyond:
            return next_best, torch.ones(len(next_best))
        below = self._scores[query] < self._coarse.proponent_scores[query, -1]
        weight = self._beyond / max(1, int(below.sum()))
        sampled = self._scores[query][below & ~torch.isin(self._sampled, again)]
        return torch.cat([next_best, sampled]), torch.cat(
            [torch.ones(len(next_best)), torch.full((len(sampled),), weight)]
        )


def _whole(kept: Mapping[str, Tensor], queries: int, k: int, rows: int) -> bool:
    """Whether what was kept is what `exact_top` keeps of so many queries and of an index of so many rows."""
    if not have_shapes(kept, done=()) or kept["done"].dtype is not torch.int64 or not 1 <= int(kept["done"]) <= rows:
        return False
    shape = (queries, min(k, int(kept["done"])))
    if not have_shapes(kept, best=shape, best_rows=shape, worst=shape, worst_rows=shape):
        return False
    places = torch.cat([kept["best_rows"], kept["worst_rows"]])
    return places.dtype is torch.int64 and bool(((places >= 0) & (places < rows)).all())


def exact_top(index: Index, exact: ExactScores, k: int, *, key: str) -> TopCandidates:
    """The k proponents and opponents of each query with every candidate's gradient computed again.

    What has been gone through is kept with the index under a name made of `key`, which names the R, the queries and k:
    a later call goes on from there.
    """
    best: tuple[Tensor, Tensor] | None = None
    worst: tuple[Tensor, Tensor] | None = None
    key = f"{key}-{exact.queries_digest()}-{k}"
    kept = index.load_derived(f"exact-{key}")
    if kept is not None and not _whole(kept, exact.queries, k, index.rows):
        kept = None
    start = int(kept["done"]) if kept is not None else 0
    if kept is not None:
        best, worst = (kept["best"], kept["best_rows"]), (kept["worst"], kept["worst_rows"])
    for first, part in exact.parts(range(start, index.rows)):
        rows = torch.arange(start + first, start + first + part.shape[1])
        best, worst = best_of(part, rows, k, before=best), best_of(-part, rows, k, before=worst)
        index.save_derived(
            f"exact-{key}",
            {
                "done": torch.tensor(int(rows[-1]) + 1),
                "best": best[0],
                "best_rows": best[1],
                "worst": worst[0],
                "worst_rows": worst[1],
            },
        )
    assert best is not None, "an index has at least one example"
    assert worst is not None, "an index has at least one example"
    return TopCandidates(proponents=best[1], proponent_scores=best[0], opponents=worst[1], opponent_scores=-worst[0])
