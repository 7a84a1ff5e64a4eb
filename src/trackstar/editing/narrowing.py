"""Cut an index with projections of a smaller side out of a larger one, without computing a
gradient.

Projections of different sides are nested (see `random_projection`): with the smaller side s < √d,
the first s rows and columns of a block of φ, times √d/s, are the block's projection by the first s
columns of P₀ᵀ and P₁ᵀ. The result is what indexing with the smaller side gives, except for
rounding. Narrowing shows how much accuracy a smaller index would lose (paper, Figure 2), and
shrinks an index that has become too large.
"""

import dataclasses

from jaxtyping import Float
from torch import Tensor

from trackstar.editing.rewriting import rewrite
from trackstar.errors import OptionError
from trackstar.gradients.projection import projection_digest
from trackstar.store import Index, Manifest, Place, ProjectionEntry, StoredRows, as_folder, encode
from trackstar.store.locations import relocated


def narrow_index(index: Index | str | Place, out: str | Place, *, side: int, progress: bool = True) -> Index:
    """Make the index that `build_index` would make with a smaller `side` and the same
    `shard_examples`.

    If the run is interrupted, the same call resumes it. If the new index is finished, it is opened.

    Args:
        index: The larger index; it is not changed.
        out: Folder of the new index.
        side: Rows and columns of a block of the new φ; at most those of `index`.
        progress: Whether progress is shown.

    Returns:
        The new index, opened. It equals one built from the corpus up to rounding: twice the
            codec's.

    Raises:
        OptionError: The side is not a whole number from 1 to the index's, or the index has a
            one-sided projection or whitened rows.
        TrackstarError: An index cannot be read or written; see `trackstar.errors`.
    """
    index = Index.of(index)
    manifest = index.manifest
    if manifest.projection.kind != "two-sided":
        raise OptionError(
            f"{index.path}: a {manifest.projection.kind} projection cannot be narrowed; index the corpus with "
            f"`build_index` and `side={side}`"
        )
    if type(side) is not int:
        raise OptionError(f"`side`: expected a whole number, found {side!r}")
    if not 1 <= side <= manifest.projection.side:
        raise OptionError(
            f"`side`: expected 1 to {manifest.projection.side}, the side of {index.path}, found {side}; for a larger "
            "one, index the corpus with `build_index`"
        )
    if manifest.whitening is not None:
        raise OptionError(
            f"{index.path}: whitened rows cannot be narrowed; index the corpus with `build_index` and `side={side}`"
        )
    blocks = len(manifest.layer_blocks)

    def recode(stored: StoredRows) -> StoredRows:
        return encode(narrowed(stored.decode(), blocks=blocks, side=side), manifest.codec, blocks)

    narrower = narrowed_manifest(relocated(manifest, index.path, as_folder(out)), side)
    return rewrite([index], out, narrower, recode=recode, title="Narrowing", progress=progress)


def narrowed_manifest(manifest: Manifest, side: int) -> Manifest:
    """Manifest, unfinished, of the same index with a smaller side."""
    shapes = [
        (matrix.name, matrix.rows, matrix.columns) for block in manifest.layer_blocks for matrix in block.matrices
    ]
    seed = manifest.projection.seed
    entry = ProjectionEntry(seed=seed, side=side, digest=projection_digest(shapes, seed=seed, side=side))
    return dataclasses.replace(manifest, projection=entry, completion=None)


def narrowed(phi: Float[Tensor, "rows dim"], *, blocks: int, side: int) -> Float[Tensor, "rows smaller"]:
    """φ with blocks of a smaller side: the first rows and columns of each block, rescaled.

    Entries of P₀ and P₁ have variance 1/√d, so that an entry of φ = P₀ G P₁ᵀ scales with 1/√d.
    """
    larger = round((phi.shape[1] // blocks) ** 0.5)
    squares = phi.unflatten(1, (blocks, larger, larger))  # (rows, blocks, larger, larger)
    return squares[:, :, :side, :side].flatten(1) * (larger / side)  # (rows, blocks * side * side)
