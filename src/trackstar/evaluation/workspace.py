"""A report's folder: results of finished stages, each kept with what it was made from, so that a run can go on."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trackstar.attribution.results import replace_text
from trackstar.errors import OptionError

RESULTS_VERSION = 2
"""Part of every result's key: raised where a change of the code changes results, so that none of before is kept."""


class Workspace:
    """Finished results by name under one folder.

    A result counts only as long as what it was made from, its `sources`, is the same; else it is made again.

    Args:
        folder: Made where it is missing.

    Raises:
        OptionError: It cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"{folder}: cannot be made ({error.strerror}); choose another folder") from None

    def kept(self, name: str, sources: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The result of that name if it is there and of the same sources; else `make()`, which is then kept.

        Args:
            name: A short name of the result.
            sources: All that decides it, as JSON values.
            make: Gives it, as a JSON value.
        """
        path = self.path(name)
        key = _key(sources)
        found = _read(path)
        if isinstance(found, dict) and found.get("key") == key and "result" in found:
            return found["result"]
        result = make()
        replace_text(path, json.dumps({"key": key, "sources": sources, "result": result}, ensure_ascii=False) + "\n")
        return result

    def path(self, name: str) -> Path:
        """Where a result lies."""
        return self.folder / f"{re.sub(r'[^a-z0-9./]+', '-', name.lower()).strip('-')}.json"

    def lines(self, name: str, sources: Mapping[str, Any]) -> "GrowingLines":
        """A result that grows line by line and survives a kill but for its last line."""
        return GrowingLines(self.path(name).with_suffix(".jsonl"), _key(sources))


class GrowingLines:
    """JSON lines that are added to; the first names what they were made from."""

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The lines that are there; none where they were made from something else."""
        whole = self._whole_lines()
        if whole and whole[0] == {"key": self._key}:
            yield from whole[1:]

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Add lines; what was made from something else, or was cut off, is dropped first."""
        content = [{"key": self._key}, *self, *lines]
        replace_text(self._path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content))

    def _whole_lines(self) -> list[Any]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return []
        found = []
        for line in text.splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _key(sources: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps([RESULTS_VERSION, sources], sort_keys=True).encode(), digest_size=16).hexdigest()
