"""What an index was made with: written into its manifest, and checked when the index is asked."""

from importlib.metadata import version
from pathlib import Path

import torch

from trackstar.errors import DamagedIndexError, IndexMismatchError, ModelError
from trackstar.examples import Corpus
from trackstar.examples.files import one_line
from trackstar.gradients import Output
from trackstar.model import LanguageModel, load_model
from trackstar.projection import projection_digest
from trackstar.second_moment import DEFAULT_FLOOR, NO_SECOND_MOMENT, SecondMoment
from trackstar.store import (
    FORMAT_VERSION,
    CodecName,
    CorpusEntry,
    CoverageEntry,
    Index,
    LayerBlockEntry,
    Manifest,
    MatrixEntry,
    ModelEntry,
    ProjectionEntry,
    ProjectionKind,
    SecondMomentEntry,
    TokenizerEntry,
    WhiteningEntry,
    WindowsEntry,
    tensors_digest,
)


def make_manifest(
    model: LanguageModel,
    corpus: Corpus,
    windows: WindowsEntry,
    moment: SecondMoment,
    *,
    seed: int,
    side: int,
    codec: CodecName,
    shard_examples: int,
    whitening: WhiteningEntry | None = None,
    output: Output = "loss",
    projection: ProjectionKind = "two-sided",
) -> Manifest:
    """The manifest of an index that is about to be made: all that decides its content."""
    covered = model.coverage
    return Manifest(
        format_version=FORMAT_VERSION,
        trackstar_version=version("trackstar-tda"),
        model=ModelEntry(
            source=model.source,
            revision=model.revision,
            gguf_file=model.gguf_file,
            architecture=model.architecture,
            digest=model.digest(),
            dtype=dtype_name(model),
        ),
        tokenizer=TokenizerEntry(digest=model.tokenizer_digest()),
        corpora=(corpus_entry(corpus),),
        removed=None,
        windows=windows,
        second_moment=second_moment_entry(moment),
        projection=ProjectionEntry(
            seed=seed,
            side=side,
            digest=projection_digest(_shapes(model), seed=seed, side=side),
            kind=projection,
        ),
        layer_blocks=tuple(
            LayerBlockEntry(
                name=block.name,
                kind=block.kind,
                layers=(block.first_layer, block.last_layer),
                matrices=tuple(
                    MatrixEntry(name=matrix.name, rows=matrix.rows, columns=matrix.columns) for matrix in block.matrices
                ),
            )
            for block in model.blocks
        ),
        coverage=CoverageEntry(
            matrices=covered.matrices,
            parameters=covered.parameters,
            total_parameters=covered.total_parameters,
            left_out=covered.left_out,
        ),
        output=output,
        coordinates="projected" if whitening is None else "whitened",
        whitening=whitening,
        codec=codec,
        shard_examples=shard_examples,
        completion=None,
    )


def second_moment_entry(moment: SecondMoment) -> SecondMomentEntry:
    """What a manifest says of V."""
    return SecondMomentEntry(
        kind=moment.kind,
        source=moment.source,
        digest=None if moment.kind == "none" else tensors_digest(moment.tensors()),
        floor=moment.floor if moment.kind != "none" else DEFAULT_FLOOR,
    )


def corpus_entry(corpus: Corpus) -> CorpusEntry:
    """What a manifest says of a corpus; reads all of it for its digest."""
    return CorpusEntry(
        source=corpus.name,
        digest=corpus.digest(),
        text_field=corpus.text_field,
        id_field=corpus.id_field,
        limit=corpus.limit,
    )


def model_of_index(
    index: Index, model: LanguageModel | str | Path | None = None, *, device: str = "cpu"
) -> LanguageModel:
    """The model that an index was made with, checked by digest.

    Raises:
        IndexMismatchError: It, its tokenizer or the projections drawn for it are not what the index was made with.
    """
    manifest = index.manifest
    entry = manifest.model
    given = model is not None
    if not isinstance(model, LanguageModel):
        try:
            model = model_of_manifest(manifest, entry.source if model is None else model, device=device)
        except ModelError as error:
            if given:
                raise
            raise ModelError(
                f"{error}; the index says that its model is there: where it has been moved, give --model"
            ) from None
    projection = manifest.projection
    checks = [
        ("model.architecture", entry.architecture, model.architecture),
        ("model.dtype", entry.dtype, dtype_name(model)),
        ("model.digest", entry.digest, model.digest()),
        ("tokenizer.digest", manifest.tokenizer.digest, model.tokenizer_digest()),
        (
            "projection.digest",
            projection.digest,
            projection_digest(_shapes(model), seed=projection.seed, side=projection.side),
        ),
    ]
    for field, expected, found in checks:
        if expected != found:
            raise IndexMismatchError(
                f"{index.path}: made with {field} {expected}, but {model.source} has {found}; give the model that was "
                "indexed (--model), or index again"
            )
    return model


def model_of_manifest(manifest: Manifest, source: str | Path, *, device: str = "cpu") -> LanguageModel:
    """The model at `source`, loaded as the manifest's was; whether it is that model, nothing here checks."""
    entry = manifest.model
    same_place = str(source) == entry.source
    return load_model(
        str(source),
        revision=entry.revision if same_place else None,
        gguf_file=entry.gguf_file if same_place else None,
        dtype=entry.dtype,
        device=device,
        layer_blocks=[
            (block.name, block.kind, block.layers, [matrix.name for matrix in block.matrices])
            for block in manifest.layer_blocks
        ],
    )


def second_moment_of_index(index: Index) -> SecondMoment:
    """V as the index keeps it; none where it was made without.

    Raises:
        DamagedIndexError: It is missing, not what was written, or no mean of squares of each matrix.
    """
    entry = index.manifest.second_moment
    if entry.kind == "none":
        return NO_SECOND_MOMENT
    expected: dict[str, tuple[int, ...]] = {}
    for matrix in (matrix for block in index.manifest.layer_blocks for matrix in block.matrices):
        if entry.kind == "factored":
            expected |= {f"row/{matrix.name}": (matrix.rows,), f"column/{matrix.name}": (matrix.columns,)}
        else:
            expected[f"entries/{matrix.name}"] = (matrix.rows, matrix.columns)
    found = index.tensors("second_moment")
    for name, shape in expected.items():
        tensor = found.get(name)
        if tensor is None or tensor.dtype is not torch.float32 or tuple(tensor.shape) != shape:
            what = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise DamagedIndexError(
                f"{index.path / 'second_moment.safetensors'}: {one_line(name)} is {what}, expected float32 "
                f"{list(shape)}; make the index again"
            )
        if not torch.isfinite(tensor).all() or (tensor < 0).any() or not (tensor > 0).any():
            raise DamagedIndexError(
                f"{index.path / 'second_moment.safetensors'}: {one_line(name)} has NaN, infinite or negative entries "
                "or is zero throughout, expected means of squares; make the index again"
            )
    tensors = {name: found[name] for name in expected}
    return SecondMoment.from_tensors(tensors, source=entry.source, floor=entry.floor)


def _shapes(model: LanguageModel) -> list[tuple[str, int, int]]:
    return [(matrix.name, matrix.rows, matrix.columns) for matrix in model.matrices]


def dtype_name(model: LanguageModel) -> str:
    """The name of the dtype that gradients are computed in."""
    return str(model.dtype).removeprefix("torch.")
