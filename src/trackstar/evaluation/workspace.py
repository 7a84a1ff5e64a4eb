"""A report's folder: results of finished stages, each saved with a digest of what it was computed from."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trackstar.corpus.digests import digest_of_json
from trackstar.errors import OptionError
from trackstar.store.files.outputs import replace_text
from trackstar.text import abridged, system_reason

MARKER = ".trackstar-report"
"""File that marks a folder as that of a report."""

RESULTS_VERSION = 3
"""Part of every result's key. Raise it when a change of the code changes results: it voids saved ones."""


class Workspace:
    """Saved results by name, in one folder, so that an interrupted run can be resumed.

    A result is used only if its `sources`, all that it was computed from, are the same; else it is
    computed again.

    Args:
        folder: The folder; it is made if it does not exist.

    Raises:
        OptionError: The folder cannot be made, or holds something else.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        claim_folder(self.folder)

    def result(self, name: str, sources: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The saved result if its sources are the same; else `compute()`, which is then saved.

        Args:
            name: A short name of the result.
            sources: All that the result depends on, as JSON values.
            compute: Returns the result, as a JSON value.
        """
        path = self.path(name)
        key = _key(sources)
        saved = _read(path)
        if isinstance(saved, dict) and saved.get("key") == key and "result" in saved:
            return saved["result"]
        result = compute()
        replace_text(path, json.dumps({"key": key, "sources": sources, "result": result}, ensure_ascii=False) + "\n")
        return result

    def path(self, name: str) -> Path:
        """Path of a result."""
        return self.folder / f"{re.sub(r'[^a-z0-9./]+', '-', name.lower()).strip('-')}.json"

    def lines(self, name: str, sources: Mapping[str, Any]) -> "GrowingLines":
        """A result to which lines are added; a killed run loses at most the last of them."""
        return GrowingLines(self.path(name).with_suffix(".jsonl"), _key(sources))


def claim_folder(folder: Path) -> None:
    """Make a folder of a report, or check that an existing one is empty or a report's.

    Raises:
        OptionError: The folder cannot be made, or holds something else.
    """
    check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise OptionError(f"`out`: {folder} cannot be made ({system_reason(error)}); choose another folder") from None
    if not (folder / MARKER).exists():
        replace_text(folder / MARKER, "Folder of a report of trackstar: files in it are replaced by the next run.\n")


def check_folder(folder: Path) -> None:
    """Raise if a folder holds something else than a report; it need not exist.

    Raises:
        OptionError: The folder holds something else, or cannot be listed.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise OptionError(f"`out`: {folder} cannot be used ({system_reason(error)}); choose another folder") from None
    if MARKER in names:
        return
    saved = _read(folder / "answers.json")  # as of a report without a marker, which earlier versions made
    if names and not (isinstance(saved, dict) and saved.keys() == {"key", "sources", "result"}):
        raise OptionError(
            f"`out`: {folder} holds {abridged(names[0])}, expected an empty folder or an earlier report's; choose "
            "another folder"
        )


class GrowingLines:
    """A file of JSON lines that grows; its first line is the key of its sources."""

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The saved lines; none if the sources were different."""
        lines = self._complete_lines()
        if lines and lines[0] == {"key": self._key}:
            yield from lines[1:]

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Add lines. Lines of different sources and an incomplete last line are dropped."""
        content = [{"key": self._key}, *self, *lines]
        replace_text(self._path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content))

    def _complete_lines(self) -> list[Any]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return []
        lines = []
        for line in text.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines


def _read(path: Path) -> Any:
    """Content of a JSON file; None if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _key(sources: Mapping[str, Any]) -> str:
    return digest_of_json([RESULTS_VERSION, sources], sort_keys=True)
