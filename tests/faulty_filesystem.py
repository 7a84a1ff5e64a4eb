"""A file system in memory, `faulty://`, that fails on purpose.

It fails at a chosen operation, gives half an answer, loses the connection during an upload, or ends
the process.
"""

import dataclasses
import time
from collections import Counter
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class Killed(BaseException):
    """Stands for a signal that ends the process."""


@dataclasses.dataclass
class Faults:
    """The planned failures and the record of operations.

    Attributes:
        failing: Numbers, from 1, of the operations that fail; a failed upload leaves its first half.
        fatal: Number of the operation at which the process ends; an upload leaves its first half.
        short: Whether an answer has only half of the requested bytes.
        delay: Seconds that each operation takes.
        whole_at_once: Whether a failed upload leaves nothing, as on an object store.
        operations: Number of operations so far.
        ranges: Each range that was read: the file's name, the first byte and the byte after the last.
        uploads: Number of uploads of each file.
    """

    failing: frozenset[int] = frozenset()
    fatal: int = 10**9
    short: bool = False
    delay: float = 0.0
    whole_at_once: bool = False
    operations: int = 0
    ranges: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    uploads: Counter[str] = dataclasses.field(default_factory=Counter)


class FaultyFileSystem(MemoryFileSystem):
    """The file system `faulty://`; its class attribute `faults` sets the failures."""

    protocol = "faulty"
    store: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[Faults] = Faults()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        stripped = path.removeprefix("faulty://").strip("/")
        return f"/{stripped}" if stripped else ""

    @classmethod
    def reset(cls, **faults: Any) -> Faults:
        """Set new failures; files remain."""
        cls.faults = Faults(**faults)
        return cls.faults

    @classmethod
    def clear(cls) -> None:
        """Remove all files and failures."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.reset()

    def _step(self) -> None:
        faults = self.faults
        faults.operations += 1
        if faults.delay:
            time.sleep(faults.delay)
        if faults.operations >= faults.fatal:
            raise Killed
        if faults.operations in faults.failing:
            raise ConnectionResetError(104, "Connection reset by peer")

    def info(self, path: str, **kwargs: Any) -> Any:
        self._step()
        return super().info(path, **kwargs)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._step()
        return super().ls(path, detail, **kwargs)

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._step()
        return super().find(path, *args, **kwargs)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self._step()
        stored = self.store.get(self._strip_protocol(path))
        if stored is None:
            raise FileNotFoundError(path)
        content = stored.getvalue()[start:end]
        self.faults.ranges.append((path.rpartition("/")[2], start or 0, (start or 0) + len(content)))
        return content[: -(-len(content) // 2)] if self.faults.short else content

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        path = self._strip_protocol(rpath)
        with open(lpath, "rb") as file:
            content = file.read()
        try:
            self._step()
        except BaseException as error:
            first = isinstance(error, ConnectionResetError) or self.faults.operations == self.faults.fatal
            if first and not self.faults.whole_at_once:
                self.store[path] = MemoryFile(self, path, content[: len(content) // 2])
            raise
        self.faults.uploads[path.rpartition("/")[2]] += 1
        self.store[path] = MemoryFile(self, path, content)

    def mv(self, path1: str, path2: str, *args: Any, **kwargs: Any) -> None:
        self._step()
        self.store[self._strip_protocol(path2)] = self.store.pop(self._strip_protocol(path1))

    def rm_file(self, path: str) -> None:
        self._step()
        del self.store[self._strip_protocol(path)]

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._step()
        for name in [name for name in self.store if name.startswith(f"{self._strip_protocol(path)}/")]:
            del self.store[name]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._step()
        super().makedirs(path, exist_ok)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


def stored_bytes(url: str) -> dict[str, bytes]:
    """Content of every file below a URL of this file system, by its relative name."""
    begin = FaultyFileSystem._strip_protocol(url) + "/"
    found = FaultyFileSystem.store.items()
    return {name.removeprefix(begin): file.getvalue() for name, file in sorted(found) if name.startswith(begin)}
