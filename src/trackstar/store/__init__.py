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
from trackstar.store.files.places import Place, as_folder, is_url, lies_in, place_name
from trackstar.store.index_tensors import IndexTensors, have_shapes, tensors_digest
from trackstar.store.manifest import (
    FORMAT_VERSION,
    CompletionEntry,
    CorpusEntry,
    CoverageEntry,
    LayerBlockEntry,
    Manifest,
    MatrixEntry,
    ModelEntry,
    ProjectionEntry,
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
from trackstar.store.shard_folder import PART_FOLDER, PREPARING_LOCK, CorpusEnd, ShardFolder, is_begun, remove_end
from trackstar.store.shards import ResumePoint, Shard, StoredExample
from trackstar.store.verification import VerificationReport, verify
from trackstar.store.writer import IndexWriter, check_same

__all__ = [
    "CODECS",
    "FORMAT_VERSION",
    "PART_FOLDER",
    "PREPARING_LOCK",
    "Bits",
    "CodeChunk",
    "CompletionEntry",
    "CorpusEnd",
    "CorpusEntry",
    "CoverageEntry",
    "Index",
    "IndexTensors",
    "IndexWriter",
    "LayerBlockEntry",
    "Manifest",
    "MatrixEntry",
    "ModelEntry",
    "Place",
    "ProjectionEntry",
    "ResumePoint",
    "SecondMomentEntry",
    "Shard",
    "ShardContent",
    "ShardEntry",
    "ShardFolder",
    "StoredExample",
    "StoredRows",
    "TokenizerEntry",
    "VerificationReport",
    "WhiteningEntry",
    "WindowsEntry",
    "as_folder",
    "check_codec",
    "check_quantizable",
    "check_same",
    "codec_bits",
    "differences",
    "encode",
    "have_shapes",
    "is_begun",
    "is_url",
    "lies_in",
    "load_manifest",
    "place_name",
    "quantized_bits",
    "remove_end",
    "row_bytes",
    "tensors_digest",
    "verify",
]
