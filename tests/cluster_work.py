"""Work functions for the cluster tests, importable by its workers, and a check for a cluster's processes."""

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from trackstar.gradients.projector import GradientProjector, projected
from trackstar.store import Index
from trackstar.workers.protocol import Advance


@dataclasses.dataclass(frozen=True)
class Slow:
    """Returns its part after some seconds."""

    seconds: float

    def __call__(self, projector: GradientProjector, part: Any, advance: Advance) -> Any:
        time.sleep(self.seconds)
        return part


@dataclasses.dataclass(frozen=True)
class DiesOnce:
    """Kills the first worker that computes part 5."""

    mark: Path

    def __call__(self, projector: GradientProjector, part: Any, advance: Advance) -> Any:
        if part == 5 and not self.mark.exists():
            self.mark.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return part


@dataclasses.dataclass(frozen=True)
class Dies:
    """Kills every worker that computes a part."""

    def __call__(self, projector: GradientProjector, part: Any, advance: Advance) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Fails:
    """Raises an error at part 3."""

    error: type[Exception]

    def __call__(self, projector: GradientProjector, part: Any, advance: Advance) -> Any:
        if part == 3:
            raise self.error("e7: its loss is not finite")
        return part


@dataclasses.dataclass(frozen=True)
class Overflows:
    """φ of a model with overflowing weights."""

    def __call__(self, projector: GradientProjector, part: Any, advance: Advance) -> Any:
        with torch.no_grad():
            weight = next(iter(projector._model.module.parameters()))
            original = weight.clone()
            weight.fill_(3e38)
            try:
                with torch.enable_grad():
                    return projected(projector, part, advance)
            finally:
                weight.copy_(original)


def rows(index: Index) -> int:
    """Number of rows of an index or a part of one."""
    return index.rows


def is_ray(process: psutil.Process) -> bool:
    """Whether a process belongs to a Ray cluster."""
    try:
        return any(word in " ".join(process.cmdline()) for word in ("raylet", "gcs_server", "ray::"))
    except psutil.Error:
        return False
