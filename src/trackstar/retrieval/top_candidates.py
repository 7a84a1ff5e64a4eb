"""The k most positive and most negative candidates of each query, exactly, in one pass over an index."""

import dataclasses
from collections.abc import Iterator
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trackstar.errors import DamagedIndexError, check_at_least
from trackstar.retrieval.float16_scan import CoarseQueries, Finalists
from trackstar.retrieval.scoring import SCAN_BYTES, Scorer, scan_progress, scores
from trackstar.store import Index
from trackstar.workers.protocol import THIS_PROCESS, Workers

# Rows scored in float16 at once, and the most queries for which that is faster than float32.
_COARSE_ROWS = 1024
_MOST_COARSE_QUERIES = 4

# Largest k, and most further candidates, for which scoring a few candidates twice is cheaper than a
# scan in float32.
_MOST_FINALISTS = 2048


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopCandidates:
    """The k most positive and the k most negative candidates of each query, the strongest first.

    Attributes:
        proponents: Rows of the index.
        proponent_scores: Their scores, descending.
        opponents: Rows of the index.
        opponent_scores: Their scores, ascending.
    """

    proponents: Int64[Tensor, "queries k"]
    proponent_scores: Float[Tensor, "queries k"]
    opponents: Int64[Tensor, "queries k"]
    opponent_scores: Float[Tensor, "queries k"]


@final
class RunningTop:
    """The k most positive and most negative candidates among those added so far.

    Candidates are added in the order of their rows. Among candidates with equal scores the first
    one ranks first.

    Args:
        k: Candidates per query at each end.
        top: The candidates before the first addition, if there are any.
    """

    def __init__(self, k: int, top: TopCandidates | None = None) -> None:
        self._k = k
        self._best = None if top is None else (top.proponent_scores, top.proponents)
        self._worst = None if top is None else (-top.opponent_scores, top.opponents)

    def add(self, scores: Float[Tensor, "queries rows"], rows: Int64[Tensor, "rows"]) -> None:
        """Add the next candidates' scores."""
        self._best = best_of(scores, rows, self._k, before=self._best)
        self._worst = best_of(-scores, rows, self._k, before=self._worst)

    @property
    def top(self) -> TopCandidates:
        """The candidates; something must have been added."""
        assert self._best is not None, "an index has at least one example"
        assert self._worst is not None, "an index has at least one example"
        return _joined_ends(self._best, self._worst)


def top_candidates(
    index: Index, scorer: Scorer, k: int, *, workers: Workers = THIS_PROCESS, progress: bool = False
) -> TopCandidates:
    """The k proponents and k opponents of each query, exactly, by one pass over the index.

    Among candidates with equal scores the first in the index ranks first.

    Args:
        index: The candidates.
        scorer: Scores the candidates.
        k: Candidates per query at each end; all of them if the index has fewer.
        workers: Where the index is scanned.
        progress: Whether the pass is shown.

    Raises:
        OptionError: k is not positive.
        DamagedIndexError: A score is not finite, as undamaged rows never give.
    """
    check_at_least("k", k)
    top = _joined(workers.scan(index, _Top(scorer=scorer, k=k, progress=progress), progress=progress), k)
    # Scores that are not finite sort to one of the two ends.
    for rows, ends in ((top.proponents, top.proponent_scores), (top.opponents, top.opponent_scores)):
        bad = (~ends.isfinite()).nonzero()
        if len(bad):
            row = int(rows[tuple(bad[0].tolist())])
            raise DamagedIndexError(
                f"{index.path}: expected finite scores, found NaN or infinity for row {row}; `verify` finds the damage"
            )
    return top


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Top:
    """The k candidates at each end of an index, or of a part of it."""

    scorer: Scorer
    k: int
    progress: bool

    def __call__(self, index: Index) -> TopCandidates:
        return _top_by_scan(index, self.scorer, self.k, progress=self.progress)


def _joined(parts: list[TopCandidates], k: int) -> TopCandidates:
    """The k candidates at each end of all parts, which are in the order of their rows."""
    if len(parts) == 1:
        return parts[0]
    best = _strongest([part.proponent_scores for part in parts], [part.proponents for part in parts], k)
    worst = _strongest([-part.opponent_scores for part in parts], [part.opponents for part in parts], k)
    return _joined_ends(best, worst)


def _joined_ends(best: tuple[Tensor, Tensor], worst: tuple[Tensor, Tensor]) -> TopCandidates:
    """Both ends, each as scores and rows; the scores of the worst are negated."""
    return TopCandidates(proponents=best[1], proponent_scores=best[0], opponents=worst[1], opponent_scores=-worst[0])


def _strongest(scores: list[Tensor], rows: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k largest per query. Each part lists equal scores by row, and parts are in the order of
    their rows.
    """
    values = torch.cat(scores, dim=1)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, order), torch.cat(rows, dim=1).gather(1, order)


def _top_by_scan(index: Index, scorer: Scorer, k: int, *, progress: bool) -> TopCandidates:
    few = len(scorer.vectors) <= _MOST_COARSE_QUERIES and k <= _MOST_FINALISTS
    if index.manifest.codec == "float16" and few and scorer.vectors.device.type == "cpu":
        return _top_by_coarse_scan(index, scorer, k, progress=progress)
    return _top_by_plain_scan(index, scorer, k, progress=progress)


def _top_by_plain_scan(index: Index, scorer: Scorer, k: int, *, progress: bool = False) -> TopCandidates:
    """Score every candidate in float32."""
    running = RunningTop(k)
    with scan_progress(progress, "Scan", index.rows) as bar:
        # Merging costs more than a small chunk's product, so it is done for many chunks at once.
        for rows, part in _gathered(scores(index, scorer), 4096):
            running.add(part, rows)
            bar.advance(len(rows))
    return running.top


def _top_by_coarse_scan(index: Index, scorer: Scorer, k: int, *, progress: bool = False) -> TopCandidates:
    """Score every candidate in float16 with an error bound, and those that may be among the k best
    in float32.
    """
    coarse = CoarseQueries(scorer.vectors)
    count = len(scorer.vectors)
    best, worst = ([Finalists(k) for _ in range(count)] for _ in range(2))
    with scan_progress(progress, "Scan", index.rows) as bar:
        for chunk in index.iterate(_COARSE_ROWS):
            stored = chunk.stored
            factors = stored.scales * scorer.multipliers[chunk.first_row : chunk.first_row + len(stored)]
            values, slack = coarse.scores(stored.codes, factors)
            for query in range(count):
                best[query].add(chunk.first_row, values[query], slack[query])
                worst[query].add(chunk.first_row, -values[query], slack[query])
            bar.advance(len(stored))
        if max(len(finalists.rows()) for finalists in (*best, *worst)) > k + _MOST_FINALISTS:
            # Too many candidates lie within the bound; the plain scan is cheaper than scoring them
            # twice.
            return _top_by_plain_scan(index, scorer, k, progress=progress)
        proponents = [_rescored(index, scorer, query, best[query], k, sign=1.0) for query in range(count)]
        opponents = [_rescored(index, scorer, query, worst[query], k, sign=-1.0) for query in range(count)]
    if not all(within for _, _, within in (*proponents, *opponents)):
        # This machine does not sum float16 products in float32, so the bound does not hold.
        return _top_by_plain_scan(index, scorer, k, progress=progress)
    return TopCandidates(
        proponents=torch.stack([rows for rows, _, _ in proponents]),
        proponent_scores=torch.stack([scores for _, scores, _ in proponents]),
        opponents=torch.stack([rows for rows, _, _ in opponents]),
        opponent_scores=torch.stack([scores for _, scores, _ in opponents]),
    )


def _rescored(
    index: Index, scorer: Scorer, query: int, finalists: Finalists, k: int, *, sign: float
) -> tuple[Int64[Tensor, "k"], Float[Tensor, "k"], bool]:
    """Rows and float32 scores of the k best finalists, or with sign -1 the worst, and whether all
    are within bounds.

    Among equal scores earlier rows come first. Products are summed in float64: in float32 their
    last bits would depend on the number of finalists, which differs if parts of the index are
    scanned separately.
    """
    rows = finalists.rows()
    exact = torch.empty(len(rows))
    at_once = max(1, SCAN_BYTES // (8 * index.dimensions))
    vector = scorer.vectors[query].double()
    for first in range(0, len(rows), at_once):
        part = slice(first, first + at_once)
        stored = index.some_rows(rows[part].tolist())
        factors = stored.scales * scorer.multipliers[rows[part]]
        exact[part] = (stored.codes.double() @ vector).float() * factors
    order = (sign * exact).sort(descending=True, stable=True).indices[:k]
    return rows[order], exact[order], finalists.bound(sign * exact)


def _gathered(
    parts: Iterator[tuple[int, Tensor]], candidates: int
) -> Iterator[tuple[Int64[Tensor, "rows"], Float[Tensor, "queries rows"]]]:
    """Rows and scores of at least `candidates` candidates at a time."""
    held: list[Tensor] = []
    first, count = 0, 0
    for start, part in parts:
        first = first if held else start
        held.append(part)
        count += part.shape[1]
        if count >= candidates:
            yield torch.arange(first, first + count), torch.cat(held, dim=1)
            held, count = [], 0
    if held:
        yield torch.arange(first, first + count), torch.cat(held, dim=1)


def best_of(
    values: Float[Tensor, "queries rows"],
    rows: Int64[Tensor, "*queries rows"],
    k: int,
    *,
    before: tuple[Float[Tensor, "queries found"], Int64[Tensor, "queries found"]] | None = None,
) -> tuple[Float[Tensor, "queries k"], Int64[Tensor, "queries k"]]:
    """The k largest of the earlier best and of new values, with their rows; earlier rows win ties.

    Args:
        values: The new scores.
        rows: Their rows in the index, ascending and after those of `before`; shared by all queries,
            or one list each.
        k: Values per query; all of them if there are fewer.
        before: This function's result for earlier rows.
    """
    rows = rows.expand(len(values), -1)
    if before is not None:
        values, rows = torch.cat([before[0], values], dim=1), torch.cat([before[1], rows], dim=1)
    order = _largest(values, min(k, values.shape[1]))
    return values.gather(1, order), rows.gather(1, order)


def _largest(values: Float[Tensor, "queries rows"], k: int) -> Int64[Tensor, "queries k"]:
    """Places of the k largest values, descending; among equal values the first places."""
    largest, places = values.topk(k, dim=1)
    if (values >= largest[:, -1:]).sum() > largest.numel():
        # topk left out values equal to the smallest, and does not specify which.
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    places = places.sort(dim=1).values
    return places.gather(1, values.gather(1, places).sort(dim=1, descending=True, stable=True).indices)
