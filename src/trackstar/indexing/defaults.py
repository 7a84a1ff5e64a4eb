"""The defaults of a new index: side, codec and coordinates, by what is there.

The rule, and the measurements that it follows (docs/stores.md):

* **Side.** The paper's 64 for a model with `LARGE_MODEL` parameters in its layer blocks or more, and for a
  corpus with more examples than a block of φ then has dimensions. Else `SMALL_SIDE`: R_train, with side⁴
  entries a block, would cost several times more than the gradients. A machine whose memory does not suffice
  gets the largest side that fits.
* **Codec.** float16 while the rows take `WIDE_BYTES` or less, so that no gradient is computed again for a
  ranking. 1-bit beyond.
* **Coordinates.** Projected for float16 rows of `SMALL_SIDE` or less, where R is inverted in a second when it
  is queried. Else whitened, where that would take half a minute; and whitened if the damping is given.

An index that is begun keeps what it has.
"""

import contextlib
from collections.abc import Iterator

from trackstar.choices import LOW_BIT_CODECS, CodecName, Coordinates
from trackstar.errors import TrackstarError
from trackstar.indexing.settings import PAPER_SIDE, ChosenSettings, IndexSettings
from trackstar.store import PART_FOLDER, Manifest, Place, load_manifest, row_bytes
from trackstar.text import amount_of_bytes

LARGE_MODEL = 10_000_000
"""Parameters in layer blocks from which the gradients cost more than R_train at the paper's side."""
SMALL_SIDE = 32
"""√d for a small model and a small corpus."""
WIDE_BYTES = 1 << 30
"""Most bytes of float16 rows."""


def default_side(parameters: int, examples: int) -> tuple[int, str]:
    """The side for a model and a corpus, and why.

    Args:
        parameters: Number of parameters in the model's layer blocks.
        examples: Number of examples of the corpus.
    """
    large = parameters >= LARGE_MODEL or examples > PAPER_SIDE**2
    side = PAPER_SIDE if large else SMALL_SIDE
    return side, f"side {side} for {parameters:,} covered parameters and {examples:,} examples"


def default_codec(blocks: int, side: int, examples: int, *, projected: bool = False) -> tuple[CodecName, str]:
    """The codec for rows of some layer blocks, and why.

    Args:
        blocks: Number of layer blocks.
        side: √d.
        examples: Number of examples of the corpus.
        projected: Whether the coordinates are to be projected.
    """
    wide = examples * row_bytes("float16", blocks * side**2, blocks)
    if wide <= WIDE_BYTES:
        return "float16", f"float16, as its rows take {amount_of_bytes(wide)}"
    if projected:
        return "float16", "float16, as a codec of fewer bits needs whitened coordinates"
    if side % 8:
        return "float16", "float16, as a codec of fewer bits needs a side that is a multiple of 8"
    return "1-bit", f"1-bit, as float16 would take {amount_of_bytes(wide)}"


def default_coordinates(codec: CodecName, side: int, *, damped: bool) -> tuple[Coordinates, str]:
    """The coordinates for rows of a codec that was chosen, and why.

    Args:
        codec: The codec.
        side: √d.
        damped: Whether the damping is given, which the rows are then whitened with.
    """
    if codec in LOW_BIT_CODECS:
        return "whitened", f"whitened, as {codec} rows are"
    if damped:
        return "whitened", "whitened, with the damping that is given"
    if side > SMALL_SIDE:
        return "whitened", f"whitened, as R is not inverted in seconds at side {side}"
    return "projected", f"projected, as R is inverted in seconds at side {side}"


def smaller_sides(side: int) -> Iterator[int]:
    """Smaller sides, for a machine whose memory does not suffice for this one."""
    yield from range((side - 1) // 8 * 8, 0, -8)


def chosen_settings(
    settings: IndexSettings, *, parameters: int, blocks: int, examples: int, out: Place | None = None
) -> tuple[ChosenSettings, tuple[str, ...]]:
    """The settings with what was left to choose, and why each was chosen.

    Args:
        settings: What the index is asked to be.
        parameters: Number of parameters in the model's layer blocks.
        blocks: Number of layer blocks.
        examples: Number of examples of the corpus.
        out: The index's folder; an index that is begun there has chosen already.
    """
    if isinstance(settings, ChosenSettings):
        return settings, ()
    reasons = []
    begun, part = (None, None) if out is None else (_begun(out), _begun(out / PART_FOLDER))
    side, codec, coordinates = settings.side, settings.codec, settings.coordinates
    if side is None:
        found = begun or part
        if found is not None:
            side, why = found.projection.side, f"side {found.projection.side}, with which the index was begun"
        else:
            side, why = default_side(parameters, examples)
        reasons.append(why)
    if codec is None:
        if begun is not None:
            codec, why = begun.codec, f"{begun.codec}, with which the index was begun"
        else:
            codec, why = default_codec(blocks, side, examples, projected=coordinates == "projected")
        reasons.append(why)
        if coordinates is None:
            if begun is not None:
                coordinates, why = begun.coordinates, f"{begun.coordinates}, as the index was begun"
            else:
                coordinates, why = default_coordinates(codec, side, damped=settings.damping is not None)
            reasons.append(why)
    return settings.chosen(side=side, codec=codec, coordinates=coordinates), tuple(reasons)


def is_begun(out: Place) -> bool:
    """Whether an index, or its first pass, is begun in a folder."""
    return _begun(out) is not None or _begun(out / PART_FOLDER) is not None


def _begun(out: Place) -> Manifest | None:
    with contextlib.suppress(TrackstarError, OSError):
        return load_manifest(out)
    return None
