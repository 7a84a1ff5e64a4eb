"""A writer that is stopped at any moment keeps its finished shards, and can be resumed."""

import contextlib
import errno
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from small_index import (
    index_bytes,
    small_content,
    small_example,
    small_manifest,
    small_projected_gradients,
    write_small_index,
)
from trackstar import store
from trackstar.errors import IncompleteIndexError, IndexLockedError, StoreError
from trackstar.store import tensor_file, writer
from trackstar.store.files import durable as durable_files

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["trackstar.store"])
MANY_EXAMPLES = 42

# Every change of the disk is a call of one of these.
STEPS = ("open", "write", "lseek", "fsync", "replace", "unlink")


class Killed(BaseException):
    """The moment at which a process stops: nothing reaches the disk after it."""


class FailingOs:
    """The os module, until step `fatal`: then `fail` decides what happens."""

    def __init__(self, fatal: int, fail: Callable[["FailingOs", str, tuple[Any, ...]], object]) -> None:
        self.steps = 0
        self._fatal = fatal
        self._fail = fail

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        if name not in STEPS:
            return function

        def counted(*arguments: Any, **keywords: Any) -> object:
            self.steps += 1
            if self.steps >= self._fatal:
                return self._fail(self, name, arguments)
            return function(*arguments, **keywords)

        return counted


def dead(failing: FailingOs, name: str, arguments: tuple[Any, ...]) -> object:
    """The process ends here; the first half of a write still reaches the disk."""
    if name == "write" and failing.steps == failing._fatal:
        os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
    raise Killed


def full(failing: FailingOs, name: str, arguments: tuple[Any, ...]) -> object:
    """There is no space for new data, but files can be removed."""
    if name == "unlink":
        return os.unlink(*arguments)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def failing_at(
    monkeypatch: pytest.MonkeyPatch, step: int, fail: Callable[[FailingOs, str, tuple[Any, ...]], object] = dead
) -> Iterator[FailingOs]:
    failing = FailingOs(step, fail)
    with monkeypatch.context() as patched:
        for module in (durable_files, tensor_file):
            patched.setattr(module, "os", failing)
        yield failing


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory if the machine has one: thousands of fsyncs on a disk would take minutes."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("undisturbed")
    write_small_index(path)
    return index_bytes(path)


def steps_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    with failing_at(monkeypatch, 10**9) as failing:
        write_small_index(tmp_path / "counted")
    assert failing.steps > 100
    return failing.steps


def test_a_run_killed_at_any_step_and_resumed_gives_the_undisturbed_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    finished_shards = set()
    for step in range(1, steps_of_a_run(tmp_path, monkeypatch) + 1):
        path = tmp_path / str(step)
        with failing_at(monkeypatch, step), pytest.raises(Killed):
            write_small_index(path)
        before = {name: content for name, content in index_bytes(path).items() if not name.endswith(".partial")}
        finished_shards.add(sum(name.startswith("shards/") for name in before))
        for name, content in before.items():  # what is there under its own name is whole
            assert name in ("manifest.json", "progress.safetensors") or content == undisturbed[name]
        write_small_index(path)
        assert index_bytes(path) == undisturbed, step
        for name in before:
            assert name.startswith("progress") or (path / name).exists()
    assert finished_shards == {0, 1, 2, 3}


def test_finished_shards_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, steps_of_a_run(tmp_path, monkeypatch) + 1, 7):
        path = tmp_path / str(step)
        with failing_at(monkeypatch, step), pytest.raises(Killed):
            write_small_index(path)
        inodes = {file.name: file.stat().st_ino for file in path.glob("shards/*.safetensors")}
        write_small_index(path)
        assert {name: (path / "shards" / name).stat().st_ino for name in inodes} == inodes


def test_a_run_killed_many_times_still_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    moments = random.Random(0)
    kills = 0
    while True:
        with failing_at(monkeypatch, moments.randrange(10, 80)):
            try:
                write_small_index(tmp_path)
                break
            except Killed:
                kills += 1
    assert kills >= 3
    assert index_bytes(tmp_path) == undisturbed


def test_a_disk_that_is_full_at_any_step_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    steps = steps_of_a_run(tmp_path, monkeypatch)
    for step in range(1, steps - 2, 3):  # the last three need no room: they remove what only unfinished indexes have
        path = tmp_path / str(step)
        expected = r": cannot be written \(No space left on device\); free some space and try again"
        with failing_at(monkeypatch, step, full), pytest.raises(StoreError, match=expected) as caught:
            write_small_index(path)
        assert "\n" not in str(caught.value)
        assert not list(path.rglob("*.partial"))
        write_small_index(path)
        assert index_bytes(path) == undisturbed


def test_a_writer_continues_after_a_full_disk_without_reopening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.IndexWriter.open(tmp_path, small_manifest()) as opened:
        opened.write_shard(small_content(0, 3))
        with failing_at(monkeypatch, 3, full), pytest.raises(StoreError, match="free some space"):
            opened.write_shard(small_content(3, 6))
        assert opened.resume_point.row == 3
        assert opened.write_shard(small_content(3, 6)).first_row == 3


def test_a_file_reaches_the_disk_before_its_name_and_its_name_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power failure loses what was not synced: contents are synced before the rename, the folder after it."""
    events: list[tuple[str, str]] = []
    names: dict[int, str] = {}

    class RecordingOs:
        def __getattr__(self, name: str) -> Any:
            function = getattr(os, name)
            if name not in ("open", "write", "fsync", "replace"):
                return function

            def recorded(*arguments: Any) -> Any:
                result = function(*arguments)
                if name == "open":
                    names[result] = Path(arguments[0]).name
                else:
                    events.append((name, names[arguments[0]] if name != "replace" else Path(arguments[1]).name))
                return result

            return recorded

    with store.IndexWriter.open(tmp_path / "index", small_manifest()) as opened:
        for module in (durable_files, tensor_file):
            monkeypatch.setattr(module, "os", RecordingOs())
        opened.write_shard(small_content(0, 3))
    file = "000000.safetensors"
    assert set(events[:-3]) == {("write", f"{file}.partial")}
    assert events[-3:] == [("fsync", f"{file}.partial"), ("replace", file), ("fsync", "shards")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupt(*_: object) -> None:
        raise error

    with store.IndexWriter.open(tmp_path, small_manifest()) as opened:
        monkeypatch.setattr(tensor_file, "write_all", interrupt)
        with pytest.raises(error):
            opened.write_shard(small_content(0, 3))
        assert list((tmp_path / "shards").iterdir()) == []


# Real processes


def _forked_writer(path: Path) -> int:
    """The id of a copy of this process that only writes an index, until it is killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the copy does not use
        process = os.fork()
    if process == 0:
        try:
            write_small_index(path, examples=MANY_EXAMPLES)
        finally:
            os._exit(0)
    return process


def test_kill_9_at_random_moments_gives_the_undisturbed_index_byte_for_byte(tmp_path: Path) -> None:
    began = time.perf_counter()
    write_small_index(tmp_path / "undisturbed", examples=MANY_EXAMPLES)
    duration = time.perf_counter() - began
    expected = index_bytes(tmp_path / "undisturbed")
    moments = random.Random(0)
    finished_when_killed = []
    for attempt in range(15):
        path = tmp_path / str(attempt)
        for _ in range(1 + attempt % 2):  # every other index is killed twice
            process = _forked_writer(path)
            time.sleep(moments.uniform(0, duration))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            finished_when_killed.append(len(list(path.glob("shards/*.safetensors"))))
        write_small_index(path, examples=MANY_EXAMPLES)
        assert index_bytes(path) == expected
    assert len(set(finished_when_killed)) >= 5, finished_when_killed


@contextlib.contextmanager
def _running(target: Callable[..., None], path: Path, *arguments: object) -> Iterator[ForkServerProcess]:
    """A process that has begun to write at `path`."""
    started = PROCESSES.Event()
    process = PROCESSES.Process(target=target, args=(path, started, *arguments))
    process.start()
    try:
        while not started.wait(0.02):
            assert process.exitcode in (None, 0)
            if process.exitcode == 0:
                break
        yield process
    finally:
        process.kill()
        process.join()


def _write_and_wait(path: Path, started: Any) -> None:
    with store.IndexWriter.open(path, small_manifest()) as opened:
        opened.write_shard(small_content(0, 3))
        started.set()
        time.sleep(60)


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with _running(_write_and_wait, tmp_path) as process:
        before = index_bytes(tmp_path)
        began = time.perf_counter()
        with pytest.raises(IndexLockedError, match="another process is writing this index; wait for its end"):
            store.IndexWriter.open(tmp_path, small_manifest())
        assert time.perf_counter() - began < 1
        assert index_bytes(tmp_path) == before
        with pytest.raises(
            IncompleteIndexError,
            match=r"\(1 shards with 3 examples so far\); make it again with the same settings to finish it",
        ):
            store.Index.open(tmp_path)
        process.kill()
        process.join()
        write_small_index(tmp_path)
    assert store.verify(tmp_path).ok


def test_a_second_writer_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with store.IndexWriter.open(tmp_path, small_manifest()), pytest.raises(IndexLockedError):
        store.IndexWriter.open(tmp_path, small_manifest())
    store.IndexWriter.open(tmp_path, small_manifest()).close()


def test_a_writer_that_fails_to_open_leaves_the_index_unlocked(tmp_path: Path) -> None:
    write_small_index(tmp_path)
    with pytest.raises(StoreError):
        store.IndexWriter.open(tmp_path, small_manifest(seed=8))
    store.IndexWriter.open(tmp_path, small_manifest()).close()


def _write_in_turn(path: Path, started: Any, turns: Any) -> None:
    def step() -> None:
        started.set()
        turns.acquire()

    write_small_index(path, examples=MANY_EXAMPLES, after_step=step)


def test_readers_see_only_whole_shards_while_a_writer_works(tmp_path: Path) -> None:
    seen: set[int] = set()
    failures: list[BaseException] = []
    turns = PROCESSES.Semaphore(0)  # the writer takes a step for every pass of a reader

    def read(seed: int) -> None:
        places = random.Random(seed)
        completed = False
        try:
            while not completed:
                index = store.Index.open(tmp_path, allow_incomplete=True)
                completed = index.manifest.completion is not None
                seen.add(index.rows)
                for row in [places.randrange(index.rows) for _ in range(3)] if index.rows else []:
                    assert index.example(row).example.text == small_example(row).text
                    shard = index.shards[row // 3]
                    found = shard.stored.decode()[row - shard.first_row]
                    assert torch.equal(found, small_projected_gradients(range(row, row + 1))[0])
                turns.release()
        except BaseException as error:
            failures.append(error)
            for _ in range(100):
                turns.release()

    with _running(_write_in_turn, tmp_path, turns) as process:
        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for reader in readers:
            reader.start()
        process.join()
        for reader in readers:
            reader.join()
    assert failures == []
    assert MANY_EXAMPLES in seen
    assert len(seen) >= 5


def _write_with_small_files(path: Path, message: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4500, 4500))
    try:
        write_small_index(path)
    except StoreError as error:
        message.put(str(error))


def test_a_real_limit_on_file_size_is_one_line_and_the_run_can_be_resumed(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    """The kernel refuses a write in the middle of the first shard."""
    message = PROCESSES.Queue()
    process = PROCESSES.Process(target=_write_with_small_files, args=(tmp_path, message))
    process.start()
    found = message.get(timeout=30)
    process.join()
    assert found.startswith(f"{tmp_path / 'shards' / '000000.safetensors'}: cannot be written (File too large); free ")
    assert not list(tmp_path.rglob("*.partial"))
    write_small_index(tmp_path)
    assert index_bytes(tmp_path) == undisturbed


# Progress


def test_progress_is_valid_only_with_the_shards_that_it_covers(tmp_path: Path) -> None:
    with store.IndexWriter.open(tmp_path, small_manifest()) as opened:
        assert opened.load_progress() == (0, {})
        for first in (0, 3):
            opened.write_shard(small_content(first, first + 3))
            opened.save_progress({"sum": torch.tensor([float(first)])})
    with store.IndexWriter.open(tmp_path, small_manifest()) as opened:
        count, tensors = opened.load_progress()
        assert (count, tensors["sum"].item()) == (2, 3.0)
        opened.write_shard(small_content(6, 8))  # killed before progress is kept: still over the first two
        assert opened.load_progress()[0] == 2
    (tmp_path / "shards" / "000001.safetensors").unlink()
    notes: list[str] = []
    with store.IndexWriter.open(tmp_path, small_manifest(), on_note=notes.append) as opened:
        assert opened.load_progress() == (0, {})
    assert notes[-1].startswith("the sums over the finished shards were not saved")


def test_no_other_functions_write_to_the_disk() -> None:
    """The tests above are exhaustive only if the store writes nowhere else."""
    folder = Path(writer.__file__).parent
    for file in folder.rglob("*.py"):
        if file.name == "outputs.py":
            continue  # results of commands, which are no part of an index
        source = file.read_text()
        for forbidden in ("write_text(encoding", ".write_bytes(", '"wb"', '"w"', "shutil", ".rename(", ".touch("):
            assert forbidden not in source, (file.name, forbidden)
        # The last two open files for reading.
        if file.name not in ("durable.py", "tensor_file.py", "tensor_reading.py", "direct_reads.py"):
            for function in STEPS:
                assert f"os.{function}(" not in source, (file.name, function)
