"""Merge indexes built with the same settings."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from trackstar.choices import DUPLICATE_IDS, DuplicateIds
from trackstar.editing.duplicates import check_disjoint, record_count, renaming
from trackstar.editing.rewriting import check_apart, names_digest, rewrite
from trackstar.errors import IndexMismatchError, OptionError, check_choice
from trackstar.store import Index, Manifest, Place, as_folder, differences
from trackstar.store.locations import relocated
from trackstar.text import abridged

_MERGED_FIELDS = ("corpora", "removed", "shard_examples", "trackstar_version", "format_version")


def merge_indexes(
    indexes: Sequence[Index | str | Place],
    out: str | Place,
    *,
    duplicate_ids: DuplicateIds = "refuse",
    progress: bool = True,
) -> Index:
    """Merge indexes that were built with the same settings from different corpora.

    If the run is interrupted, the same call resumes it. If the new index is finished, it is opened.

    Args:
        indexes: Two or more indexes; their examples keep this order.
        out: Folder of the new index.
        duplicate_ids: What is done with a document whose name one of an earlier index has: `refuse`
            raises, `number` names it `NAME~2` in the new index.
        progress: Whether progress is shown.

    Returns:
        The new index, opened.

    Raises:
        IndexMismatchError: The settings differ; the message names the first field that does.
        OptionError: There are fewer than two indexes, two share an example, or `out` is one of them
            or lies in one.
        CorpusError: Two documents have the same name; the message names both places.
        TrackstarError: An index cannot be read or written; see `trackstar.errors`.
    """
    if isinstance(indexes, (str, Path, Index)):
        raise OptionError(f"`indexes`: expected a list of two or more, found one, {abridged(str(indexes))}")
    sources = [Index.of(index) for index in indexes]
    if len(sources) < 2:
        raise OptionError(f"`indexes`: expected two or more, found {len(sources)}")
    check_apart(out, sources)
    first = sources[0].manifest
    for index in sources:
        comparable = dataclasses.replace(index.manifest, **{field: getattr(first, field) for field in _MERGED_FIELDS})
        different = differences(comparable, first)
        if different:
            field, found, expected = different[0]
            raise IndexMismatchError(
                f"{index.path}: {field} is {abridged(found)}, but {abridged(expected)} in {sources[0].path}; only "
                "indexes built with the same settings can be merged: add the second corpus to the first index with "
                "`add_examples`"
            )
    check_choice("duplicate_ids", duplicate_ids, DUPLICATE_IDS)
    check_disjoint(sources)
    rename = renaming(sources, duplicate_ids)
    copied = [relocated(index.manifest, index.path, as_folder(out)) for index in sources]
    manifest = merged_manifest(copied, [record_count(index) for index in sources])
    return rewrite(sources, out, manifest, rename=rename, title="Merging", progress=progress)


def merged_manifest(manifests: Sequence[Manifest], records: Sequence[int]) -> Manifest:
    """Manifest, unfinished, of several indexes' examples in one index.

    Args:
        manifests: Manifests of the indexes, which were built with the same settings, in order.
        records: Number of records read for each index; the last may be left out.
    """
    starts = itertools.accumulate(records, initial=0)
    corpora = [
        dataclasses.replace(corpus, first_record=corpus.first_record + start)
        for manifest, start in zip(manifests, starts)  # noqa: B905 - there may be a start after the last
        for corpus in manifest.corpora
    ]
    # An index that was converted from format version 3 does not know the configuration.
    configuration = next((manifest.model.configuration for manifest in manifests if manifest.model.configuration), {})
    removed = [manifest.removed for manifest in manifests if manifest.removed is not None]
    return dataclasses.replace(
        manifests[0],
        model=dataclasses.replace(manifests[0].model, configuration=configuration),
        corpora=tuple(corpora),
        removed=names_digest(removed) if removed else None,
        completion=None,
    )
