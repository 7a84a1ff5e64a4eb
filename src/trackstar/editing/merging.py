"""Merge indexes built with the same settings."""

import dataclasses
import itertools
from collections.abc import Sequence

from trackstar.editing.duplicates import check_disjoint, records_of
from trackstar.editing.rewriting import check_apart, names_digest, opened, rewrite
from trackstar.errors import IndexMismatchError, OptionError
from trackstar.store import (
    Index,
    Manifest,
    Place,
    differences,
)
from trackstar.text import abridged

_MERGED_FIELDS = ("corpora", "removed", "shard_examples", "trackstar_version", "format_version")


def merge_indexes(indexes: Sequence[Index | str | Place], out: str | Place, *, progress: bool = True) -> Index:
    """One index of all the examples of several, which were made alike but of other corpora.

    A run that was interrupted goes on when the same call is made again; a finished index is opened.

    Args:
        indexes: Two or more, their examples in this order.
        out: The new index's folder.
        progress: Whether progress is shown where stderr is a terminal.

    Raises:
        IndexMismatchError: They were not made alike; the message names the first field that differs.
        OptionError: There are fewer than two, or the new folder is one of them or in one.
        TrackstarError: An index cannot be read or written; see `trackstar.errors`.
    """
    merged = [opened(index) for index in indexes]
    if len(merged) < 2:
        raise OptionError(f"merge: found {len(merged)} index, expected two or more")
    check_apart(out, merged)
    first = merged[0].manifest
    for index in merged:
        alike = dataclasses.replace(index.manifest, **{field: getattr(first, field) for field in _MERGED_FIELDS})
        different = differences(alike, first)
        if different:
            field, found, expected = different[0]
            raise IndexMismatchError(
                f"{index.path}: made with {field} {abridged(found)}, but {merged[0].path} with {abridged(expected)}; "
                "only indexes that were made alike can be merged: make the later one with `trackstar add`"
            )
    check_disjoint(merged)
    manifest = joined_manifest([index.manifest for index in merged], [records_of(index) for index in merged])
    return rewrite(merged, out, manifest, title="Merging", progress=progress)


def joined_manifest(manifests: Sequence[Manifest], records: Sequence[int]) -> Manifest:
    """What an index is made with that has the examples of several that were made alike, in this order.

    Args:
        manifests: Theirs.
        records: How many records were read for each; the last may be left out.
    """
    starts = itertools.accumulate(records, initial=0)
    corpora = [
        dataclasses.replace(corpus, first_record=corpus.first_record + start)
        for manifest, start in zip(manifests, starts)  # noqa: B905 - there may be a start after the last
        for corpus in manifest.corpora
    ]
    removed = [manifest.removed for manifest in manifests if manifest.removed is not None]
    return dataclasses.replace(
        manifests[0], corpora=tuple(corpora), removed=names_digest(removed) if removed else None, completion=None
    )
