"""Load and check the model and V that an index was made with."""

from pathlib import Path

import torch

from trackstar.corpus.data_files import one_line
from trackstar.errors import DamagedIndexError, IndexMismatchError, ModelError
from trackstar.gradients.projection import projection_digest
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, SecondMoment
from trackstar.model.language_model import LanguageModel, dtype_name, load_model, matrix_shapes
from trackstar.store import Index, Manifest


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
            projection_digest(matrix_shapes(model), seed=projection.seed, side=projection.side),
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
