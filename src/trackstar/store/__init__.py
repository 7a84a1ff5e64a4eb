"""The index on disk: its manifest, its shards, writing and reading them. FORMAT.md says what lies where."""

from trackstar.store.codecs import codec_dtype, decode, encode
from trackstar.store.index_tensors import IndexTensors, tensors_digest
from trackstar.store.manifest import (
    FORMAT_VERSION,
    CodecName,
    CompletionEntry,
    CorpusEntry,
    CoverageEntry,
    LayerBlockEntry,
    Manifest,
    MatrixEntry,
    ModelEntry,
    ProjectionEntry,
    ProjectionKind,
    SecondMomentEntry,
    ShardEntry,
    TokenizerEntry,
    WindowsEntry,
    differences,
    load_manifest,
)
from trackstar.store.reader import CodeChunk, Index
from trackstar.store.shard_content import ShardContent
from trackstar.store.shards import ResumePoint, Shard, StoredExample
from trackstar.store.verification import VerificationReport, verify
from trackstar.store.writer import IndexWriter

__all__ = [
    "FORMAT_VERSION",
    "CodeChunk",
    "CodecName",
    "CompletionEntry",
    "CorpusEntry",
    "CoverageEntry",
    "Index",
    "IndexTensors",
    "IndexWriter",
    "LayerBlockEntry",
    "Manifest",
    "MatrixEntry",
    "ModelEntry",
    "ProjectionEntry",
    "ProjectionKind",
    "ResumePoint",
    "SecondMomentEntry",
    "Shard",
    "ShardContent",
    "ShardEntry",
    "StoredExample",
    "TokenizerEntry",
    "VerificationReport",
    "WindowsEntry",
    "codec_dtype",
    "decode",
    "differences",
    "encode",
    "load_manifest",
    "tensors_digest",
    "verify",
]
