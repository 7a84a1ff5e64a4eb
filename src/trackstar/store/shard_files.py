"""Write and open shard files, and check their headers against the index."""

import sys

import torch

from trackstar.choices import CodecName
from trackstar.errors import IndexMismatchError, StoreError
from trackstar.store.block_checksums import CHECKSUMS
from trackstar.store.codecs import code_columns, codec_dtype, scales_shape
from trackstar.store.files.durable import PARTIAL_SUFFIX
from trackstar.store.files.places import Place
from trackstar.store.manifest import shard_file_name
from trackstar.store.manifest_entries import ShardEntry
from trackstar.store.shard_content import ShardContent, ShardPlan, shard_tensors
from trackstar.store.shards import ResumePoint, Shard
from trackstar.store.strict_json import FieldError
from trackstar.store.tensor_file import TensorFile, damaged, open_tensor_file, write_tensor_file
from trackstar.text import abridged, cut

SHARD_FORMAT = "trackstar-shard-4"
_WITHOUT_METADATA = "trackstar-shard-3"  # of indexes with format version 4
_WITHOUT_CHECKSUMS = "trackstar-shard-2"  # of indexes with format version 3
SHARD_METADATA = {
    "format",
    "manifest_digest",
    "number",
    "first_row",
    "targets",
    "next_record",
    "next_window",
    "skipped",
}


def write_shard_file(
    folder: Place, plan: ShardPlan, number: int, content: ShardContent, *, partial_suffix: str = PARTIAL_SUFFIX
) -> Shard:
    """Write shard `number`, durably, and open it.

    Args:
        folder: Folder of the index's shards.
        plan: The index's plan.
        number: Number of the shard.
        content: Content of the shard.
        partial_suffix: See `replacing`.

    Raises:
        StoreError: The file cannot be written; nothing of it remains.
    """
    if sys.byteorder != "little":
        raise StoreError("this machine is big-endian, but an index is little-endian; use another machine")
    assert plan.metadata, "an index of an older format is read only"
    tensors = shard_tensors(content, plan)
    metadata = {
        "format": SHARD_FORMAT,
        "manifest_digest": plan.index,
        "number": str(number),
        "first_row": str(number * plan.examples),
        "targets": str(int(tensors["target_counts"].sum())),
        "next_record": str(content.next_record),
        "next_window": str(content.next_window),
        "skipped": str(content.skipped),
    }
    path = folder / shard_file_name(number)
    write_tensor_file(path, tensors, metadata, checksums=True, partial_suffix=partial_suffix)
    return open_shard(path, plan, number)


def open_shard(path: Place, plan: ShardPlan, number: int, entry: ShardEntry | None = None) -> Shard:
    """Open the file of shard `number`, comparing its header with the plan and the file's size.

    The data are not read.

    Args:
        path: The file.
        plan: The index's plan.
        number: Number of the shard.
        entry: The shard's entry in the manifest of a finished index.

    Raises:
        DamagedIndexError: The file is missing, cut off or not this shard.
        IndexMismatchError: The file is a shard of another index.
        StoreError: The file cannot be read.
    """
    file = open_tensor_file(path)
    older = _WITHOUT_METADATA if plan.checksums else _WITHOUT_CHECKSUMS
    expected_format = SHARD_FORMAT if plan.metadata else older
    if file.metadata.get("format") != expected_format:
        raise damaged(path, f"format {abridged(file.metadata.get('format'))}, expected {expected_format!r}")
    found_index = file.metadata.get("manifest_digest")
    if found_index != plan.index:
        raise IndexMismatchError(
            f"{path}: belongs to the index with manifest digest {abridged(found_index)}, expected {plan.index!r}; "
            "move the file back to that index"
        )
    try:
        shard = _parse_shard(file, plan.codec)
        _check_shard(shard, plan, number, entry)
    except FieldError as error:
        raise damaged(path, str(error)) from error
    return shard


def shard_rows(file: TensorFile) -> int:
    """Number of examples in a shard's file.

    Raises:
        DamagedIndexError: The file is not a shard.
    """
    try:
        return _length(file, "losses")
    except FieldError as error:
        raise damaged(file.path, str(error)) from error


def _parse_shard(file: TensorFile, codec: CodecName) -> Shard:
    rows, tokens = _length(file, "losses"), _length(file, "tokens")
    first_row = _number(file, "first_row")
    end = ResumePoint(
        row=first_row + rows,
        record=_number(file, "next_record"),
        window=_number(file, "next_window"),
        skipped=_number(file, "skipped"),
    )
    return Shard(
        file=file,
        number=_number(file, "number"),
        first_row=first_row,
        rows=rows,
        tokens=tokens,
        targets=_number(file, "targets"),
        end=end,
        codec=codec,
    )


def _number(file: TensorFile, name: str) -> int:
    text = file.metadata.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 19 and str(int(text)) == text):
        raise FieldError(name, file.metadata.get(name), "a whole number")
    return int(text)


def _length(file: TensorFile, name: str) -> int:
    info = file.tensors.get(name)
    if info is None or len(info.shape) != 1:
        raise FieldError(name, None if info is None else list(info.shape), "a tensor with one dimension")
    return info.shape[0]


def _check_shard(shard: Shard, plan: ShardPlan, number: int, entry: ShardEntry | None) -> None:
    expected = {
        "number": (shard.number, number),
        "first_row": (shard.first_row, number * plan.examples),
        "metadata": (sorted(shard.file.metadata), sorted(SHARD_METADATA)),
    }
    if entry is not None:
        expected["rows"] = (shard.rows, entry.rows)
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise FieldError(name, found, str(wanted))
    if entry is not None and shard.digest != entry.digest:
        raise FieldError("digest", shard.digest, f"{cut(entry.digest)}, the manifest's")
    if not 1 <= shard.rows <= plan.examples:
        raise FieldError("rows", shard.rows, f"1 to {plan.examples}")
    _check_tensors(shard, plan)


def _check_tensors(shard: Shard, plan: ShardPlan) -> None:
    """Check names, order, dtypes and shapes of the tensors."""
    rows, tokens = shard.rows, shard.tokens
    expected: dict[str, tuple[torch.dtype, tuple[int, ...] | None]] = {
        "codes": (codec_dtype(plan.codec), (rows, code_columns(plan.codec, plan.dimensions))),
        "records": (torch.int64, (rows,)),
        "token_offsets": (torch.int64, (rows + 1,)),
        "text_offsets": (torch.int64, (rows + 1,)),
        "id_offsets": (torch.int64, (rows + 1,)),
        "parent_offsets": (torch.int64, (rows + 1,)),
        "metadata_offsets": (torch.int64, (rows + 1,)),
        "scales": (torch.float32, scales_shape(plan.codec, rows, plan.blocks)),
        "norms": (torch.float32, (rows,)),
        "losses": (torch.float32, (rows,)),
        "target_counts": (torch.int32, (rows,)),
        "windows": (torch.int32, (rows,)),
        "tokens": (torch.int32, (tokens,)),
        "target_masks": (torch.uint8, (tokens,)),
        "text": (torch.uint8, None),
        "ids": (torch.uint8, None),
        "parents": (torch.uint8, None),
        "metadata": (torch.uint8, None),
    }
    if not plan.metadata:
        del expected["metadata_offsets"], expected["metadata"]
    if plan.checksums:
        expected[CHECKSUMS] = (torch.int64, None)  # opening the file has compared their number with its size
    names = list(shard.file.tensors)
    if names != list(expected):
        raise FieldError("the tensors", names, ", ".join(expected))
    for name, (dtype, shape) in expected.items():
        info = shard.file.tensors[name]
        if info.dtype is not dtype or (info.shape != shape if shape is not None else len(info.shape) != 1):
            wanted = f"{dtype} {list(shape) if shape is not None else 'with one dimension'}"
            raise FieldError(name, f"{info.dtype} {list(info.shape)}", wanted)
