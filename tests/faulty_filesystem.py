"""A file system in memory, `faulty://`, that fails on purpose: at a chosen operation, by a half answer, by a lost
connection in the middle of an upload, or for good, as when its process is killed.
"""

import dataclasses
import time
from collections import Counter
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class Killed(BaseException):
    """Stands for a signal that ends the process: nothing happens any more."""


@dataclasses.dataclass
class Faults:
    """What goes wrong, and what was done.

    Attributes:
        failing: The numbers of the operations that fail, from 1; an upload among them leaves its first half.
        fatal: The number of the operation at which everything ends, as for `failing`.
        short: Whether an answer has only half of the bytes that were asked for.
        delay: Seconds that each operation takes.
        whole_at_once: Whether a failed upload leaves nothing, as on an object store.
        operations: How many operations there were.
        ranges: Each range that was read: the file's name, its first byte and that after its last.
        uploads: How often each file was sent.
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
    """See the module."""

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
        """Faults that begin now; files stay."""
        cls.faults = Faults(**faults)
        return cls.faults

    @classmethod
    def clear(cls) -> None:
        """Nothing is there, and nothing fails."""
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
    """Every file below a URL of this file system, by its name from there on."""
    begin = FaultyFileSystem._strip_protocol(url) + "/"
    found = FaultyFileSystem.store.items()
    return {name.removeprefix(begin): file.getvalue() for name, file in sorted(found) if name.startswith(begin)}
