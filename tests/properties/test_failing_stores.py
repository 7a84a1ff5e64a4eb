"""On a failing file system an index never loses, duplicates or cuts off anything."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from faulty_filesystem import FaultyFileSystem, Killed, stored_bytes
from small_index import index_files, small_content, small_manifest, write_small_index
from trackstar import store
from trackstar.choices import CODECS, CodecName
from trackstar.errors import StoreError
from trackstar.store.files import remote as remote_files
from trackstar.store.files.places import as_folder

URL = "faulty://bucket/index"
FLAVOURS = pytest.mark.parametrize("whole_at_once", [True, False], ids=["object store", "renaming"])


@pytest.fixture(autouse=True)
def _at_once() -> Iterator[None]:
    """Retries without waiting, and an empty file system for each test."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(remote_files, "WAITS", (0.0, 0.0))
        FaultyFileSystem.clear()
        yield
        FaultyFileSystem.clear()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("undisturbed")
    write_small_index(path)
    return index_files(path)


def as_object_store(patched: pytest.MonkeyPatch, whole_at_once: bool) -> None:
    """Whether the file system counts as an object store."""
    kinds = remote_files.WHOLE_AT_ONCE - {"faulty"}
    patched.setattr(remote_files, "WHOLE_AT_ONCE", kinds | {"faulty"} if whole_at_once else kinds)


def operations_of_a_run() -> int:
    FaultyFileSystem.clear()
    write_small_index(URL)
    return FaultyFileSystem.faults.operations


@FLAVOURS
def test_a_run_killed_at_any_operation_and_resumed_gives_the_index_of_a_folder(
    whole_at_once: bool, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_object_store(monkeypatch, whole_at_once)
    finished_shards = set()
    for operation in range(1, operations_of_a_run() + 1):
        FaultyFileSystem.clear()
        FaultyFileSystem.reset(fatal=operation, whole_at_once=whole_at_once)
        with pytest.raises(Killed):
            write_small_index(URL)
        before = {name: content for name, content in stored_bytes(URL).items() if not name.endswith(".partial")}
        finished = [name for name in before if name.startswith("shards/")]
        finished_shards.add(len(finished))
        for name, content in before.items():  # what is there under its own name is whole
            assert name in ("manifest.json", "progress.safetensors") or content == undisturbed[name]
        FaultyFileSystem.reset()
        write_small_index(URL)
        assert stored_bytes(URL) == undisturbed, operation
        assert not any(Path(name).name in sent for name in finished for sent in FaultyFileSystem.faults.uploads)
    assert finished_shards == {0, 1, 2, 3}


@FLAVOURS
@settings(max_examples=12)
@given(failing=st.frozensets(st.integers(1, 70), max_size=40), short=st.booleans())
def test_failures_give_the_same_index_or_one_line_and_the_next_run_resumes(
    whole_at_once: bool, undisturbed: dict[str, bytes], failing: frozenset[int], short: bool
) -> None:
    FaultyFileSystem.clear()
    with pytest.MonkeyPatch.context() as patched:
        as_object_store(patched, whole_at_once)
        lines = []
        while True:
            FaultyFileSystem.reset(failing=failing, short=short, whole_at_once=whole_at_once)
            try:
                write_small_index(URL)
                break
            except StoreError as error:
                lines.append(str(error))
                failing = frozenset(one for one in failing if one % (len(lines) + 1))  # it gets better
        assert len(lines) < 20
        assert all(line.startswith("faulty://") and line.isprintable() for line in lines)
        assert all("then try again" in line for line in lines)
        FaultyFileSystem.reset()
        assert stored_bytes(URL) == undisturbed
        assert store.verify(URL).ok


@settings(max_examples=12)
@given(failing=st.frozensets(st.integers(1, 60), max_size=6), short=st.booleans(), codec=st.sampled_from(CODECS))
def test_reading_gives_what_was_written_or_one_line(failing: frozenset[int], short: bool, codec: CodecName) -> None:
    FaultyFileSystem.clear()
    write_small_index(URL, small_manifest(codec))
    expected = _everything(store.Index.open(URL))
    FaultyFileSystem.reset(failing=failing, short=short)
    line = None
    try:
        assert _everything(store.Index.open(URL)) == expected
    except StoreError as error:
        line = str(error)
    if line is not None:
        assert "cannot be read (Connection reset by peer); check that" in line
        assert len(failing) >= 3  # as many as tries


def _everything(index: store.Index) -> list[object]:
    rows = [chunk.stored.decode().tolist() for chunk in index.iterate(2)]
    some = index.some_rows([0, 2, 3, 7])
    return [
        rows,
        some.decode().tolist(),
        index.norms().tolist(),
        index.some_losses([1, 6]).tolist(),
        [(one.row, one.example.text, one.example.token_ids.tolist()) for one in index.examples()],
        [one.example.example_id for one in index.some_examples([6, 1])],
        {name: tensor.tolist() for name, tensor in index.tensors("second_moment").items()},
    ]


def test_a_writer_continues_after_a_failure_without_reopening() -> None:
    with store.IndexWriter.open(URL, small_manifest()) as writer:
        writer.write_shard(small_content(0, 3))
        FaultyFileSystem.reset(failing=frozenset(range(1, 10)))
        with pytest.raises(StoreError, match=r"000001.safetensors: cannot be written \(Connection reset by peer\)"):
            writer.write_shard(small_content(3, 6))
        FaultyFileSystem.reset()
        assert writer.resume_point.row == 3
        assert writer.write_shard(small_content(3, 6)).first_row == 3


@pytest.mark.parametrize("content", [b"", b"half of it"])
def test_an_upload_that_arrives_cut_off_is_sent_again(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that loses bytes without an error."""
    original, left = FaultyFileSystem.put_file, [2]

    def losing(self: FaultyFileSystem, source: str, target: str) -> None:
        original(self, source, target)
        if "000001" in target and left[0]:
            left[0] -= 1
            self.pipe_file(target, content)

    monkeypatch.setattr(FaultyFileSystem, "put_file", losing)
    write_small_index(URL)
    assert left == [0]
    assert store.verify(URL).ok
    left[0] = 3
    with pytest.raises(StoreError, match=r"000001.safetensors: cannot be written \(\d+ bytes have arrived, expected "):
        write_small_index("faulty://bucket/another")


def test_empty_answers_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_index(URL)
    index = store.Index.open(URL)
    monkeypatch.setattr(FaultyFileSystem, "cat_file", lambda *_, **__: b"")
    with pytest.raises(
        StoreError, match=r"000000.safetensors: cannot be read \(the answers are empty\); check that the file"
    ):
        list(index.iterate(2))
    monkeypatch.setattr(FaultyFileSystem, "cat_file", lambda *_, **__: bytes(10**6))
    with pytest.raises(StoreError, match=r"cannot be read \(1000000 bytes arrived, expected \d+\)"):
        list(index.iterate(2))


def test_missing_permission_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def refusing(self: FaultyFileSystem, source: str, target: str) -> None:
        tries.append(target)
        raise PermissionError("Forbidden")

    monkeypatch.setattr(FaultyFileSystem, "put_file", refusing)
    with pytest.raises(
        StoreError, match=r"manifest.json: cannot be written \(Forbidden\); check that the location exists"
    ):
        store.IndexWriter.open(URL, small_manifest())
    assert len(tries) == 1


def test_a_derived_cache_that_cannot_be_written_or_read_is_no_error() -> None:
    write_small_index(URL)
    index = store.Index.open(URL)
    FaultyFileSystem.reset(failing=frozenset(range(1, 20)))
    assert index.save_derived("x", {"a": torch.ones(3)}) is False
    FaultyFileSystem.reset()
    assert index.save_derived("x", {"a": torch.ones(3)}) is True
    FaultyFileSystem.reset(failing=frozenset(range(1, 20)))
    assert index.load_derived("x") is None
    FaultyFileSystem.reset()
    assert index.load_derived("x") is not None


def test_a_scan_reads_ahead_in_ranges_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a chunk is in use the next ones are requested; requests and parts do not exceed their limits."""
    monkeypatch.setattr(remote_files, "RANGE_BYTES", 600)
    monkeypatch.setattr(remote_files, "GAP_BYTES", -1)
    monkeypatch.setattr("trackstar.store.shards.PART_BYTES", 1024)
    write_small_index(URL)
    index = store.Index.open(URL)
    faults = FaultyFileSystem.reset(delay=0.002)
    chunks = index.iterate(1)
    next(chunks)
    first_part = len(faults.ranges)
    assert 0 < first_part < 20  # not all of the eight rows of 512 bytes
    list(chunks)
    assert len(faults.ranges) > first_part
    assert all(stop - first <= 600 for _, first, stop in faults.ranges)
    read = sum(stop - first for name, first, stop in faults.ranges)
    # Each part is read with the rest of its blocks: here all codes of a shard in one block, and the block
    # of scales and norms. The checksums are read once per shard.
    least = sum(shard.file.tensors["codes"].size + shard.file.tensors["checksums"].size for shard in index.shards)
    most = sum(-(-shard.file.tensors["codes"].size // 1024) * shard.file.size for shard in index.shards)
    assert least < read < most


def test_a_reader_that_stops_in_the_middle_of_a_scan_leaves_no_thread_behind() -> None:
    import threading

    write_small_index(URL)
    before = threading.active_count()
    chunks = store.Index.open(URL).iterate(1)
    next(chunks)
    chunks.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert threading.active_count() == before


def test_lists_and_sizes_are_never_cached() -> None:
    """Changes by other processes are visible."""
    write_small_index(URL)
    folder = as_folder(URL)
    assert not isinstance(folder, Path)
    assert remote_files.size_of(folder / "manifest.json") == len(stored_bytes(URL)["manifest.json"])
    del FaultyFileSystem.store["/bucket/index/manifest.json"]
    with pytest.raises(FileNotFoundError):
        remote_files.size_of(folder / "manifest.json")
    assert remote_files.names_in(folder) == ["autocorrelation.safetensors", "second_moment.safetensors", "shards"]
