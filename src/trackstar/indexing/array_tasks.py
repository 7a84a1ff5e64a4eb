"""Independent tasks that build one index together, such as the tasks of a Slurm array, without a
leading process.

Task i of n writes shards i-1, i-1+n, ... It passes over the other shards, and skips the corpus's
text where another task's shard is already written and holds the position at which the next one
begins. The first task to arrive computes what is computed once (V, W_train, the manifest), while
the others wait. Each file appears whole or not at all, and has the same bytes whichever task writes
it. So a task may be killed, repeated, run twice at the same time or with another n, and no example
is lost or indexed twice. `finish_index` checks that all shards are present and undamaged, sums
R_train over them in order, and completes the manifest.
"""

import collections
import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from trackstar.errors import DamagedIndexError, IncompleteIndexError, OptionError, StoreError
from trackstar.indexing.groups import Group, ShardGroups
from trackstar.indexing.job import IndexJob
from trackstar.indexing.shard_writing import Rows, RunningAutocorrelation, no_example_error, rows_by, shard_content
from trackstar.progress import Progress
from trackstar.store import (
    PREPARING_LOCK,
    CorpusEnd,
    Index,
    IndexWriter,
    Place,
    ResumePoint,
    ShardFolder,
    as_folder,
    is_begun,
    load_manifest,
    remove_end,
)
from trackstar.workers.stored_losses import check_sample

# Seconds between a waiting task's checks, and between its notes.
_CHECK_EVERY = 2.0
_NOTE_EVERY = 300.0


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """Task `number` of `count`, numbered from 1."""

    number: int
    count: int

    @classmethod
    def parsed(cls, text: str) -> "Share":
        """Parse `i/n`.

        Raises:
            OptionError: The text is not a number from 1 to n, a slash, and n.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        share = cls(int(match.group(1)), int(match.group(2))) if match else None
        if share is None or not 1 <= share.number <= share.count:
            raise OptionError(
                f"`share`: expected i/n with i from 1 to n, such as 3/8 for the third of eight tasks, found {text}"
            )
        return share

    def has(self, shard: int) -> bool:
        """Whether a shard belongs to this task."""
        return shard % self.count == self.number - 1


def index_share(out: Place, prepared: Callable[[], IndexJob], share: Share, bar: Progress) -> None:
    """Write a task's shards of an index.

    Args:
        out: Folder of the index, the same for all tasks.
        prepared: Prepares the index job; one task at a time calls it.
        share: The task.
        bar: Shows progress per document of its shards.

    Raises:
        TrackstarError: See `trackstar.errors`.
    """
    job = _begun(out, prepared, share, bar)
    if job is None:
        bar.note(f"{out}: the index is complete")
        return
    written = Index.open(out, allow_incomplete=True)
    if written.rows:
        check_sample(written, job.model, skip_damaged=True)
    folder = ShardFolder(out, written.manifest, on_note=bar.note)

    def finished(shard: int) -> ResumePoint | None:
        # A task checks every byte of its own shards only; `finish_index` checks all shards.
        return folder.end_of(shard, whole=share.has(shard))

    start = ResumePoint(row=0, record=0, window=0, skipped=0)
    sampled = job.sampled(lambda: _exclusive(out, share, bar))
    groups = ShardGroups(
        job.corpus, job.model, job.manifest, start, finished=finished, wanted=share.has, sampled=sampled
    )
    taken: collections.deque[Group] = collections.deque()

    def missing_groups() -> Iterator[Group]:
        for group in groups:
            if isinstance(group, Group):
                taken.append(group)
                yield group

    made = 0
    parts: list[tuple[Group, Rows]] = []
    with bar:
        for rows in rows_by(job.workers, job.model, job.setup, job.row_work, bar)(missing_groups()):
            group = taken.popleft()
            if parts and parts[-1][0].shard != group.shard:
                folder.write(parts[0][0].shard, shard_content(parts))
                made, parts = made + 1, []
            parts.append((group, rows))
    if parts:
        folder.write(parts[0][0].shard, shard_content(parts))
        made += 1
    if not groups.rows:
        raise no_example_error(job.corpus, groups.end)
    end = groups.end
    folder.write_end(CorpusEnd(shards=groups.shards, rows=groups.rows, records=end.record, skipped=end.skipped))
    manifest = load_manifest(out)
    if manifest is not None and manifest.completion is not None:
        remove_end(out)  # a second run of the same task was faster, and the index is complete
    bar.note(f"task {share.number}/{share.count}: wrote {made} of the index's {groups.shards} shards")
    bar.note(f"when all tasks have finished, complete the index: `finish_index` {out}")


def finish_index(out: str | Place, *, progress: bool = True) -> Index:
    """Complete an index whose shards were written by array tasks.

    Args:
        out: Folder of the index.
        progress: Whether progress is shown.

    Raises:
        IncompleteIndexError: Shards are missing or damaged, or no task has reached the end of the
            corpus. The message names the shards; all others are kept.
        TrackstarError: See `trackstar.errors`.
    """
    folder = as_folder(out)
    manifest = load_manifest(folder)
    if manifest is None:
        raise StoreError(
            f"{folder}: no index there (no manifest.json); run the tasks first, each `build_index` with its `share`"
        )
    advice = "repeat the tasks that write them (of n tasks, task s % n + 1 writes shard s)"
    if manifest.completion is not None:
        # The run that completed it may have been stopped before it removed the files of unfinished
        # indexes.
        with IndexWriter.open(folder, dataclasses.replace(manifest, completion=None), whole=True) as writer:
            if not writer.completed:
                count = len(manifest.completion.shards)
                missing = ShardFolder(folder, manifest).missing(count)  # damaged ones were removed by the writer
                fault = "V, W_train or R_train is damaged"
                if missing:
                    fault = _named(missing, count, "missing or were damaged")
                raise IncompleteIndexError(f"{folder}: was complete, but {fault}; {advice}")
        return Index.open(folder)
    if not is_begun(folder):
        raise IncompleteIndexError(f"{folder}: V or W_train, which all shards need, is missing or damaged; {advice}")
    shards = ShardFolder(folder, manifest)
    end = shards.read_end()
    if end is None:
        raise IncompleteIndexError(f"{folder}: no task has reached the end of the corpus; {advice}")
    missing = shards.missing(end.shards)
    if missing:
        fault = _named(missing, end.shards, "missing")
        present = (number for number in range(end.shards) if number not in missing)
        damaged = [number for number in present if shards.end_of(number, whole=True) is None]
        if damaged:
            fault += f", {_named(damaged, end.shards, 'damaged')}"
        raise IncompleteIndexError(f"{folder}: {fault}; {advice}")
    with (
        Progress("Finishing", unit="shards", total=end.shards, shown=progress) as bar,
        IndexWriter.open(folder, manifest) as writer,  # damaged shards are named in one line here
    ):
        done = writer.shards_done
        if len(done) != end.shards:
            damaged = [n for n in range(end.shards) if n >= len(done) and writer.end_of(n) is None]
            raise IncompleteIndexError(f"{folder}: {_named(damaged, end.shards, 'damaged')}; {advice}")
        if writer.resume_point.row != end.rows:
            raise DamagedIndexError(
                f"{folder}: its shards hold {writer.resume_point.row} examples, expected {end.rows}; {advice}"
            )
        if manifest.coordinates == "projected":
            RunningAutocorrelation(writer).write()
        if end.skipped:
            bar.note(f"{end.skipped} of {end.records} records have no token to score and were left out")
        writer.finish(records=end.records, skipped=end.skipped)
    return Index.open(folder)


def _begun(out: Place, prepared: Callable[[], IndexJob], share: Share, bar: Progress) -> IndexJob | None:
    """The index job, with everything written that its shards depend on; None if the index is
    complete.

    One task computes what the shards depend on. Tasks that find it written read model and corpus in
    parallel.
    """
    if not is_begun(out):
        with _exclusive(out, share, bar, until=lambda: is_begun(out)) as exclusive:
            if exclusive and not is_begun(out):  # the task that held the lock before may have written it
                job = prepared()
                if _complete(out):
                    return None
                with IndexWriter.open(out, job.manifest, on_note=bar.note) as writer:
                    job.begin(writer, bar)
                return job
    job = prepared()
    return None if _complete(out) else job


def _complete(out: Place) -> bool:
    begun = load_manifest(out)
    return begun is not None and begun.completion is not None


@contextlib.contextmanager
def _exclusive(out: Place, share: Share, bar: Progress, *, until: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Hold the lock that one task at a time can hold; gives False if `until` becomes true while
    waiting for it.

    Remote file systems have no locks: there task 1 goes ahead, and the others wait for its
    manifest.
    """
    noted = -math.inf

    def wait(holder: str) -> None:
        nonlocal noted
        if time.monotonic() - noted >= _NOTE_EVERY:
            bar.note(f"task {share.number}/{share.count}: waits for {holder}, which computes what all tasks need")
            noted = time.monotonic()
        time.sleep(_CHECK_EVERY)

    if not isinstance(out, Path):
        while share.number != 1 and not is_begun(out):
            wait("task 1")
        yield share.number == 1 or not until()
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{out}: cannot be created ({error.strerror}); choose a writable folder") from error
    lock = filelock.FileLock(out / PREPARING_LOCK, timeout=0, thread_local=False)
    while True:
        try:
            lock.acquire()
            break
        except filelock.Timeout:
            if until():
                yield False
                return
            wait("another task")
        except (OSError, NotImplementedError) as error:
            raise StoreError(f"{out}: cannot be locked ({error}); make the folder writable") from error
    try:
        yield True
    finally:
        lock.release()


def _named(shards: list[int], of: int, fault: str) -> str:
    """Shards in words, the first eight by number."""
    first = ", ".join(map(str, shards[:8])) + (", ..." if len(shards) > 8 else "")
    return f"{len(shards)} of {of} shards are {fault} ({first})"
