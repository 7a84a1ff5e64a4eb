"""Influence of every candidate on every query, and the most positive and negative of them (Eq. 1-2), exactly.

With W the whitening (WᵀW = R⁻¹), Eq. 1 is φ_q R⁻¹ φ_m / (‖Wφ_q‖ ‖Wφ_m‖). The query's side, R⁻¹φ_q / ‖Wφ_q‖, is made
once; a candidate meets it as stored, and its norm under R comes from one pass over the index that is kept with it.
Every method that scores by inner products is of this form: query vectors and a multiplier a candidate.
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trackstar.byte_products import ByteQueries, byte_products_serve
from trackstar.coarse_scan import CoarseQueries, Finalists
from trackstar.correction import StoredWhitening
from trackstar.errors import DamagedIndexError, GradientError, OptionError
from trackstar.progress import Progress
from trackstar.quantized_scan import MOST_QUERIES, QuantizedQueries, decode_into
from trackstar.store import Bits, CodeChunk, Index, have_shapes, quantized_bits
from trackstar.workers import THIS_PROCESS, Workers

# A part of a chunk's codes as float32: small enough that it is multiplied while still in the processor's cache. (Codes
# of few bits are decoded whole rows at a time.) More rows make the product of many queries faster.
_SCAN_BYTES = 4 << 20
_ONE_QUERY_ROWS, _VALUE_ROWS = 16, 256
# Rows scored in float16 at once, and for how many queries at once that is the faster way.
_COARSE_ROWS = 1024
_MOST_COARSE_QUERIES = 4
_QUANTIZED_ROWS = 4096
# Decoded rows held at once on a GPU.
_DEVICE_BYTES = 512 << 20
# Candidates beside the k best, and k itself, up to which some are scored again rather than all.
_MOST_FINALISTS = 2048
# Rows whitened at once: enough for an efficient matrix product.
_WHITENING_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scorer:
    """Inner products with a multiplier a candidate: score(q, m) = vector_q · row_m · multiplier_m.

    Attributes:
        vectors: What each query meets the candidates' rows with, in the index's coordinates; on the device that the
            products are made on.
        multipliers: A factor for each candidate; 0 for one without any gradient, which is then never a proponent.
    """

    vectors: Float[Tensor, "queries dimensions"]
    multipliers: Float[Tensor, "candidates"]


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


def trackstar_scorer(
    index: Index,
    queries: Float[Tensor, "queries dimensions"],
    whitening: StoredWhitening,
    *,
    key: str | None = None,
    workers: Workers = THIS_PROCESS,
    progress: bool = False,
) -> Scorer:
    """Eq. 1-2: whitened by R and of unit norm on both sides.

    Args:
        index: The candidates.
        queries: Each query in the index's coordinates: φ, or W_train φ.
        whitening: By the R that both sides are corrected by, of rows in these coordinates.
        key: Names that R: the candidates' norms under it are kept with the index by this name.
        workers: Who goes through the index.
        progress: Whether the pass over the index is shown.

    Raises:
        GradientError: A query's gradient is zero, so that its direction says nothing.
    """
    vectors = unit_queries(queries, whitening)
    norms = whitened_norms(index, whitening, key=key, workers=workers, progress=progress)
    return Scorer(vectors=vectors, multipliers=inverse_of(norms))


def unit_queries(
    queries: Float[Tensor, "queries dimensions"], whitening: StoredWhitening
) -> Float[Tensor, "queries dimensions"]:
    """R⁻¹q / ‖q‖ in an index's coordinates: what each query meets the candidates with (Eq. 1-2).

    Raises:
        GradientError: A query's gradient is zero, so that its direction says nothing.
    """
    norms = whitening.norms(queries)
    zero = (norms == 0).nonzero()
    if len(zero):
        raise GradientError(f"query {int(zero[0])}: its projected gradient is zero, expected one that is not")
    return whitening.apply_inverse(queries) / norms[:, None]


def dot_product_scorer(index: Index, queries: Float[Tensor, "queries dimensions"]) -> Scorer:
    """Gradient dot product, φ_q·φ_m: no R, no unit norm (Table 2)."""
    return Scorer(vectors=queries, multipliers=torch.ones(index.rows))


def cosine_scorer(index: Index, queries: Float[Tensor, "queries dimensions"]) -> Scorer:
    """Gradient cosine, φ_q·φ_m / (‖φ_q‖ ‖φ_m‖): unit norm but no R (Table 2)."""
    norms = torch.linalg.vector_norm(queries, dim=1, keepdim=True)
    return Scorer(vectors=queries / norms.clamp_min(1e-30), multipliers=inverse_of(index.norms()))


def whitened_norms(
    index: Index,
    whitening: StoredWhitening,
    *,
    key: str | None = None,
    workers: Workers = THIS_PROCESS,
    progress: bool = False,
) -> Float[Tensor, "candidates"]:
    """The norm of Eq. 1 of every candidate: one pass, kept with the index under `key`, which names the R."""
    kept = index.load_derived(f"norms-{key}") if key else None
    if have_shapes(kept, norms=(index.rows,)):
        return kept["norms"]
    norms = torch.cat(workers.scan(index, _Norms(whitening=whitening, progress=progress), progress=progress))
    if key:
        index.save_derived(f"norms-{key}", {"norms": norms})
    return norms


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Norms:
    """Norms under R of an index's rows, or of a part's."""

    whitening: StoredWhitening
    progress: bool

    def __call__(self, index: Index) -> Float[Tensor, "rows"]:
        found = []
        with _shown(self.progress, "Candidates' norms under R", index.rows) as bar:
            for chunk in index.iterate(max(1, _WHITENING_BYTES // (4 * index.dimensions))):
                found.append(self.whitening.stored_norms(chunk.stored))
                bar.advance(len(chunk.stored))
        return torch.cat(found)


def scores(index: Index, scorer: Scorer) -> Iterator[tuple[int, Float[Tensor, "queries candidates"]]]:
    """Scores of consecutive candidates: the first one's row, and queries × candidates; one pass over the index."""
    vectors = scorer.vectors.float()
    bits = quantized_bits(index.manifest.codec)
    if vectors.device.type != "cpu":
        products = _products_on_device(index, vectors)
    elif bits is not None and (len(vectors) <= MOST_QUERIES[bits] or byte_products_serve()):
        products = _products_of_codes(index, vectors, bits)
    else:
        products = _products_of_values(index, vectors)
    for chunk, product in products:
        factors = scorer.multipliers[chunk.first_row : chunk.first_row + len(product)]
        yield chunk.first_row, (product * factors[:, None]).T


def _products_on_device(index: Index, vectors: Tensor) -> Iterator[tuple[CodeChunk, Float[Tensor, "rows queries"]]]:
    """Codes go to the vectors' device as they are, and are decoded and multiplied there."""
    columns = vectors.T.contiguous()
    for chunk in index.iterate(max(1, _DEVICE_BYTES // (4 * index.dimensions))):
        yield chunk, (chunk.stored.to(vectors.device).decode() @ columns).cpu()


def _products_of_values(index: Index, vectors: Tensor) -> Iterator[tuple[CodeChunk, Float[Tensor, "rows queries"]]]:
    """Codes are turned into float32, a few rows and dimensions at a time, and multiplied."""
    rows, dimensions = (_VALUE_ROWS if len(vectors) > 1 else _ONE_QUERY_ROWS), index.dimensions
    quantized = quantized_bits(index.manifest.codec) is not None
    width = dimensions if quantized else max(1, min(dimensions, _SCAN_BYTES // (4 * rows)))
    # One part's codes in float32, reused: fresh memory a part would cost more than the product.
    values = torch.empty(rows, width)
    columns = vectors.T.contiguous()
    for chunk in index.iterate(rows):
        product = torch.zeros(len(chunk.stored), len(vectors))
        for first in range(0, dimensions, width):
            part = values[: len(chunk.stored), : min(width, dimensions - first)]
            if quantized:
                decode_into(chunk.stored, part)
            else:
                part.copy_(chunk.stored.codes[:, first : first + width])
            product.addmm_(part, columns[first : first + width])
        yield chunk, product if quantized else product * chunk.stored.scales[:, None]


def _products_of_codes(
    index: Index, vectors: Tensor, bits: Bits
) -> Iterator[tuple[CodeChunk, Float[Tensor, "rows queries"]]]:
    """Products in whole numbers from the packed bytes, which are read once."""
    kind = QuantizedQueries if len(vectors) <= MOST_QUERIES[bits] else ByteQueries
    queries = kind(vectors, len(index.manifest.layer_blocks), bits)
    for chunk in index.iterate(_QUANTIZED_ROWS):
        yield chunk, queries.scores(chunk.stored)


def all_scores(index: Index, scorer: Scorer) -> Float[Tensor, "queries candidates"]:
    """Every candidate's score for every query, in memory; for pools that are small enough."""
    result = torch.empty(len(scorer.vectors), index.rows)
    for first, part in scores(index, scorer):
        result[:, first : first + part.shape[1]] = part
    return result


def scores_of(index: Index, scorer: Scorer, rows: Int64[Tensor, "some"]) -> Float[Tensor, "queries some"]:
    """Scores of a few candidates, their rows ascending."""
    found = torch.empty(len(scorer.vectors), len(rows))
    at_once = max(1, _WHITENING_BYTES // (4 * index.dimensions))
    for first in range(0, len(rows), at_once):
        part = slice(first, first + at_once)
        values = index.some_rows(rows[part].tolist()).decode()
        found[:, part] = scorer.vectors.float().cpu() @ values.T * scorer.multipliers[rows[part]]
    return found


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
    with _shown(progress, "Scan", index.rows) as bar:
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
    with _shown(progress, "Scan", index.rows) as bar:
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
    at_once = max(1, _SCAN_BYTES // (8 * index.dimensions))
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


def inverse_of(norms: Float[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """1/norm, which Eq. 1 multiplies by; 0 for a zero norm: a candidate without a gradient has no influence."""
    return torch.where(norms > 0, 1 / norms, 0.0)


def _shown(progress: bool, title: str, rows: int) -> Progress:
    return Progress(title, unit="examples", total=rows, shown=progress)
