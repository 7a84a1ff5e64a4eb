"""What this process may still use of the machine: memory, the memory of a GPU, and disk; and what it uses."""

import ctypes
import dataclasses
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, final

import psutil

if TYPE_CHECKING:
    import torch

# Seconds between two looks at the memory in use.
_LOOK_EVERY = 0.004


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes that can be used in addition to those in use, and what limits them.

    Attributes:
        amount: The bytes.
        limit: What limits them, such as `this machine's free memory`.
    """

    amount: int
    limit: str


def available_memory(root: str | os.PathLike[str] = "/") -> Room:
    """Memory that this process can still get: the least of what the machine has free, what the control groups
    that it is in allow (version 1 and 2), and what is left of its limit of addresses (`ulimit -v`).

    Args:
        root: The folder that `proc` and `sys` are in.
    """
    rooms = [Room(amount=psutil.virtual_memory().available, limit="this machine's free memory")]
    rooms += _rooms_in_control_groups(Path(root))
    left = _left_of_addresses()
    if left is not None:
        rooms.append(Room(amount=left, limit="this process's limit of addresses (ulimit -v)"))
    least = min(rooms, key=lambda room: room.amount)
    return dataclasses.replace(least, amount=max(0, least.amount))


def available_device_memory(device: "torch.device") -> Room | None:
    """Memory that can still be got on a CUDA device; None for a device that shares the machine's memory."""
    if device.type != "cuda":
        return None
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Room(amount=free + unused, limit=f"the free memory of {device}")


def free_disk(path: Path) -> int | None:
    """Free bytes of the file system that holds a path, which need not exist; None if that is not known."""
    for folder in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError):
            return None
    return None


def resident_memory() -> int:
    """Bytes of memory that this process has in use."""
    return psutil.Process().memory_info().rss


def release_memory() -> None:
    """Return freed memory to the operating system. Only glibc offers this; elsewhere nothing happens.

    Otherwise a process keeps the memory of its largest stage, in pieces too small for the next stage's
    tensors.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@final
class MemoryPeak:
    """The most memory in use inside its context, on the CPU by looking every few milliseconds.

    Example:
        with MemoryPeak(model.device) as peak:
            run()
        print(peak.before, peak.most)

    Args:
        device: The device whose memory is meant; None is this process's.

    Attributes:
        before: Bytes in use at the beginning.
        most: Most bytes in use until the end.
    """

    def __init__(self, device: "torch.device | None" = None) -> None:
        self._cuda: Any = device if device is not None and device.type == "cuda" else None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self.before = self.most = 0

    def __enter__(self) -> "MemoryPeak":
        if self._cuda is not None:
            import torch

            torch.cuda.synchronize(self._cuda)
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self.before = self.most = torch.cuda.memory_allocated(self._cuda)
            return self
        self.before = self.most = resident_memory()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        if self._thread is None:
            import torch

            torch.cuda.synchronize(self._cuda)
            self.most = torch.cuda.max_memory_allocated(self._cuda)
            return
        self._ended.set()
        self._thread.join()
        self.most = max(self.most, resident_memory())

    def _look(self) -> None:
        process = psutil.Process()
        while not self._ended.wait(_LOOK_EVERY):
            self.most = max(self.most, process.memory_info().rss)


def _left_of_addresses() -> int | None:
    """Bytes of addresses that the process can still map; None without a limit."""
    try:
        import resource
    except ImportError:  # on Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit - psutil.Process().memory_info().vms


def _rooms_in_control_groups(root: Path) -> Iterator[Room]:
    """What the control groups of this process, and the groups that contain them, leave of their limits."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if controllers == "":
            mounts = (root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified")
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mounts = (root / "sys/fs/cgroup/memory",)
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = path.strip("/")
        for mount in mounts:
            # In a container the path may be that of the host, and the mount the container's own group.
            for folder in [mount / inner, *(mount / inner).parents][: len(Path(inner).parts) + 1]:
                left = _left_in_group(folder, *names)
                if left is not None:
                    yield Room(amount=left, limit=f"the memory limit of the control group /{folder.relative_to(mount)}")


def _left_in_group(folder: Path, limit_name: str, usage_name: str, reclaimable_name: str) -> int | None:
    """What a control group's limit leaves; None without a limit. The page cache counts as free."""
    limit, usage = _text(folder / limit_name), _text(folder / usage_name)
    if limit is None or usage is None or not limit.isdecimal() or not usage.isdecimal():
        return None
    statistics = dict(line.split(" ", 1) for line in (_text(folder / "memory.stat") or "").splitlines() if " " in line)
    reclaimable = statistics.get(reclaimable_name, "0")
    return int(limit) - int(usage) + (int(reclaimable) if reclaimable.isdecimal() else 0)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
