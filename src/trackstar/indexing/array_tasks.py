"""Many independent runs that make one index: the tasks of a Slurm array, without anybody to lead them (`--shard i/n`).

Task i of n makes shards i-1, i-1+n, ..., goes over the others, and jumps where another task's shard is there already
and says where it ends. Whoever comes first settles what is settled once (V, W_train, the manifest) while the others
wait. Each file appears whole or not at all, and has the same bytes whoever makes it; so a task may be killed, repeated,
run twice at the same time or with another n, and nothing is lost or doubled. `finish_index` sees that all shards are
there and good, sums R_train over them in their order, and completes the manifest.
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
from trackstar.indexing.shard_writing import Rows, RunningAutocorrelation, no_example, rows_by, shard_content
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

# How often a waiting task looks again, and how often it says so, in seconds.
_LOOK_AGAIN = 2.0
_SAY_AGAIN = 300.0


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """Task `number` of `count`, from 1."""

    number: int
    count: int

    @classmethod
    def parsed(cls, text: str) -> "Share":
        """From `i/n`.

        Raises:
            OptionError: It is not a number from 1 to n, a slash, and n.
        """
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        share = cls(int(found.group(1)), int(found.group(2))) if found else None
        if share is None or not 1 <= share.number <= share.count:
            raise OptionError(f"--shard {text}: expected i/n, such as 3/8 for the third of eight tasks, i from 1 to n")
        return share

    def has(self, shard: int) -> bool:
        """Whether a shard is this task's."""
        return shard % self.count == self.number - 1


def index_share(out: Place, prepared: Callable[[], IndexJob], share: Share, bar: Progress) -> None:
    """Make a task's shards of an index.

    Args:
        out: The index's folder, the same for all tasks.
        prepared: Settles what the index is; called by one task at a time.
        share: Which shards.
        bar: Told of each document of these.

    Raises:
        TrackstarError: See `trackstar.errors`.
    """
    job = _begun(out, prepared, share, bar)
    if job is None:
        bar.note(f"{out}: the index is complete")
        return
    folder = ShardFolder(out, job.manifest, on_note=bar.note)

    def there(shard: int) -> ResumePoint | None:
        # A task's own shards are read whole; those of others are their own business, and `trackstar finish`'s.
        return folder.end_of(shard, whole=share.has(shard))

    start = ResumePoint(row=0, record=0, window=0, skipped=0)
    known = job.known(lambda: _alone(out, share, bar))
    groups = ShardGroups(job.corpus, job.model, job.manifest, start, there=there, wanted=share.has, known=known)
    taken: collections.deque[Group] = collections.deque()

    def to_be_made() -> Iterator[Group]:
        for group in groups:
            if isinstance(group, Group):
                taken.append(group)
                yield group

    made = 0
    parts: list[tuple[Group, Rows]] = []
    for rows in rows_by(job.workers, job.model, job.setup, job.row_work, bar)(to_be_made()):
        group = taken.popleft()
        if parts and parts[-1][0].shard != group.shard:
            folder.write(parts[0][0].shard, shard_content(parts))
            made, parts = made + 1, []
        parts.append((group, rows))
    if parts:
        folder.write(parts[0][0].shard, shard_content(parts))
        made += 1
    if not groups.rows:
        raise no_example(job.corpus, groups.end)
    end = groups.end
    folder.write_end(CorpusEnd(shards=groups.shards, rows=groups.rows, records=end.record, skipped=end.skipped))
    finished = load_manifest(out)
    if finished is not None and finished.completion is not None:
        remove_end(out)  # the same task, run twice, was faster
    bar.note(f"--shard {share.number}/{share.count}: {made} shards made, {groups.shards} are the index's")
    bar.note(f"when all tasks are done: trackstar finish {out}")


def finish_index(out: str | Place, *, progress: bool = True) -> Index:
    """Complete an index whose shards were made by an array of tasks.

    Args:
        out: Its folder.
        progress: Whether progress is shown where stderr is a terminal.

    Raises:
        IncompleteIndexError: Shards are missing or damaged, or no task has come to the corpus's end; the message names
            them, and what is there is kept.
        TrackstarError: See `trackstar.errors`.
    """
    folder = as_folder(out)
    manifest = load_manifest(folder)
    if manifest is None:
        raise StoreError(
            f"{folder}: no index is there (no manifest.json); run the tasks first (trackstar index --shard)"
        )
    again = "run the tasks that make them again (trackstar index --shard; of n tasks, s % n + 1 makes shard s)"
    if manifest.completion is not None:
        # Whoever finished it may have been stopped before all that only unfinished indexes have was removed.
        with IndexWriter.open(folder, dataclasses.replace(manifest, completion=None), whole=True) as writer:
            if not writer.completed:
                count = len(manifest.completion.shards)
                lost = ShardFolder(folder, manifest).missing(count)  # damaged ones are removed by now
                what = _named(lost, count, "missing or were damaged") if lost else "what all shards need is not whole"
                raise IncompleteIndexError(f"{folder}: was finished, and {what}; {again}")
        return Index.open(folder)
    if not is_begun(folder):
        raise IncompleteIndexError(f"{folder}: V or W_train, which all shards need, is missing or damaged; {again}")
    shards = ShardFolder(folder, manifest)
    end = shards.read_end()
    if end is None:
        raise IncompleteIndexError(f"{folder}: no task has come to the end of the corpus; {again}")
    missing = shards.missing(end.shards)
    if missing:
        what = _named(missing, end.shards, "missing")
        there = (number for number in range(end.shards) if number not in missing)
        spoiled = [number for number in there if shards.end_of(number, whole=True) is None]
        if spoiled:
            what += f", {_named(spoiled, end.shards, 'damaged')}"
        raise IncompleteIndexError(f"{folder}: {what}; {again}")
    with (
        Progress("Finishing", unit="shards", total=end.shards, shown=progress) as bar,
        IndexWriter.open(folder, manifest) as writer,  # what is wrong is said in one line here
    ):
        done = writer.shards_done
        if len(done) != end.shards:
            damaged = [n for n in range(end.shards) if n >= len(done) and writer.end_of(n) is None]
            raise IncompleteIndexError(f"{folder}: {_named(damaged, end.shards, 'damaged')}; {again}")
        if writer.resume_point.row != end.rows:
            raise DamagedIndexError(
                f"{folder}: its shards hold {writer.resume_point.row} examples, expected {end.rows}; {again}"
            )
        if manifest.coordinates == "projected":
            mean = RunningAutocorrelation(writer).mean()
            writer.write_tensors("autocorrelation", {"autocorrelation": mean})
        if end.skipped:
            bar.note(f"{end.skipped} of {end.records} records have no token to score and were left out")
        writer.finish(records=end.records, skipped=end.skipped)
    return Index.open(folder)


def _begun(out: Place, prepared: Callable[[], IndexJob], share: Share, bar: Progress) -> IndexJob | None:
    """The index, with all that its shards depend on written; None where it is complete.

    One task computes that, alone. Whoever finds all of it looks at model and corpus at the same time as others do.
    """
    if not is_begun(out):
        with _alone(out, share, bar, until=lambda: is_begun(out)) as alone:
            if alone and not is_begun(out):  # who was alone before may have done it
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
def _alone(out: Place, share: Share, bar: Progress, *, until: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """While no other task does the same; False once `until` says that another one has done it.

    Where nothing can be locked, on other file systems, the first task goes ahead and the others wait for its manifest.
    """
    said = -math.inf

    def wait(whom: str) -> None:
        nonlocal said
        if time.monotonic() - said >= _SAY_AGAIN:
            bar.note(f"--shard {share.number}/{share.count}: waits for {whom}, which computes what all tasks need")
            said = time.monotonic()
        time.sleep(_LOOK_AGAIN)

    if not isinstance(out, Path):
        while share.number != 1 and not is_begun(out):
            wait("task 1")
        yield share.number == 1 or not until()
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{out}: cannot be made ({error.strerror}); choose a folder that can be written") from error
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


def _named(shards: list[int], of: int, what: str) -> str:
    """Some shards in words, the first few by number."""
    first = ", ".join(map(str, shards[:8])) + (", ..." if len(shards) > 8 else "")
    return f"{len(shards)} of {of} shards are {what} ({first})"
