"""Exact top-k candidates of each query by one pass over the index."""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trackstar.errors import DamagedIndexError, OptionError
from trackstar.retrieval.float16_scan import CoarseQueries, Finalists
from trackstar.retrieval.scoring import SCAN_BYTES, Scorer, scan_progress, scores
from trackstar.store import Index
from trackstar.workers.protocol import THIS_PROCESS, Workers

# Rows scored in float16 at once, and for how many queries at once that is the faster way.
_COARSE_ROWS = 1024
_MOST_COARSE_QUERIES = 4

# Candidates beside the k best, and k itself, up to which some are scored again rather than all.
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


def top_candidates(
    index: Index, scorer: Scorer, k: int, *, workers: Workers = THIS_PROCESS, progress: bool = False
) -> TopCandidates:
    """The k proponents and k opponents of each query, exactly, by one pass over the index.

    Of candidates with equal scores the one that comes first in the index ranks first.

    Args:
        index: The candidates.
        scorer: How they are scored.
        k: How many; all of them where there are fewer.
        workers: Who goes through the index.
        progress: Whether the pass is shown.

    Raises:
        OptionError: k is not positive.
        DamagedIndexError: A score is not finite, which rows as they were written do not give.
    """
    if k < 1:
        raise OptionError(f"--top {k}: expected 1 or more candidates a query")
    top = _joined(workers.scan(index, _Top(scorer=scorer, k=k, progress=progress), progress=progress), k)
    # What is not finite sorts to one of the two ends.
    for rows, found in ((top.proponents, top.proponent_scores), (top.opponents, top.opponent_scores)):
        bad = (~found.isfinite()).nonzero()
        if len(bad):
            row = int(rows[tuple(bad[0].tolist())])
            raise DamagedIndexError(
                f"{index.path}: row {row} has a score that is not finite; `trackstar verify` finds the damaged file"
            )
    return top


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Top:
    """The first and last k of an index, or of a part."""

    scorer: Scorer
    k: int
    progress: bool

    def __call__(self, index: Index) -> TopCandidates:
        return _top_by_scan(index, self.scorer, self.k, progress=self.progress)


def _joined(parts: list[TopCandidates], k: int) -> TopCandidates:
    """The first and last k of all parts, which come in the order of their rows."""
    if len(parts) == 1:
        return parts[0]
    best = _strongest([part.proponent_scores for part in parts], [part.proponents for part in parts], k)
    worst = _strongest([-part.opponent_scores for part in parts], [part.opponents for part in parts], k)
    return TopCandidates(proponents=best[1], proponent_scores=best[0], opponents=worst[1], opponent_scores=-worst[0])


def _strongest(scores: list[Tensor], rows: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each query; a part has its own equals by row already, and parts come in the order of rows."""
    values = torch.cat(scores, dim=1)
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, order), torch.cat(rows, dim=1).gather(1, order)


def _top_by_scan(index: Index, scorer: Scorer, k: int, *, progress: bool) -> TopCandidates:
    few = len(scorer.vectors) <= _MOST_COARSE_QUERIES and k <= _MOST_FINALISTS
    if index.manifest.codec == "float16" and few and scorer.vectors.device.type == "cpu":
        return _top_by_coarse_scan(index, scorer, k, progress=progress)
    return _top_by_plain_scan(index, scorer, k, progress=progress)


def _top_by_plain_scan(index: Index, scorer: Scorer, k: int, *, progress: bool = False) -> TopCandidates:
    """Every candidate is scored in float32."""
    best: tuple[Tensor, Tensor] | None = None
    worst: tuple[Tensor, Tensor] | None = None
    with scan_progress(progress, "Scan", index.rows) as bar:
        # Merging is done for many chunks at once: it costs more than a small chunk's product.
        for rows, part in _gathered(scores(index, scorer), 4096):
            best, worst = best_of(part, rows, k, before=best), best_of(-part, rows, k, before=worst)
            bar.advance(len(rows))
    assert best is not None, "an index has at least one example"
    assert worst is not None, "an index has at least one example"
    return TopCandidates(proponents=best[1], proponent_scores=best[0], opponents=worst[1], opponent_scores=-worst[0])


def _top_by_coarse_scan(index: Index, scorer: Scorer, k: int, *, progress: bool = False) -> TopCandidates:
    """Every candidate is scored in float16 with a bound, those that can be among the k best in float32."""
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
            # So many candidates are so close together that the plain scan is cheaper than scoring them again.
            return _top_by_plain_scan(index, scorer, k, progress=progress)
        proponents = [_rescored(index, scorer, query, best[query], k, sign=1.0) for query in range(count)]
        opponents = [_rescored(index, scorer, query, worst[query], k, sign=-1.0) for query in range(count)]
    if not all(within for _, _, within in (*proponents, *opponents)):
        # This machine does not sum float16 products in float32: the bound does not hold, and nothing is built on it.
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
    """The k best (or with sign -1, worst) finalists by their scores in float32, earlier rows first among equals.

    Also, whether all are within their bounds. Products are summed in float64: in float32 their bits would follow the
    number of finalists, which is another one where parts of the index are gone through apart.
    """
    rows = finalists.rows()
    found = torch.empty(len(rows))
    at_once = max(1, SCAN_BYTES // (8 * index.dimensions))
    vector = scorer.vectors[query].double()
    for first in range(0, len(rows), at_once):
        part = slice(first, first + at_once)
        stored = index.some_rows(rows[part].tolist())
        factors = stored.scales * scorer.multipliers[rows[part]]
        found[part] = (stored.codes.double() @ vector).float() * factors
    order = (sign * found).sort(descending=True, stable=True).indices[:k]
    return rows[order], found[order], finalists.bound(sign * found)


def _gathered(
    parts: Iterator[tuple[int, Tensor]], candidates: int
) -> Iterator[tuple[Int64[Tensor, "rows"], Float[Tensor, "queries rows"]]]:
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
    """The k largest of what was best before and of new values, with their rows; earlier rows win ties.

    Args:
        values: Scores.
        rows: Their rows in the index, ascending and after those of `before`: the same for all queries, or each its own.
        k: How many; all of them where there are fewer.
        before: What this gave for earlier rows.
    """
    rows = rows.expand(len(values), -1)
    if before is not None:
        values, rows = torch.cat([before[0], values], dim=1), torch.cat([before[1], rows], dim=1)
    order = _largest(values, min(k, values.shape[1]))
    return values.gather(1, order), rows.gather(1, order)


def _largest(values: Float[Tensor, "queries rows"], k: int) -> Int64[Tensor, "queries k"]:
    """Places of the k largest values, descending, the first places among equals."""
    found, places = values.topk(k, dim=1)
    if (values >= found[:, -1:]).sum() > found.numel():
        # Equals of the last one were left out, and which ones is anyone's guess.
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    places = places.sort(dim=1).values
    return places.gather(1, values.gather(1, places).sort(dim=1, descending=True, stable=True).indices)
