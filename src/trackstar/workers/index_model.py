"""Load the model and V of an index, and check that they are the ones that it was built with."""

from pathlib import Path

import torch

from trackstar.errors import DamagedIndexError, IndexMismatchError, ModelError
from trackstar.gradients.projection import projection_digest
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, SecondMoment
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.store import Index, Manifest
from trackstar.text import one_line


def model_of_index(
    index: Index, model: LanguageModel | str | Path | None = None, *, device: str = "cpu"
) -> LanguageModel:
    """The model that an index was built with, checked by digest.

    Args:
        index: The index.
        model: The model, or a path or hub name to load it from, if it has moved; None is the source
            that the index records.
        device: Torch device, or `auto`, for a model that is loaded.

    Raises:
        IndexMismatchError: The model, its tokenizer or its projections are not those of the index.
        ModelError: It cannot be loaded.
    """
    manifest = index.manifest
    entry = manifest.model
    is_default = model is None
    if not isinstance(model, LanguageModel):
        try:
            model = model_of_manifest(manifest, entry.source if model is None else model, device=device)
        except ModelError as error:
            if not is_default:
                raise
            raise ModelError(
                f"{error}; this is the source that the index records; if it has moved, pass `model`"
            ) from None
    projection = manifest.projection
    checks = [
        ("model.architecture", entry.architecture, model.architecture),
        ("model.dtype", entry.dtype, model.dtype_name),
        ("model.digest", entry.digest, model.digest()),
        ("tokenizer.digest", manifest.tokenizer.digest, model.tokenizer_digest()),
        (
            "projection.digest",
            projection.digest,
            projection_digest(model.matrix_shapes, seed=projection.seed, side=projection.side),
        ),
    ]
    for field, expected, found in checks:
        if expected != found:
            raise IndexMismatchError(
                f"{index.path}: made with {field} {expected}, but {model.source} has {found}; pass the model that was "
                "indexed as `model`, or call `build_index` with this one"
            )
    return model


def model_of_manifest(manifest: Manifest, source: str | Path, *, device: str = "cpu") -> LanguageModel:
    """The model at `source`, loaded with the manifest's settings; its digest is not checked."""
    entry = manifest.model
    same_source = str(source) == entry.source
    return load_model(
        str(source),
        revision=entry.revision if same_source else None,
        gguf_file=entry.gguf_file if same_source else None,
        dtype=entry.dtype,
        device=device,
        layer_blocks=[
            (block.name, block.kind, block.layers, [matrix.name for matrix in block.matrices])
            for block in manifest.layer_blocks
        ],
    )


def second_moment_of_index(index: Index) -> SecondMoment:
    """V as stored in the index; `NO_SECOND_MOMENT` if the index was built without V.

    Raises:
        DamagedIndexError: V is missing, has another shape or dtype than the manifest says, or is no
            mean of squares.
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
    stored = index.tensors("second_moment")
    for name, shape in expected.items():
        tensor = stored.get(name)
        if tensor is None or tensor.dtype is not torch.float32 or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise DamagedIndexError(
                f"{index.path / 'second_moment.safetensors'}: {one_line(name)} is {found}, expected float32 "
                f"{list(shape)}; build the index again"
            )
        if not torch.isfinite(tensor).all() or (tensor < 0).any() or not (tensor > 0).any():
            raise DamagedIndexError(
                f"{index.path / 'second_moment.safetensors'}: {one_line(name)} has NaN, infinite or negative entries "
                "or is zero throughout, expected means of squares; build the index again"
            )
    tensors = {name: stored[name] for name in expected}
    return SecondMoment.from_tensors(tensors, source=entry.source, floor=entry.floor)
