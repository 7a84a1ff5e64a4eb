"""Operations in processes of their own, which can be killed, find no room, or see a clock that jumps."""

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import random
import resource
import signal
import time
import traceback
from typing import Any, Literal

from faults import setting as settings
from trackstar.errors import TrackstarError

PROCESSES = multiprocessing.get_context("forkserver")
# The server process has everything imported but has run nothing, so that each run starts at once and clean.
PROCESSES.set_forkserver_preload(
    [
        "trackstar.attribution.answering",
        "trackstar.editing.adding",
        "trackstar.editing.rewriting",
        "trackstar.attribution.streaming",
        "transformers.models.llama.modeling_llama",
        "faults.processes",
    ]
)
_STEPS = ("open", "write", "fsync", "replace", "unlink")
_LONGEST = 120.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a process finds; nothing is wrong by default.

    Attributes:
        die_at: The step, of those that change the disk, at which it is killed; half of a write is done.
        full_from: The step from which on there is no room for anything new.
        file_bytes: The kernel's limit on a file's size.
        clock: Seed of a clock that jumps by up to two days, back and forth, at each look.
        pause: Seconds that each step takes.
    """

    die_at: int | None = None
    full_from: int | None = None
    file_bytes: int | None = None
    clock: int | None = None
    pause: float = 0.0


UNDISTURBED = Conditions()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        state: Whether it did what it should, refused in a line, was killed, or failed otherwise.
        error: Name of the error's class.
        text: Its message, or a traceback.
        value: What it gave.
        hit: Whether a fault of its conditions took place.
        steps: How many steps changed the disk.
        seconds: How long it took.
    """

    state: Literal["done", "refused", "killed", "failed"]
    error: str = ""
    text: str = ""
    value: Any = None
    hit: bool = False
    steps: int = 0
    seconds: float = 0.0


class Run:
    """An operation that has been started.

    Args:
        conditions: What its process finds.
        operation: A function of plain values.
        arguments: These values.
    """

    def __init__(self, conditions: Conditions, operation: settings.Operation, *arguments: Any) -> None:
        self._connection, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=_main, args=(theirs, conditions, operation, arguments), daemon=True)
        self.began = time.monotonic()
        self.process.start()
        theirs.close()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.is_alive()

    def kill(self) -> None:
        """End it as `kill -9` does."""
        with contextlib.suppress(ProcessLookupError):  # it ends at this very moment
            self.process.kill()

    def outcome(self, *, kill_after: float | None = None) -> Outcome:
        """How it ended; where it is given, after that many seconds it is killed."""
        said = None
        if self._connection.poll(_LONGEST if kill_after is None else kill_after):
            try:
                said = self._connection.recv()
            except EOFError:
                said = None
        elif kill_after is None:
            self.kill()
            self.process.join()
            return Outcome(state="failed", text=f"no end after {_LONGEST} s")
        if said is None:
            self.kill()
        self.process.join()
        self._connection.close()
        seconds = time.monotonic() - self.began
        if said is not None:
            return dataclasses.replace(said, seconds=seconds)
        code = self.process.exitcode
        if code == -signal.SIGKILL:
            return Outcome(state="killed", hit=True, seconds=seconds)
        return Outcome(state="failed", text=f"the process ended with {code} and said nothing", seconds=seconds)


def attempt(operation: settings.Operation, *arguments: Any) -> Outcome:
    """What an operation does in this process."""
    try:
        return Outcome(state="done", value=operation(*arguments))
    except TrackstarError as error:
        return Outcome(state="refused", error=type(error).__name__, text=str(error))
    except BaseException:
        return Outcome(state="failed", text=traceback.format_exc())


def _main(connection: Any, conditions: Conditions, operation: settings.Operation, arguments: tuple[Any, ...]) -> None:
    settings.make_small()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # notes for people
    disk = Disk(conditions)
    disk.install()
    if conditions.clock is not None:
        jumping_clock(conditions.clock)
    if conditions.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (conditions.file_bytes, conditions.file_bytes))
    outcome = attempt(operation, *arguments)
    disk.remove()
    connection.send(dataclasses.replace(outcome, hit=disk.hit or conditions.clock is not None, steps=disk.steps))
    connection.close()


class Disk:
    """Stands before the functions of `os` that change the disk, counts them, and lets them fail as told.

    Args:
        conditions: What goes wrong.
    """

    def __init__(self, conditions: Conditions) -> None:
        self._conditions = conditions
        self._real = {name: getattr(os, name) for name in _STEPS}
        self.steps = 0
        self.hit = False

    def install(self) -> None:
        """Be in their places."""
        for name in _STEPS:
            setattr(os, name, self._step(name))

    def remove(self) -> None:
        """Give them back."""
        for name, real in self._real.items():
            setattr(os, name, real)

    def _step(self, name: str) -> Any:
        real, conditions = self._real[name], self._conditions

        def step(*arguments: Any, **keywords: Any) -> Any:
            if name == "open" and not (len(arguments) > 1 and arguments[1] & os.O_CREAT):
                return real(*arguments, **keywords)
            self.steps += 1
            if conditions.pause:
                time.sleep(conditions.pause)
            if self.steps == conditions.die_at:
                if name == "write":
                    real(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            if conditions.full_from is not None and self.steps >= conditions.full_from and name in ("open", "write"):
                self.hit = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                return real(*arguments, **keywords)
            except OSError as error:
                self.hit |= error.errno in (errno.EFBIG, errno.ENOSPC)
                raise

        return step


def jumping_clock(seed: int) -> None:
    """Let this process's wall clock jump by up to two days at each look; what counts durations goes on as it is."""
    import datetime

    generator = random.Random(seed)
    real = time.time

    def jumping() -> float:
        return real() + generator.uniform(-48, 48) * 3600

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Jumping":
            return cls.fromtimestamp(jumping(), tz)

        @classmethod
        def utcnow(cls) -> "Jumping":
            return cls.fromtimestamp(jumping(), datetime.UTC).replace(tzinfo=None)

    time.time = jumping
    time.time_ns = lambda: int(jumping() * 1e9)
    datetime.datetime = Jumping  # pyright: ignore[reportAttributeAccessIssue]
