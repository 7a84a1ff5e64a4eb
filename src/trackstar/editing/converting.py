"""Convert an index to another codec or to whitened coordinates."""

import dataclasses

from trackstar.choices import CodecName
from trackstar.curvature.task import train_spectrum
from trackstar.curvature.whitening import Whitening
from trackstar.editing.rewriting import check_apart, opened, rewrite
from trackstar.errors import OptionError
from trackstar.indexing.train_whitening import TrainWhitening
from trackstar.store import (
    Index,
    Place,
    StoredRows,
    check_codec,
    check_quantizable,
    codec_bits,
    encode,
)


def convert_index(
    index: Index | str | Place,
    out: str | Place,
    *,
    codec: CodecName,
    damping: float | None = None,
    progress: bool = True,
) -> Index:
    """The index with its rows stored by another codec; whitened first by its own R_train for int8 and fewer bits.

    Args:
        index: In projected coordinates, or in whitened ones of a codec of at least as many bits.
        out: The new index's folder.
        codec: The new codec.
        damping: Fraction of a block's mean eigenvalue added to R_train where the rows are whitened; None is chosen by
            `shrinkage_damping`.
        progress: Whether progress is shown where stderr is a terminal.

    Raises:
        OptionError: The codec is unknown or needs more bits than are there, a damping is given for an index that is
            whitened, or the new folder is the index or in it.
        TrackstarError: An index cannot be read or written; see `trackstar.errors`.
    """
    index = opened(index)
    check_apart(out, [index])
    old = index.manifest
    check_codec(codec)
    check_quantizable(codec, old.projection.side)
    if codec_bits(codec) > codec_bits(old.codec):
        raise OptionError(
            f"--codec {codec}: {index.path} keeps {old.codec}, which does not hold what {codec} would; index again, or "
            "take a codec of no more bits"
        )
    train: Whitening | None = None
    manifest = dataclasses.replace(old, codec=codec, completion=None)
    if old.whitening is None and codec_bits(codec) <= 8:
        source = f"of all {index.rows} examples of the index"
        made = TrainWhitening.kept_in(out, damping=damping, source=source)
        if made is None:
            made = TrainWhitening.of_index(index, damping=damping, source=source)
        train = made.whitening
        manifest = dataclasses.replace(manifest, coordinates="whitened", whitening=made.entry)
    elif damping is not None:
        raise OptionError(f"--damping {damping}: {index.path} with --codec {codec} is not whitened anew; leave it out")
    blocks = len(old.layer_blocks)

    def recode(stored: StoredRows) -> StoredRows:
        values = stored.decode()
        if train is not None:
            return encode(train.apply(values), codec, blocks)
        # Norms stay those of the rows before they were coded at all.
        return dataclasses.replace(encode(values, codec, blocks), norms=stored.norms)

    spectrum = train_spectrum(index) if index.load_derived("train-spectrum") is not None else None
    made_index = rewrite([index], out, manifest, recode=recode, train=train, title="Converting", progress=progress)
    if spectrum is not None:
        made_index.save_derived("train-spectrum", {"values": spectrum})
    return made_index
