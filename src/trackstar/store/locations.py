"""Where a model or a corpus is, as a manifest records it, so that an index can be used from any folder.

A path is recorded relative to the index if it lies in the folder that holds the index, so that this
folder can be moved as a whole; otherwise it is absolute. A folder that is missing is never taken
for a name on the hub.
"""

import contextlib
import dataclasses
import glob
import os
from pathlib import Path

from trackstar.corpus.origins import HUB
from trackstar.errors import StoreError
from trackstar.store.files.places import Place, is_url
from trackstar.store.manifest import FORMAT_VERSION, Manifest
from trackstar.store.manifest_entries import Location
from trackstar.text import without_credentials

IN_MEMORY = "in memory"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A source as a manifest records it: the text, and what it is."""

    source: str
    location: Location


def recorded_path(path: str | os.PathLike[str], index: Place | None) -> Recorded:
    """A path of this machine as an index records it.

    Args:
        path: The path, relative to the current folder or absolute; it may be a glob.
        index: The index's folder; None for an answer without an index.
    """
    absolute = Path(os.path.abspath(path))
    if isinstance(index, Path):
        folder = Path(os.path.abspath(index))
        holder = folder.parent
        if holder != holder.parent and holder in absolute.parents:
            return Recorded(source=os.path.relpath(absolute, folder), location="relative")
    return Recorded(source=str(absolute), location="absolute")


def recorded_corpus(name: str, index: Place | None, *, on_disk: bool) -> Recorded:
    """A corpus as an index records it.

    Args:
        name: Its path, glob or URL as given, or a description if it is in memory.
        index: The index's folder.
        on_disk: Whether `name` is a path of this machine.
    """
    if is_url(name):
        return Recorded(source=without_credentials(name), location="url")
    if name.startswith(HUB):
        return Recorded(source=name, location="hub")
    return recorded_path(name, index) if on_disk else Recorded(source=name, location="memory")


def opened_source(source: str, location: Location | None, index: Place) -> str:
    """The path, URL or hub name that opens a recorded source.

    Args:
        source: The recorded text.
        location: What it is; None in an index of format version 3, whose paths are relative to the
            folder that the index was built in.
        index: The index's folder.

    Raises:
        StoreError: The source was in memory.
    """
    if location == "memory":
        raise StoreError(f"{index}: records no place that can be opened, but {source}")
    if location != "relative":
        return source
    if not isinstance(index, Path):
        raise StoreError(f"{index}: records a path relative to itself, {source}, which cannot be opened from a URL")
    path = os.path.normpath(Path(os.path.abspath(index)) / source)
    if os.path.exists(path) or glob.glob(path):
        return path
    # The index may have been opened through a link, beside which nothing lies.
    return os.path.normpath(Path(os.path.realpath(index)) / source)


def recorded_model(manifest: Manifest, index: Place) -> str | None:
    """The path or hub name of an index's model; None if it was in memory, or cannot be opened."""
    try:
        return opened_source(manifest.model.source, manifest.model.location, index)
    except StoreError:
        return None


def recorded_corpora(manifest: Manifest, index: Place) -> list[str]:
    """The paths of an index's corpora, without those that cannot be opened."""
    found = []
    for corpus in manifest.corpora:
        with contextlib.suppress(StoreError):
            found.append(opened_source(corpus.source, corpus.location, index))
    return found


def relocated(manifest: Manifest, source: Place, out: Place) -> Manifest:
    """The same manifest, unfinished, for an index at another place, in the current format.

    Relative paths lead to the same files. What an index of format version 3 does not record stays
    unknown, and so does the folder that its paths are relative to.

    Args:
        manifest: The manifest.
        source: Folder of the index that it comes from.
        out: Folder of the new index.
    """
    model = manifest.model
    place = _moved(model.source, model.location, source, out)
    corpora = []
    for corpus in manifest.corpora:
        moved = _moved(corpus.source, corpus.location, source, out)
        corpora.append(dataclasses.replace(corpus, source=moved.source, location=moved.location))
    return dataclasses.replace(
        manifest,
        format_version=FORMAT_VERSION,
        model=dataclasses.replace(
            model,
            source=place.source,
            location=place.location,
            configuration=model.configuration or {},
            libraries=model.libraries or "unknown",
        ),
        corpora=tuple(corpora),
        completion=None,
    )


def _moved(recorded: str, location: Location | None, source: Place, out: Place) -> Recorded:
    if location is None:
        return _of_old_format(recorded, out)
    if location not in ("absolute", "relative"):
        return Recorded(source=recorded, location=location)
    if location == "relative" and not isinstance(source, Path):
        return Recorded(source=recorded, location="memory")  # the path led nowhere before, too
    return recorded_path(opened_source(recorded, location, source), out)


def _of_old_format(recorded: str, out: Place) -> Recorded:
    """A source of an index of format version 3, which does not say what it is."""
    if os.path.isabs(recorded):
        return recorded_path(recorded, out)
    if is_url(recorded):
        return Recorded(source=recorded, location="url")
    return Recorded(source=recorded, location="memory" if recorded == IN_MEMORY else "typed")
