"""The content of a shard, and the tensors that it is written as."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from trackstar.choices import CodecName
from trackstar.corpus import TokenizedExample
from trackstar.store.codecs import StoredRows, code_columns, codec_dtype, scales_shape
from trackstar.store.manifest import Manifest


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """The properties that all shards of an index share.

    Attributes:
        index: Identity digest of the index's manifest.
        examples: Number of examples in every shard but the last.
        dimensions: Number of dimensions of a row.
        blocks: Number of layer blocks.
        codec: How rows are stored.
        checksums: Whether the files have checksums of their blocks, as from format version 4 on.
        metadata: Whether the files hold the records' metadata, as from format version 5 on.
    """

    index: str
    examples: int
    dimensions: int
    blocks: int
    codec: CodecName
    checksums: bool
    metadata: bool

    @classmethod
    def of(cls, manifest: Manifest) -> "ShardPlan":
        """The plan of the index with this manifest."""
        return cls(
            index=manifest.identity_digest(),
            examples=manifest.shard_examples,
            dimensions=manifest.dimensions,
            blocks=len(manifest.layer_blocks),
            codec=manifest.codec,
            checksums=manifest.format_version >= 4,
            metadata=manifest.format_version >= 5,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardContent:
    """The content of a shard.

    Attributes:
        stored: The encoded coordinates, contiguous, in main memory.
        losses: Summed cross-entropy of each example's target tokens, in nats.
        examples: The examples, in the order of the rows.
        next_record: Record of the example that follows the shard's last.
        next_window: Window of that example within its record.
        skipped: Number of records before `next_record` without a target token.
    """

    stored: StoredRows
    losses: Float32[Tensor, "rows"]
    examples: Sequence[TokenizedExample]
    next_record: int
    next_window: int
    skipped: int


def shard_tensors(content: ShardContent, plan: ShardPlan) -> dict[str, Tensor]:
    """The tensors of a shard's file, in the file's order; the codes are not copied."""
    examples = content.examples
    rows = len(examples)
    assert 1 <= rows <= plan.examples, rows
    stored = content.stored
    assert stored.codec == plan.codec, stored.codec
    assert stored.codes.shape == (rows, code_columns(plan.codec, plan.dimensions)), stored.codes.shape
    assert stored.codes.dtype is codec_dtype(plan.codec), stored.codes.dtype
    assert stored.scales.shape == scales_shape(plan.codec, rows, plan.blocks), stored.scales.shape
    assert stored.norms.shape == content.losses.shape == (rows,)
    token_offsets, tokens = _ragged([example.token_ids for example in examples], np.int32)
    _, masks = _ragged([example.target_mask for example in examples], np.uint8)
    assert len(tokens) == len(masks)
    text_offsets, text = _strings([example.text for example in examples])
    id_offsets, ids = _strings([example.example_id for example in examples])
    parent_offsets, parents = _strings([example.parent_id for example in examples])
    metadata_offsets, metadata = _strings([example.metadata for example in examples])
    counts = [int(np.count_nonzero(example.target_mask)) for example in examples]
    return {
        "codes": stored.codes,
        "records": torch.tensor([example.record for example in examples], dtype=torch.int64),
        "token_offsets": token_offsets,
        "text_offsets": text_offsets,
        "id_offsets": id_offsets,
        "parent_offsets": parent_offsets,
        "metadata_offsets": metadata_offsets,
        "scales": stored.scales.to(torch.float32),
        "norms": stored.norms.to(torch.float32),
        "losses": content.losses.to(torch.float32),
        "target_counts": torch.tensor(counts, dtype=torch.int32),
        "windows": torch.tensor([example.window for example in examples], dtype=torch.int32),
        "tokens": tokens,
        "target_masks": masks,
        "text": text,
        "ids": ids,
        "parents": parents,
        "metadata": metadata,
    }


def _ragged(parts: Sequence[np.ndarray], dtype: type) -> tuple[Tensor, Tensor]:
    """Offsets [parts + 1] and concatenated values: part i has the values offsets[i] to offsets[i + 1]."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return torch.from_numpy(offsets), torch.from_numpy(np.concatenate(parts).astype(dtype))


def _strings(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    return _ragged([np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8) for text in texts], np.uint8)
