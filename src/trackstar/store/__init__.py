"""The index on disk.

Projected gradients φ (Eq. 4) or whitened ones u = W_train φ go in, with V, R_train or W_train,
losses, tokens and texts; the same come out, in shards of a format that FORMAT.md specifies byte by
byte, with a digest over every file.
"""

from trackstar.store.codecs import StoredRows, codec_bits, encode, quantized_bits, row_bytes
from trackstar.store.files.places import Place, as_folder, is_url, lies_in, place_name
from trackstar.store.index_tensors import IndexTensors, have_shapes, tensors_digest
from trackstar.store.manifest import FORMAT_VERSION, Manifest, differences, load_manifest, stores_autocorrelation
from trackstar.store.manifest_entries import (
    CompletionEntry,
    CorpusEntry,
    CoverageEntry,
    LayerBlockEntry,
    MatrixEntry,
    ModelEntry,
    ProjectionEntry,
    SecondMomentEntry,
    ShardEntry,
    TokenizerEntry,
    WhiteningEntry,
    WindowsEntry,
)
from trackstar.store.quantization import Bits
from trackstar.store.reader import CodeChunk, Index
from trackstar.store.shard_content import ShardContent
from trackstar.store.shard_folder import (
    PART_FOLDER,
    PREPARING_LOCK,
    CorpusEnd,
    ShardFolder,
    is_begun,
    part_folder,
    remove_end,
)
from trackstar.store.shards import ResumePoint, Shard, StoredExample
from trackstar.store.verification import VerificationReport, verify
from trackstar.store.writer import IndexWriter, check_same, refuse_foreign_folder

__all__ = [
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
    "check_same",
    "codec_bits",
    "differences",
    "encode",
    "have_shapes",
    "is_begun",
    "is_url",
    "lies_in",
    "load_manifest",
    "part_folder",
    "place_name",
    "quantized_bits",
    "refuse_foreign_folder",
    "remove_end",
    "row_bytes",
    "stores_autocorrelation",
    "tensors_digest",
    "verify",
]
