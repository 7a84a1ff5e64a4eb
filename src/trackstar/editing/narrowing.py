"""A smaller index cut out of a larger one: projections of several sides are nested, so no gradient is computed again.

The first side×side' entries of a block of φ, times a constant, are the block's projection by the first columns of the
same Pᵀ (see `random_projection`): what indexing with the smaller side gives, but for rounding. It serves to see how
much a smaller index would lose (paper, Figure 2), and to thin one that has become too large.
"""

import dataclasses

from jaxtyping import Float
from torch import Tensor

from trackstar.editing.rewriting import rewrite_shards
from trackstar.errors import OptionError
from trackstar.gradients.projection import projection_digest
from trackstar.store import Index, Manifest, Place, ProjectionEntry, StoredRows, encode


def narrow_index(index: Index | str | Place, out: str | Place, *, side: int, progress: bool = True) -> Index:
    """Make the index that `build_index` would make with a smaller `side` and as many examples a shard.

    A run that was interrupted goes on when the same call is made again; a finished index is opened.

    Args:
        index: The index that is cut.
        out: The new index's folder.
        side: Rows and columns of a block of the new φ; at most those of `index`.
        progress: Whether progress is shown where stderr is a terminal.

    Returns:
        The new index, opened: equal to one made anew but for rounding, twice that of the codec.

    Raises:
        OptionError: The side is no whole number between 1 and the index's, or its projection is one-sided.
        TrackstarError: An index cannot be read or written; see `trackstar.errors`.
    """
    index = index if isinstance(index, Index) else Index.open(index)
    manifest = index.manifest
    if manifest.projection.kind != "two-sided":
        raise OptionError(f"{index.path}: a {manifest.projection.kind} projection cannot be narrowed; index again")
    if type(side) is not int:
        raise OptionError(f"side {side!r}: expected a whole number")
    if not 1 <= side <= manifest.projection.side:
        raise OptionError(
            f"side {side}: {index.path} has side {manifest.projection.side}, expected 1 to that; for a larger one, "
            "index again"
        )
    if manifest.whitening is not None:
        raise OptionError(f"{index.path}: whitened rows cannot be narrowed; index again with --side {side}")
    blocks = len(manifest.layer_blocks)

    def recode(stored: StoredRows) -> StoredRows:
        return encode(narrowed(stored.decode(), blocks=blocks, side=side), manifest.codec, blocks)

    smaller = narrowed_manifest(manifest, side)
    return rewrite_shards(index, out, smaller, recode, title="Narrowing", progress=progress)


def narrowed_manifest(manifest: Manifest, side: int) -> Manifest:
    """The manifest, unfinished, of the same index with a smaller side."""
    matrices = [(one.name, one.rows, one.columns) for block in manifest.layer_blocks for one in block.matrices]
    seed = manifest.projection.seed
    entry = ProjectionEntry(seed=seed, side=side, digest=projection_digest(matrices, seed=seed, side=side))
    return dataclasses.replace(manifest, projection=entry, completion=None)


def narrowed(phi: Float[Tensor, "rows dim"], *, blocks: int, side: int) -> Float[Tensor, "rows smaller"]:
    """φ with blocks of a smaller side: the first rows and columns of each, rescaled to the smaller side's variance."""
    old = round((phi.shape[1] // blocks) ** 0.5)
    squares = phi.unflatten(1, (blocks, old, old))
    return squares[:, :, :side, :side].flatten(1) * (old / side)
