"""Checks of what is about to be shown: scores are cosines, and a shown row has its stored norm.

Checksums find damage on the disk. These checks need none: they also hold for indexes without
checksums, and for numbers that were damaged in memory.

By the Cauchy-Schwarz inequality no influence is above 1 or below -1, except for rounding. The bound
holds where the norm that a score is divided by is the row's own: for recomputed gradients, and for
floating-point rows in projected coordinates. Norms in a task's coordinates are estimated from codes
otherwise, and such a score may be any finite number. A row's decoded norm is its stored norm,
except for rounding. Of low-bit codes it is at least the stored norm, since ⟨f·c, u⟩ = ‖u‖² (see
quantization.py).
"""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trackstar.choices import CodecName
from trackstar.errors import DamagedIndexError
from trackstar.retrieval.top_candidates import TopCandidates
from trackstar.store import Index, quantized_bits

EXACT_SLACK = 1e-3
"""By how much an influence without coding errors may exceed 1."""

_SLACK: dict[CodecName, float] = {"float32": 1e-3, "bfloat16": 0.02, "float16": 5e-3}
# Decoded low-bit rows are longer than the rows themselves, 1.25 times for normal entries and 1 bit.
_LOW_BIT_NORMS = 0.97, 4.0
_ROWS_AT_ONCE = 256


def check_top(index: Index, top: TopCandidates, *, exact: bool) -> None:
    """Raise if a candidate about to be shown has an impossible score, or a row with another norm than stored.

    Args:
        index: The candidates.
        top: The candidates to be shown.
        exact: Whether their scores come from recomputed gradients.

    Raises:
        DamagedIndexError: A score or a row is impossible; the message names the row.
    """
    check_scores(index, top.proponents, top.proponent_scores, exact=exact)
    check_scores(index, top.opponents, top.opponent_scores, exact=exact)
    check_rows(index, torch.cat([top.proponents.flatten(), top.opponents.flatten()]).unique())


def check_scores(
    index: Index, rows: Int64[Tensor, "*queries k"], scores: Float[Tensor, "*queries k"], *, exact: bool
) -> None:
    """Raise if a score that is a cosine is not between -1 and 1, or another one is not finite.

    Args:
        index: The candidates.
        rows: The candidates' rows.
        scores: Their scores.
        exact: Whether the scores come from recomputed gradients.

    Raises:
        DamagedIndexError: A score is out of range; the message names the row.
    """
    codec, slack = index.manifest.codec, math.inf
    if exact:
        slack = EXACT_SLACK
    elif index.manifest.whitening is None and quantized_bits(codec) is None:
        slack = _SLACK[codec]
    wrong = ~((scores.abs() <= 1 + slack) & scores.isfinite())
    if wrong.any():
        place = int(wrong.flatten().int().argmax())
        raise DamagedIndexError(
            f"{index.path}: row {int(rows.flatten()[place])} has influence {float(scores.flatten()[place]):.4g}, "
            "expected -1 to 1; its numbers are damaged: `verify` finds damage on the disk; else try again, on another "
            "machine"
        )


def check_rows(index: Index, rows: Int64[Tensor, "rows"]) -> None:
    """Raise if a row has another norm than the index stores.

    Args:
        index: The index.
        rows: The rows' numbers, ascending.

    Raises:
        DamagedIndexError: A norm differs; the message names the row.
    """
    codec = index.manifest.codec
    least, most = _LOW_BIT_NORMS
    if quantized_bits(codec) is None:
        least, most = 1 - _SLACK[codec], 1 + _SLACK[codec]
    for part in rows.split(_ROWS_AT_ONCE):
        stored = index.some_rows(part.tolist())
        found = torch.linalg.vector_norm(stored.decode(), dim=1, dtype=torch.float64)
        norms = stored.norms.double()
        wrong = ~((found >= least * norms) & (found <= most * norms))
        if wrong.any():
            place = int(wrong.int().argmax())
            raise DamagedIndexError(
                f"{index.path}: row {int(part[place])} has norm {float(found[place]):.6g}, expected the stored "
                f"{float(norms[place]):.6g}; it is damaged: `verify` finds the file; restore it from a copy"
            )
