"""The ranking of an index's candidates for queries: by the store, re-ranked, or exact throughout
(Eq. 1-2).
"""

import dataclasses

from jaxtyping import Float
from torch import Tensor

from trackstar.choices import CodecName
from trackstar.curvature.task import TaskCorrection
from trackstar.model.language_model import LanguageModel
from trackstar.retrieval.plausibility import check_scores, check_top
from trackstar.retrieval.reranking import RERANKED, CoarseRanking, ExactScores, exact_top, rerank
from trackstar.retrieval.scoring import Scorer, inverse_of, unit_queries, whitened_norms
from trackstar.retrieval.top_candidates import TopCandidates, top_candidates
from trackstar.store import Index
from trackstar.workers.protocol import ThisProcess, Workers
from trackstar.workers.setups import GradientSetup


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankingOptions:
    """How candidates are ranked.

    Attributes:
        k: Candidates per query at each end.
        reranked: Candidates per query at each end whose gradients are recomputed; None is the
            codec's `RERANKED`, or k if that is more.
        exact: Whether every candidate's gradient is recomputed.
    """

    k: int
    reranked: int | None = None
    exact: bool = False

    def reranked_for(self, codec: CodecName) -> int:
        """Number of candidates to re-rank for rows in this codec; 0 for none."""
        if self.reranked is not None:
            return self.reranked
        return max(RERANKED[codec], self.k) if RERANKED[codec] else 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranking:
    """Ranked candidates, and how they were ranked.

    Attributes:
        top: The k proponents and opponents of each query.
        missed: Per query, the estimated chance that one of its true first k was not re-ranked; None
            if there is no estimate.
        reranked: Candidates per query at each end that were re-ranked.
        recomputed: Number of candidates whose gradients were recomputed, over all queries.
    """

    top: TopCandidates
    missed: tuple[float | None, ...]
    reranked: int
    recomputed: int


def rank_candidates(
    index: Index,
    model: LanguageModel,
    setup: GradientSetup,
    correction: TaskCorrection,
    phi: Float[Tensor, "queries dimensions"],
    options: RankingOptions,
    *,
    workers: Workers,
    progress: bool,
) -> Ranking:
    """Rank an index's candidates by their influence on each query.

    Args:
        index: The candidates.
        model: The model that was indexed.
        setup: How φ is computed.
        correction: The correction for the task.
        phi: φ of the queries.
        options: How candidates are ranked.
        workers: Where gradients are computed and the index is scanned.
        progress: Whether progress is shown.

    Raises:
        GradientError: A query's gradient is zero.
        OptionError: Fewer candidates are to be re-ranked than returned.
    """
    vectors = unit_queries(correction.coordinates(phi), correction.whitening)
    exact = ExactScores(index, model, setup, correction, vectors, workers=workers, progress=progress)
    none = (None,) * len(phi)
    if options.exact:
        top = exact_top(index, exact, options.k, key=correction.key)
        check_scores(index, top.proponents, top.proponent_scores, exact=True)
        check_scores(index, top.opponents, top.opponent_scores, exact=True)
        return Ranking(top=top, missed=none, reranked=index.rows, recomputed=index.rows)
    norms = whitened_norms(index, correction.whitening, key=correction.key, workers=workers, progress=progress)
    # Workers of a cluster scan on their own devices.
    scanned = vectors.to(model.device) if isinstance(workers, ThisProcess) else vectors
    scorer = Scorer(vectors=scanned, multipliers=inverse_of(norms))
    count = options.reranked_for(index.manifest.codec)
    if not count:
        top = top_candidates(index, scorer, options.k, workers=workers, progress=progress)
        check_top(index, top, exact=False)
        return Ranking(top=top, missed=none, reranked=0, recomputed=0)
    coarse = CoarseRanking.by_scan(index, scorer, count, workers=workers, progress=progress)
    ranking = rerank(coarse, exact, options.k, reranked=count)
    check_top(index, ranking.top, exact=True)
    return Ranking(
        top=ranking.top, missed=ranking.missed, reranked=min(count, index.rows), recomputed=ranking.recomputed
    )
