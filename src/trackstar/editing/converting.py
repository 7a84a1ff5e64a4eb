"""Convert an index to another codec, and to whitened coordinates if the codec needs them (Eq. 2)."""

import dataclasses

from trackstar.choices import CodecName
from trackstar.curvature.task import train_spectrum
from trackstar.curvature.whitening import AnyWhitening
from trackstar.editing.rewriting import check_apart, rewrite
from trackstar.errors import OptionError
from trackstar.indexing.settings import IndexSettings
from trackstar.indexing.train_whitening import TrainWhitening
from trackstar.store import Index, Place, StoredRows, as_folder, codec_bits, encode
from trackstar.store.locations import relocated


def convert_index(
    index: Index | str | Place,
    out: str | Place,
    *,
    codec: CodecName,
    damping: float | None = None,
    progress: bool = True,
) -> Index:
    """Make an index with the same rows in another codec.

    For `int8` and codecs with fewer bits, rows in projected coordinates are first whitened by the
    index's own R_train. With the index's own codec, rows are copied: an index of an older format
    becomes one of the current format. If the run is interrupted, the same call resumes it.

    Args:
        index: The index, in a codec with at least as many bits; it is not changed.
        out: Folder of the new index.
        codec: The new codec.
        damping: If rows are whitened now, the ridge added to R_train, as a fraction of its mean
            eigenvalue per block; None is chosen by `shrinkage_damping`.
        progress: Whether progress is shown.

    Returns:
        The new index, opened.

    Raises:
        OptionError: The codec is unknown or has more bits than the index's, `damping` is given
            though no row is whitened, or `out` is the index or lies in it.
        TrackstarError: An index cannot be read or written; see `trackstar.errors`.
    """
    index = Index.of(index)
    check_apart(out, [index])
    old = index.manifest
    IndexSettings(codec=codec, side=old.projection.side)  # raises if the codec is unknown or the side does not fit it
    if codec_bits(codec) > codec_bits(old.codec):
        raise OptionError(
            f"`codec`: expected no more bits than {old.codec}, the codec of {index.path}, found {codec}; choose "
            "another, or index the corpus with `build_index`"
        )
    w_train: AnyWhitening | None = None
    manifest = dataclasses.replace(relocated(old, index.path, as_folder(out)), codec=codec)
    if old.whitening is None and codec_bits(codec) <= 8:
        source = f"of all {index.rows} examples of the index"
        train = TrainWhitening.written_in(out, damping=damping, source=source)
        if train is None:
            train = TrainWhitening.of_index(index, damping=damping, source=source)
        w_train = train.whitening
        manifest = dataclasses.replace(manifest, coordinates="whitened", whitening=train.entry)
    elif damping is not None:
        coordinates = "is whitened already" if old.whitening is not None else f"is not whitened for {codec}"
        raise OptionError(f"`damping`: found {damping}, but {index.path} {coordinates}; leave it out")
    blocks = len(old.layer_blocks)

    def recode(stored: StoredRows) -> StoredRows:
        values = stored.decode()
        if w_train is not None:
            return encode(w_train.apply(values), codec, blocks)
        # Norms stay those of the rows before they were encoded for the first time.
        return dataclasses.replace(encode(values, codec, blocks), norms=stored.norms)

    spectrum = train_spectrum(index) if index.load_derived("train-spectrum") is not None else None
    copies = codec == old.codec  # into the current format; the codes are not decoded
    converted = rewrite(
        [index],
        out,
        manifest,
        recode=None if copies else recode,
        w_train=w_train,
        title="Converting",
        progress=progress,
    )
    if spectrum is not None:
        converted.save_derived("train-spectrum", {"values": spectrum})
    return converted
