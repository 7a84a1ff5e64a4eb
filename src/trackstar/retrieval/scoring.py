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

from trackstar.curvature.task import StoredWhitening
from trackstar.errors import GradientError
from trackstar.progress import Progress
from trackstar.retrieval.packed_products import ByteQueries, byte_products_serve
from trackstar.retrieval.packed_scan import MOST_QUERIES, QuantizedQueries, decode_into
from trackstar.store import Bits, CodeChunk, Index, have_shapes, quantized_bits
from trackstar.workers.protocol import THIS_PROCESS, Workers

# A part of a chunk's codes as float32: small enough that it is multiplied while still in the processor's cache. (Codes
# of few bits are decoded whole rows at a time.) More rows make the product of many queries faster.
SCAN_BYTES = 4 << 20
_ONE_QUERY_ROWS, _VALUE_ROWS = 16, 256
_QUANTIZED_ROWS = 4096

# Decoded rows held at once on a GPU.
_DEVICE_BYTES = 512 << 20

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
        with scan_progress(self.progress, "Candidates' norms under R", index.rows) as bar:
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
    width = dimensions if quantized else max(1, min(dimensions, SCAN_BYTES // (4 * rows)))
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


def inverse_of(norms: Float[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """1/norm, which Eq. 1 multiplies by; 0 for a zero norm: a candidate without a gradient has no influence."""
    return torch.where(norms > 0, 1 / norms, 0.0)


def scan_progress(progress: bool, title: str, rows: int) -> Progress:
    """A progress bar for a pass over an index's rows."""
    return Progress(title, unit="examples", total=rows, shown=progress)
