"""Small indexes for the tests of the store: the same manifest, examples and codes every time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shard_bytes import without_places
from trackstar import store
from trackstar.choices import CodecName
from trackstar.corpus import TokenizedExample

# Of whitened rows; projected ones have so few dimensions that their eight examples are enough to store R_train.
SIDE = 8
PROJECTED_SIDE = 4
SHARD_EXAMPLES = 3
EXAMPLES = 8
SECOND_MOMENT = {"rows/a": torch.arange(5.0) + 1, "columns/a": torch.arange(3.0) + 2}
AUTOCORRELATION = {"blocks": torch.arange(2.0 * 16 * 16).reshape(2, 16, 16)}
WHITENING = {"whitening": torch.eye(SIDE**2).repeat(2, 1, 1)}


def small_manifest(codec: CodecName = "float32", *, seed: int = 7, side: int | None = None) -> store.Manifest:
    """The manifest of an index: two blocks of 4×4 dimensions and three examples a shard; for few bits 8×8, whitened."""
    quantized = store.quantized_bits(codec) is not None
    return store.Manifest(
        format_version=store.FORMAT_VERSION,
        trackstar_version="0.1.0",
        model=store.ModelEntry(
            source="/models/tiny",
            location="absolute",
            revision=None,
            gguf_file=None,
            libraries="transformers 5.23.0, torch 2.13.0",
            architecture="LlamaForCausalLM",
            configuration={"hidden_act": '"silu"', "rms_norm_eps": "1e-05"},
            digest="a" * 32,
            dtype="float32",
            parameters=None,
            adapter=None,
        ),
        tokenizer=store.TokenizerEntry(digest="b" * 32),
        corpora=(
            store.CorpusEntry(
                source="/data/corpus.jsonl",
                location="absolute",
                digest="c" * 32,
                text_field="text",
                id_field=None,
                limit=None,
                metadata=("source",),
            ),
        ),
        removed=None,
        windows=store.WindowsEntry(tokens=128, overlap=1),
        second_moment=store.SecondMomentEntry(
            kind="factored", source="estimated", digest=store.tensors_digest(SECOND_MOMENT), floor=1e-30
        ),
        projection=store.ProjectionEntry(seed=seed, side=side or _side(codec), digest="d" * 32),
        layer_blocks=tuple(
            store.LayerBlockEntry(
                name=f"{kind}.0-1",
                kind=kind,
                layers=(0, 1),
                matrices=(store.MatrixEntry(name=f"model.layers.0.{kind}.a", rows=5, columns=3),),
            )
            for kind in ("attention", "mlp")
        ),
        coverage=store.CoverageEntry(matrices=2, parameters=30, total_parameters=100, left_out=("embed_tokens",)),
        output="loss",
        coordinates="whitened" if quantized else "projected",
        whitening=store.WhiteningEntry(source="all", damping=0.5, digest=store.tensors_digest(WHITENING))
        if quantized
        else None,
        codec=codec,
        shard_examples=SHARD_EXAMPLES,
        completion=None,
    )


def _side(codec: CodecName) -> int:
    return PROJECTED_SIDE if store.quantized_bits(codec) is None else SIDE


def small_example(row: int) -> TokenizedExample:
    """Example `row`: each record has two windows, and a record without a scorable token lies between two of them."""
    record, window = 2 * (row // 2), row % 2
    tokens = 2 + row % 3
    return TokenizedExample(
        example_id=f"r{record}" if window == 0 else f"r{record}#1",
        parent_id=f"r{record}",
        record=record,
        window=window,
        text=f"Zürich {row} \N{SNOWMAN}\ud800 " + "x" * row,
        token_ids=np.arange(row, row + tokens, dtype=np.int32),
        target_mask=np.arange(tokens) > 0,
        metadata=f'{{"source":"{row}é\ud800"}}' if row % 3 else "",
    )


def small_projected_gradients(rows: range, side: int = PROJECTED_SIDE) -> Tensor:
    """φ of the examples `rows`: small whole numbers times powers of two, exact on every machine and in every codec."""
    columns = torch.arange(2 * side * side)
    return torch.stack([((7 * columns + 13 * row) % 31 - 15) * 2.0 ** (4 * (row % 8) - 20) for row in rows])


def small_content(
    first: int,
    stop: int,
    codec: CodecName = "float32",
    *,
    side: int | None = None,
    example: Callable[[int], TokenizedExample] = small_example,
) -> store.ShardContent:
    """The shard of the examples `first` to `stop`."""
    rows = range(first, stop)
    return store.ShardContent(
        stored=store.encode(small_projected_gradients(rows, side or _side(codec)), codec, 2),
        losses=torch.tensor([1.5 * (row + 1) for row in rows]),
        examples=[example(row) for row in rows],
        next_record=2 * (stop // 2),
        next_window=stop % 2,
        skipped=stop // 2,
    )


def write_small_index(
    path: str | Path,
    manifest: store.Manifest | None = None,
    *,
    examples: int = EXAMPLES,
    on_note: Callable[[str], None] = lambda note: None,
    after_step: Callable[[], None] = lambda: None,
) -> store.Manifest:
    """Write, or finish, an index as a pipeline does."""
    manifest = manifest or small_manifest()
    with store.IndexWriter.open(path, manifest, on_note=on_note) as writer:
        if writer.completed:
            return writer.manifest
        after_step()
        writer.write_tensors("second_moment", SECOND_MOMENT)
        while writer.resume_point.row < examples:
            first = writer.resume_point.row
            stop = min(first + manifest.shard_examples, examples)
            writer.write_shard(small_content(first, stop, manifest.codec, side=manifest.projection.side))
            after_step()
            writer.save_progress({"sum": torch.full((3,), float(stop))})
            after_step()
        if manifest.whitening is None:
            writer.write_tensors("autocorrelation", AUTOCORRELATION)
        else:
            writer.write_tensors("whitening", WHITENING)
        after_step()
        return writer.finish(records=2 * (examples // 2) + 2, skipped=examples // 2 + 1)


def index_bytes(path: Path) -> dict[str, bytes]:
    """Every file of an index but the lock, by its name in the folder; manifests without the paths in them."""
    return {
        name: without_places(content) if name.endswith("manifest.json") else content
        for name, content in index_files(path).items()
    }


def index_files(path: Path) -> dict[str, bytes]:
    """Every file of an index but the lock, by its name in the folder."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def completed(manifest: store.Manifest, **changes: object) -> store.Manifest:
    """The manifest with some fields of its completion changed."""
    assert manifest.completion is not None
    return dataclasses.replace(manifest, completion=dataclasses.replace(manifest.completion, **changes))
