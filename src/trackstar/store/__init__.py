"""The index on disk: its manifest, its shards, writing and reading them. FORMAT.md says what lies where."""

from trackstar.store.codecs import (
    CODECS,
    StoredRows,
    check_codec,
    check_quantizable,
    codec_bits,
    encode,
    quantized_bits,
    row_bytes,
)
from trackstar.store.index_tensors import IndexTensors, tensors_digest
from trackstar.store.manifest import (
    FORMAT_VERSION,
    CodecName,
    CompletionEntry,
    Coordinates,
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
    WhiteningEntry,
    WindowsEntry,
    differences,
    load_manifest,
)
from trackstar.store.quantization import Bits
from trackstar.store.reader import CodeChunk, Index
from trackstar.store.shard_content import ShardContent
from trackstar.store.shards import ResumePoint, Shard, StoredExample
from trackstar.store.verification import VerificationReport, verify
from trackstar.store.writer import PART_FOLDER, IndexWriter

__all__ = [
    "CODECS",
    "FORMAT_VERSION",
    "PART_FOLDER",
    "Bits",
    "CodeChunk",
    "CodecName",
    "CompletionEntry",
    "Coordinates",
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
    "StoredRows",
    "TokenizerEntry",
    "VerificationReport",
    "WhiteningEntry",
    "WindowsEntry",
    "check_codec",
    "check_quantizable",
    "codec_bits",
    "differences",
    "encode",
    "load_manifest",
    "quantized_bits",
    "row_bytes",
    "tensors_digest",
    "verify",
]
