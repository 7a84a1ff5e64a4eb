"""Check that a shard's values are plausible, which a digest from the same writer cannot show."""

import json

import numpy as np
import torch

from trackstar.store.codecs import quantized_bits
from trackstar.store.shards import ResumePoint, Shard, ragged_tensors
from trackstar.store.tensor_file import damaged

ROWS_AT_ONCE = 256


def check_content(shard: Shard, *, begin: ResumePoint) -> None:
    """Check every value of an open shard whose bytes agree with its digest.

    Args:
        shard: The shard.
        begin: End of the previous shard.

    Raises:
        DamagedIndexError: A value is impossible for a shard; the message names the file and the
            row.
    """
    _check_numbers(shard)
    _check_examples(shard, begin)


def _check_numbers(shard: Shard) -> None:
    """Check scales, norms, losses and floating-point codes."""
    assert len(shard.scales) == len(shard.norms) == shard.rows
    wrong = torch.nonzero(~torch.isfinite(shard.losses)).flatten()
    if len(wrong):
        raise damaged(shard.path, f"row {int(wrong[0])} has a loss that is not finite")
    if quantized_bits(shard.codec) is not None:
        return  # any bits are valid codes
    row = 0
    for part in shard.parts():
        for codes in part.codes.split(ROWS_AT_ONCE):
            finite = torch.isfinite(codes).all(dim=1)
            if not bool(finite.all()):
                raise damaged(shard.path, f"row {row + int(torch.nonzero(~finite)[0])} has a code that is not finite")
            row += len(codes)


def _check_examples(shard: Shard, begin: ResumePoint) -> None:
    """Check that offsets cover all values, masks agree with counts, and records and windows rise."""
    for kind, names in ragged_tensors(shard).items():
        offsets, length = shard.read(f"{kind}_offsets"), shard.file.tensors[names[0]].shape[0]
        if offsets[0] != 0 or offsets[-1] != length or np.any(offsets[1:] < offsets[:-1]):
            raise damaged(shard.path, f"{kind}_offsets do not rise from 0 to {length}")
    counts = shard.target_counts.tolist()
    before = (begin.record, begin.window)
    after = (shard.end.record, shard.end.window)
    for stored, count in zip(shard.examples(), counts, strict=True):
        example, row = stored.example, stored.row - shard.first_row
        mask = example.target_mask
        if len(mask) == 0 or mask[0] or count != np.count_nonzero(mask) or count == 0:
            raise damaged(shard.path, f"row {row} has a target mask that does not fit its {count} targets")
        if not _is_object(example.metadata):
            raise damaged(shard.path, f"row {row} has metadata that are no JSON object")
        if not before <= (example.record, example.window) < after:
            found = (example.record, example.window)
            raise damaged(shard.path, f"row {row} is of record and window {found}, expected {before} to {after}")
    if sum(counts) != shard.targets:
        raise damaged(shard.path, f"{shard.targets} targets in the header, {sum(counts)} in the rows")
    if shard.end.skipped < begin.skipped:
        raise damaged(shard.path, f"{shard.end.skipped} skipped records, expected at least {begin.skipped}")


def _is_object(metadata: str) -> bool:
    """Whether the metadata of an example are a JSON object, or nothing."""
    try:
        return not metadata or isinstance(json.loads(metadata), dict)
    except (ValueError, RecursionError):
        return False
