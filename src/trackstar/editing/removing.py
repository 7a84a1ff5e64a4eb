"""Remove examples from an index."""

import dataclasses
from collections.abc import Iterable

from trackstar.editing.rewriting import check_apart, names_digest, opened, rewrite
from trackstar.errors import OptionError
from trackstar.store import (
    Index,
    Place,
)
from trackstar.text import abridged


def remove_examples(
    index: Index | str | Place, names: Iterable[str], out: str | Place, *, progress: bool = True
) -> Index:
    """The index without some of its examples: those of these names, and windows of documents of these names.

    Args:
        index: The index.
        names: Of examples or documents.
        out: The new index's folder.
        progress: Whether progress is shown where stderr is a terminal.

    Raises:
        OptionError: A name is not in the index, none would be left, or the new folder is the index or in it.
        TrackstarError: An index cannot be read or written; see `trackstar.errors`.
    """
    index = opened(index)
    check_apart(out, [index])
    wanted = set(names)
    there = set()
    left = 0
    for stored in index.examples():
        found = wanted & {stored.example.example_id, stored.example.parent_id}
        there |= found
        left += not found
    unknown = sorted(wanted - there)
    if unknown or not wanted:
        what = (
            f"{len(unknown)} names that are not examples of it, such as {abridged(unknown[0])}"
            if unknown
            else "no name"
        )
        raise OptionError(f"{index.path}: found {what}; expected names of its examples or documents")
    if not left:
        raise OptionError(f"{index.path}: all of its {index.rows} examples would be removed; expected some to be left")
    before = [] if index.manifest.removed is None else [index.manifest.removed]
    manifest = dataclasses.replace(index.manifest, removed=names_digest([*before, *sorted(wanted)]), completion=None)
    return rewrite(
        [index],
        out,
        manifest,
        keep=lambda example: not wanted & {example.example_id, example.parent_id},
        rows=left,
        title="Removing",
        progress=progress,
    )
