"""Load the model and V of an index, and check that they are the ones that it was built with."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from trackstar.choices import DeviceMap
from trackstar.errors import DamagedIndexError, IndexMismatchError, ModelError, OptionError, StoreError
from trackstar.gradients.projection import projection_digest
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, SecondMoment
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.store import Index, Manifest, ModelEntry
from trackstar.store.locations import opened_source
from trackstar.store.manifest import different_configuration
from trackstar.text import Words, abridged, one_line
from trackstar.workers.stored_losses import check_sample


def model_of_index(
    index: Index,
    model: LanguageModel | str | Path | None = None,
    *,
    device: str = "auto",
    device_map: DeviceMap | Mapping[str, str] | None = None,
) -> LanguageModel:
    """The model that an index was built with.

    It is compared by the digests of weights and tokenizer, by the fields of its configuration, and
    by the losses of a few stored examples, which it must give again.

    Args:
        index: The index.
        model: The model, or a path or hub name to load it from, if it has moved; None is the source
            that the index records.
        device: Device of a model that is loaded; see `load_model`.
        device_map: Spreads a model that is loaded over several GPUs; see `load_model`.

    Raises:
        IndexMismatchError: The model, its tokenizer or its projections are not those of the index,
            or it gives other losses.
        ModelError: It cannot be loaded.
    """
    manifest = index.manifest
    if not isinstance(model, LanguageModel):
        if model is None:
            model = _recorded_model(index, device, device_map)
        else:
            model = model_of_manifest(manifest, model, device=device, device_map=device_map)
    check_identity(index, model)
    check_sample(index, model)
    return model


def _recorded_model(index: Index, device: str, device_map: DeviceMap | Mapping[str, str] | None) -> LanguageModel:
    """The model from the place that the index records; it is not compared with the index."""
    entry = index.manifest.model
    try:
        source = opened_source(entry.source, entry.location, index.path)
        if entry.location in ("absolute", "relative") and not os.path.exists(source):
            raise ModelError(f"{source}: no such model")
        loaded = model_of_manifest(index.manifest, source, device=device, device_map=device_map, pinned=True)
    except (ModelError, StoreError) as error:
        raise ModelError(
            f"{error}; this is where {index.path} says that its model is; pass the model as `model`"
        ) from None
    return loaded


def check_identity(index: Index, model: LanguageModel, *, weights: bool = True) -> None:
    """Raise if weights, configuration, tokenizer or projections are not those that an index was built with.

    Args:
        index: The index.
        model: The model.
        weights: Whether the weights are read for their digest.

    Raises:
        IndexMismatchError: Something differs; the message names it.
    """
    manifest = index.manifest
    entry, projection = manifest.model, manifest.projection
    checks = [
        ("model.architecture", entry.architecture, model.architecture),
        ("model.dtype", entry.dtype, model.dtype_name),
        ("model.parameters", str(entry.parameters), str(model.parameters)),
        *different_fields(entry, model),
        ("model.digest", entry.digest, model.digest() if weights else entry.digest),
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
                f"{index.path}: made with {field} {abridged(Words(expected))}, but {model.source} has "
                f"{abridged(Words(found))}; pass the model that was indexed as `model`, or call `build_index` with "
                "this one"
            )


def different_fields(entry: ModelEntry, model: LanguageModel) -> list[tuple[str, str, str]]:
    """The fields of the configuration that differ between an index's model and another, as JSON texts.

    Returns:
        Name, value in the index and value in the model, for each.
    """
    adapter = {} if model.adapter is None else model.adapter.configuration
    return [
        (f"model.{field}.{name}", expected[name], found[name])
        for field, expected, found in (
            ("configuration", entry.configuration or {}, model.configuration()),
            ("adapter", entry.adapter or {}, adapter),
        )
        for name in different_configuration(found, expected)
    ]


def model_of_manifest(
    manifest: Manifest,
    source: str | Path,
    *,
    device: str = "auto",
    device_map: DeviceMap | Mapping[str, str] | None = None,
    pinned: bool = False,
) -> LanguageModel:
    """The model at `source`, loaded with the manifest's settings; it is not compared with the manifest.

    Args:
        manifest: The manifest.
        source: Path or hub name.
        device: See `load_model`.
        device_map: See `load_model`.
        pinned: Whether `source` is the manifest's own, so that its revision applies. Its GGUF file
            applies wherever there is one of that name.
    """
    entry = manifest.model
    pinned = pinned or str(source) == entry.source
    folder = Path(source)
    has_file = entry.gguf_file is not None and folder.is_dir() and (folder / entry.gguf_file).is_file()
    try:
        return load_model(
            str(source),
            revision=entry.revision if pinned else None,
            gguf_file=entry.gguf_file if pinned or has_file else None,
            parameters=entry.parameters or "merged",
            dtype=entry.dtype,
            device=device,
            device_map=device_map,
            layer_blocks=[
                (block.name, block.kind, block.layers, [matrix.name for matrix in block.matrices])
                for block in manifest.layer_blocks
            ],
        )
    except (OptionError, ModelError) as error:
        if entry.parameters != "adapter" or "`parameters" not in str(error):
            raise
        raise IndexMismatchError(
            f"{one_line(str(source))}: has no adapter whose matrices are those that were indexed; expected the index's "
            f"model, which is the adapter {one_line(entry.source)}; pass its folder as `model`"
        ) from None


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
