"""Scores of candidates: inner products with query vectors, times one multiplier per candidate (Eq.
1-2).

With W the whitening (WᵀW = R⁻¹), the influence of Eq. 1 is φ_q R⁻¹ φ_m / (‖Wφ_q‖ ‖Wφ_m‖). The
query's vector R⁻¹φ_q / ‖Wφ_q‖ is computed once. Its inner products with stored rows need no
whitening of candidates. The multipliers 1/‖Wφ_m‖ come from one pass over the index, and are cached
with it. Every method that scores by inner products has this form.
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trackstar.curvature.low_rank import TaskWhitening
from trackstar.curvature.task import StoredWhitening
from trackstar.errors import GradientError
from trackstar.progress import Progress
from trackstar.store import Bits, CodeChunk, Index, have_shapes, quantized_bits
from trackstar.workers.protocol import THIS_PROCESS, Workers

# Bytes of codes that are converted to float32 at once: few enough to stay in the processor's cache
# until they are multiplied. Low-bit codes are decoded whole rows at a time. More rows make the
# product with many queries faster.
SCAN_BYTES = 4 << 20
_ONE_QUERY_ROWS, _VALUE_ROWS = 16, 256
_QUANTIZED_ROWS = 4096

# Most queries that are multiplied with the packed bytes one by one. With more, a matrix product is
# faster: of bytes where the processor has it, else of values decoded to float32.
_MOST_PACKED_BESIDE_BYTES, _MOST_PACKED_BESIDE_VALUES = 16, 32

# Bytes of decoded rows held at once on a GPU.
_DEVICE_BYTES = 512 << 20

# Rows whitened at once: enough for an efficient matrix product, and else no more bytes than the C library
# keeps from one part to the next, since fresh memory costs more than the product.
_WHITENED_ROWS, _WHITENED_BYTES = 256, 16 << 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scorer:
    """Inner products with one multiplier per candidate: score(q, m) = (vector_q · row_m) ·
    multiplier_m.

    Attributes:
        vectors: One vector per query, in the index's coordinates, on the device that computes the
            products.
        multipliers: One factor per candidate; 0 for a candidate without a gradient, which is never
            a proponent.
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
    """The scorer of Eq. 1-2: both sides are whitened by R and of unit norm.

    Args:
        index: The candidates.
        queries: The queries in the index's coordinates: φ, or W_train φ.
        whitening: Whitening of rows in these coordinates.
        key: Identifies the whitening; candidates' norms are cached with the index under it.
        workers: Where the index is scanned.
        progress: Whether the pass over the index is shown.

    Raises:
        GradientError: A query's gradient is zero and has no direction.
    """
    vectors = unit_queries(queries, whitening)
    norms = whitened_norms(index, whitening, key=key, workers=workers, progress=progress)
    return Scorer(vectors=vectors, multipliers=inverse_of(norms))


def unit_queries(
    queries: Float[Tensor, "queries dimensions"], whitening: StoredWhitening
) -> Float[Tensor, "queries dimensions"]:
    """One vector per query, in the index's coordinates; its inner products with candidates' rows,
    divided by their norms under R, are the influences: R⁻¹φ_q / ‖Wφ_q‖ (Eq. 1-2).

    Raises:
        GradientError: A query's gradient is zero and has no direction.
    """
    norms = whitening.norms(queries)
    zero = (norms == 0).nonzero()
    if len(zero):
        raise GradientError(f"query {int(zero[0])}: expected a projected gradient other than zero, found zero")
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
    """Every candidate's norm under R: one pass over the index, cached with it under `key`.

    If R is R_train alone and the index is whitened by it, the norms are those that it stores.
    """
    cached = index.load_derived(f"norms-{key}") if key else None
    if have_shapes(cached, norms=(index.rows,)):
        return cached["norms"]
    quantized = quantized_bits(index.manifest.codec) is not None
    if quantized and isinstance(whitening, TaskWhitening) and not whitening.rank:
        return whitening.of_train_norms(index.norms())  # exact, and stored
    norms = torch.cat(workers.scan(index, _Norms(whitening=whitening, progress=progress), progress=progress))
    if key:
        index.save_derived(f"norms-{key}", {"norms": norms})
    return norms


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Norms:
    """Norms under R of the rows of an index, or of a part of it."""

    whitening: StoredWhitening
    progress: bool

    def __call__(self, index: Index) -> Float[Tensor, "rows"]:
        norms = []
        with scan_progress(self.progress, "Candidates' norms under R", index.rows) as bar:
            for chunk in index.iterate(_whitened_at_once(index)):
                norms.append(self.whitening.stored_norms(chunk.stored))
                bar.advance(len(chunk.stored))
        return torch.cat(norms)


def scores(index: Index, scorer: Scorer) -> Iterator[tuple[int, Float[Tensor, "queries candidates"]]]:
    """Scores of consecutive candidates, in one pass: the first one's row, and queries × candidates."""
    vectors = scorer.vectors.float()
    bits = quantized_bits(index.manifest.codec)
    if vectors.device.type != "cpu":
        products = _products_on_device(index, vectors)
    elif bits is not None and (len(vectors) <= _MOST_PACKED_BESIDE_VALUES or _byte_products_serve()):
        products = _products_of_codes(index, vectors, bits)
    else:
        products = _products_of_values(index, vectors)
    for chunk, product in products:
        factors = scorer.multipliers[chunk.first_row : chunk.first_row + len(product)]
        yield chunk.first_row, (product * factors[:, None]).T


def _products_on_device(index: Index, vectors: Tensor) -> Iterator[tuple[CodeChunk, Float[Tensor, "rows queries"]]]:
    """Move codes to the vectors' device, and decode and multiply them there."""
    columns = vectors.T.contiguous()
    for chunk in index.iterate(max(1, _DEVICE_BYTES // (4 * index.dimensions))):
        yield chunk, (chunk.stored.to(vectors.device).decode() @ columns).cpu()


def _products_of_values(index: Index, vectors: Tensor) -> Iterator[tuple[CodeChunk, Float[Tensor, "rows queries"]]]:
    """Convert codes to float32, a few rows and dimensions at a time, and multiply them."""
    rows, dimensions = (_VALUE_ROWS if len(vectors) > 1 else _ONE_QUERY_ROWS), index.dimensions
    quantized = quantized_bits(index.manifest.codec) is not None
    width = dimensions if quantized else max(1, min(dimensions, SCAN_BYTES // (4 * rows)))
    # One buffer for all parts: allocating memory for each part would cost more than its product.
    values = torch.empty(rows, width)
    columns = vectors.T.contiguous()
    for chunk in index.iterate(rows):
        product = torch.zeros(len(chunk.stored), len(vectors))
        for first in range(0, dimensions, width):
            part = values[: len(chunk.stored), : min(width, dimensions - first)]
            if quantized:
                from trackstar.retrieval.packed_scan import decode_into

                decode_into(chunk.stored, part)
            else:
                part.copy_(chunk.stored.codes[:, first : first + width])
            product.addmm_(part, columns[first : first + width])
        yield chunk, product if quantized else product * chunk.stored.scales[:, None]


def _products_of_codes(
    index: Index, vectors: Tensor, bits: Bits
) -> Iterator[tuple[CodeChunk, Float[Tensor, "rows queries"]]]:
    """Integer products straight from the packed bytes, which are read once."""
    from trackstar.retrieval.packed_products import ByteQueries
    from trackstar.retrieval.packed_scan import QuantizedQueries

    most = _MOST_PACKED_BESIDE_BYTES if _byte_products_serve() else _MOST_PACKED_BESIDE_VALUES
    kind = QuantizedQueries if len(vectors) <= most else ByteQueries
    queries = kind(vectors, len(index.manifest.layer_blocks), bits)
    for chunk in index.iterate(_QUANTIZED_ROWS):
        yield chunk, queries.scores(chunk.stored)


def _byte_products_serve() -> bool:
    """See `byte_products_serve`. Compiled code is imported where it is used: wider codecs need none."""
    from trackstar.retrieval.packed_products import byte_products_serve

    return byte_products_serve()


def all_scores(index: Index, scorer: Scorer) -> Float[Tensor, "queries candidates"]:
    """Every candidate's score for every query, in memory; for small pools."""
    result = torch.empty(len(scorer.vectors), index.rows)
    for first, part in scores(index, scorer):
        result[:, first : first + part.shape[1]] = part
    return result


def scores_of(index: Index, scorer: Scorer, rows: Int64[Tensor, "some"]) -> Float[Tensor, "queries some"]:
    """Scores of a few candidates, given their rows in ascending order."""
    scored = torch.empty(len(scorer.vectors), len(rows))
    at_once = _whitened_at_once(index)
    for first in range(0, len(rows), at_once):
        part = slice(first, first + at_once)
        values = index.some_rows(rows[part].tolist()).decode()
        scored[:, part] = scorer.vectors.float().cpu() @ values.T * scorer.multipliers[rows[part]]
    return scored


def _whitened_at_once(index: Index) -> int:
    return max(_WHITENED_ROWS, _WHITENED_BYTES // (4 * index.dimensions))


def inverse_of(norms: Float[Tensor, "rows"]) -> Float[Tensor, "rows"]:
    """1/norm; 0 for a zero norm, since a candidate without a gradient has no influence."""
    return torch.where(norms > 0, 1 / norms, 0.0)


def scan_progress(progress: bool, title: str, rows: int) -> Progress:
    """A progress bar for a pass over an index's rows."""
    return Progress(title, unit="examples", total=rows, shown=progress)
