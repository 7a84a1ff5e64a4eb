"""Remove examples from an index."""

import dataclasses
from collections.abc import Iterable

from trackstar.editing.rewriting import check_apart, names_digest, rewrite
from trackstar.errors import OptionError
from trackstar.store import Index, Place, as_folder
from trackstar.store.locations import relocated
from trackstar.text import abridged


def remove_examples(
    index: Index | str | Place, names: Iterable[str], out: str | Place, *, progress: bool = True
) -> Index:
    """Make an index without the named examples and without the windows of the named documents.

    If the run is interrupted, the same call resumes it.

    Args:
        index: The index; it is not changed.
        names: Ids of examples or documents.
        out: Folder of the new index.
        progress: Whether progress is shown.

    Returns:
        The new index, opened.

    Raises:
        OptionError: A name is not in the index, no example would remain, or `out` is the index or
            lies in it.
        TrackstarError: An index cannot be read or written; see `trackstar.errors`.
    """
    if isinstance(names, str):
        raise OptionError(f"`names`: expected a list of ids, found a string, {abridged(names)}; pass it in a list")
    index = Index.of(index)
    check_apart(out, [index])
    unwanted = set(names)
    matched: set[str | None] = set()
    remaining = 0
    for stored in index.examples():
        matches = unwanted & {stored.example.example_id, stored.example.parent_id}
        matched |= matches
        remaining += not matches
    unknown = sorted(unwanted - matched)
    if unknown or not unwanted:
        found = f"{len(unknown)} other names, such as {abridged(unknown[0])}" if unknown else "no name"
        raise OptionError(f"`names`: expected ids of examples or documents of {index.path}, found {found}")
    if not remaining:
        raise OptionError(
            f"`names`: all {index.rows} examples of {index.path} would be removed; expected at least one to remain"
        )
    earlier = [] if index.manifest.removed is None else [index.manifest.removed]
    copied = relocated(index.manifest, index.path, as_folder(out))
    manifest = dataclasses.replace(copied, removed=names_digest([*earlier, *sorted(unwanted)]))
    return rewrite(
        [index],
        out,
        manifest,
        keep=lambda example: not unwanted & {example.example_id, example.parent_id},
        rows=remaining,
        title="Removing",
        progress=progress,
    )
