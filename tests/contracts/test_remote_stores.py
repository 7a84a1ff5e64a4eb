"""Indexes on an S3-compatible server equal those in a folder, byte for byte."""

import functools
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
import pytest
import s3fs
import torch
import zstandard
from upath import UPath

from capitals import TEXTS
from shard_bytes import without_places
from small_index import AUTOCORRELATION, index_bytes, small_content, small_manifest, write_small_index
from trackstar import store
from trackstar.attribution.writing import check_writable
from trackstar.choices import CodecName
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.corpus import open_corpus
from trackstar.errors import DamagedIndexError, IncompleteIndexError, IndexMismatchError, OptionError, StoreError
from trackstar.indexing.build import build_index
from trackstar.store.files import remote as remote_files
from trackstar.store.files.places import as_folder, is_url, lies_in

URL = "s3://bucket/some/index"
SHARD = f"{URL}/shards/000001.safetensors"
KEYS = {"key": "anyone", "secret": "anything"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Address of an S3-compatible server in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """The server's file system, through fsspec's configuration, with an empty bucket."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint, **KEYS})
    monkeypatch.setattr(remote_files, "WAITS", (0.0, 0.0))
    filesystem = fsspec.filesystem("s3")
    filesystem.mkdir("bucket")
    yield filesystem
    filesystem.rm("bucket", recursive=True)


def server_bytes(filesystem: s3fs.S3FileSystem, url: str = URL) -> dict[str, bytes]:
    """Content of every object below a URL, by its relative name."""
    begin = url.removeprefix("s3://") + "/"
    filesystem.invalidate_cache()
    return {name.removeprefix(begin): read(filesystem, name) for name in sorted(filesystem.find(begin))}


def read(filesystem: Any, name: str) -> bytes:
    content = filesystem.cat_file(name)
    assert isinstance(content, bytes)
    return without_places(content) if name.endswith("manifest.json") else content


# Writing


def test_an_index_on_the_server_equals_that_in_a_folder(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    write_small_index(tmp_path)
    write_small_index(URL)
    assert server_bytes(s3) == index_bytes(tmp_path)  # and no lock
    write_small_index(URL)  # nothing left to do
    with store.IndexWriter.open(UPath(URL), small_manifest()) as writer:
        assert writer.completed


def test_an_interrupted_index_resumes_after_its_last_intact_shard(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    write_small_index(tmp_path)
    with store.IndexWriter.open(URL, small_manifest()) as writer:
        writer.write_shard(small_content(0, 3))
        writer.write_shard(small_content(3, 6))
    with pytest.raises(IncompleteIndexError, match=r"\(2 shards with 6 examples so far\); make it again"):
        store.Index.open(URL)
    assert store.Index.open(URL, allow_incomplete=True).rows == 6
    content = read(s3, SHARD)
    s3.pipe_file(SHARD, content[:-1] + b"\xff")
    notes: list[str] = []
    before = s3.info(f"{URL}/shards/000000.safetensors")["LastModified"]
    write_small_index(URL, on_note=notes.append)
    assert notes[0].startswith("checking 2 shard files")
    assert notes[1].startswith(f"shard 1 is damaged and will be written again: {SHARD}: its content has digest")
    assert server_bytes(s3) == index_bytes(tmp_path)
    assert s3.info(f"{URL}/shards/000000.safetensors")["LastModified"] == before


def test_an_index_with_other_settings_and_foreign_objects_are_refused(s3: s3fs.S3FileSystem) -> None:
    write_small_index(URL)
    with pytest.raises(IndexMismatchError, match=r"existing index has `seed` 7, but 8 was requested"):
        write_small_index(URL, small_manifest(seed=8))
    s3.pipe_file("bucket/mine/notes.txt", b"mine")
    with pytest.raises(StoreError, match=r"contains 'notes.txt' but no manifest.json, expected an index or an empty"):
        write_small_index("s3://bucket/mine")
    with pytest.raises(StoreError, match=r"s3://bucket/mine/notes.txt: is a file, expected a folder"):
        write_small_index("s3://bucket/mine/notes.txt")
    assert s3.cat_file("bucket/mine/notes.txt") == b"mine"


def test_no_bucket_is_made(s3: s3fs.S3FileSystem) -> None:
    with pytest.raises(StoreError, match=r"manifest.json: cannot be written \(The specified bucket does not exist\); "):
        write_small_index("s3://another/index")
    assert s3.ls("") == ["bucket"]


def test_a_large_shard_is_sent_in_parts(s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """A multipart upload, which the server shows when it is complete, is read in ranges."""
    monkeypatch.setattr(s3, "put_file", functools.partial(s3.put_file, chunksize=5 << 20))
    path = as_folder(f"{URL}/large.safetensors")
    values = {"codes": torch.arange(3 << 20, dtype=torch.int32)}
    from trackstar.store.tensor_file import open_tensor_file, write_tensor_file
    from trackstar.store.tensor_reading import check_digest, map_tensor

    write_tensor_file(path, values, {})
    file = open_tensor_file(path)
    check_digest(file)
    assert torch.equal(map_tensor(file, "codes"), values["codes"])


# Reading


@pytest.mark.parametrize("codec", ["bfloat16", "1-bit"])
def test_reading_gives_the_same_as_a_folder(s3: s3fs.S3FileSystem, codec: CodecName, tmp_path: Path) -> None:
    for place in (tmp_path, URL):
        write_small_index(place, small_manifest(codec))
    here, there = store.Index.open(tmp_path), store.Index.open(URL)
    assert str(there.path) == URL
    for rows in (1, 2, 100):
        for mine, theirs in zip(here.iterate(rows), there.iterate(rows), strict=True):
            assert mine.first_row == theirs.first_row
            assert torch.equal(mine.stored.decode(), theirs.stored.decode())
            assert torch.equal(mine.stored.norms, theirs.stored.norms)
    assert torch.equal(here.some_rows([0, 1, 4, 7]).decode(), there.some_rows([0, 1, 4, 7]).decode())
    assert torch.equal(here.some_losses([2, 7]), there.some_losses([2, 7]))
    assert torch.equal(here.norms(), there.norms())
    for mine, theirs in zip(here.examples(), there.some_examples(range(8)), strict=True):
        assert (mine.row, mine.loss, mine.example.text) == (theirs.row, theirs.loss, theirs.example.text)
        assert mine.example.token_ids.tolist() == theirs.example.token_ids.tolist()
    assert store.verify(URL).ok
    assert store.verify(URL).checked_bytes == store.verify(tmp_path).checked_bytes


def test_an_example_takes_two_requests_of_its_own_bytes(s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_index(URL)
    index = store.Index.open(URL)
    monkeypatch.setattr(remote_files, "GAP_BYTES", -1)
    asked: list[int] = []
    original = s3.cat_ranges

    def counted(paths: list[str], starts: list[int], ends: list[int], **options: Any) -> Any:
        asked.append(sum(ends) - sum(starts))
        return original(paths, starts, ends, **options)

    monkeypatch.setattr(s3, "cat_ranges", counted)
    index.example(4)
    assert len(asked) == 2  # the checksums come with the first of them
    assert sum(asked) < 3 * 4096  # the blocks of 4 KiB that hold the example


def test_tensors_are_read_once(s3: s3fs.S3FileSystem) -> None:
    write_small_index(URL)
    index = store.Index.open(URL)
    first = index.tensors("autocorrelation")["blocks"]
    assert torch.equal(first, AUTOCORRELATION["blocks"])
    s3.rm_file(f"{URL}/autocorrelation.safetensors")
    with pytest.raises(DamagedIndexError, match=r"autocorrelation.safetensors: missing"):
        index.tensors("autocorrelation")  # the header is read each time
    write_small_index(URL)
    reads = []
    original = remote_files.fill
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(remote_files, "fill", lambda *given: (reads.append(given), original(*given)))
        assert index.tensors("autocorrelation")["blocks"] is first
    assert len(reads) == 2  # of the header


def test_derived_results_are_stored_on_the_server(s3: s3fs.S3FileSystem) -> None:
    write_small_index(URL)
    assert store.Index.open(URL).save_derived("norms", {"norms": torch.arange(3.0)}) is True
    found = store.Index.open(URL).load_derived("norms")
    assert found is not None
    assert torch.equal(found["norms"], torch.arange(3.0))
    assert store.Index.open(URL).load_derived("another") is None
    assert store.verify(URL).ok


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "missing; restore the file from a copy"),
        (b"", "0 bytes, expected at least a header"),
        (b"nothing of this kind", r"a header of \d+ bytes in a file of 20, expected one that fits into it"),
    ],
)
def test_a_changed_object_is_damage(s3: s3fs.S3FileSystem, content: bytes | None, said: str) -> None:
    write_small_index(URL)
    if content is None:
        s3.rm_file(SHARD)
    else:
        s3.pipe_file(SHARD, content)
    with pytest.raises(DamagedIndexError, match=f"^{SHARD}: {said}"):
        store.Index.open(URL)
    report = store.verify(URL)
    assert report.good_shards == (0, 2) if content is None else not report.ok
    assert any(SHARD in problem for problem in report.problems)


def test_an_object_that_changes_under_an_open_index_is_damage(s3: s3fs.S3FileSystem) -> None:
    write_small_index(URL)
    index = store.Index.open(URL)
    content = read(s3, SHARD)
    s3.pipe_file(SHARD, content[:4100])
    for reading in (lambda: list(index.iterate(2)), lambda: index.example(5), lambda: index.some_rows([0, 5])):
        with pytest.raises(DamagedIndexError, match=r"000001.safetensors: ends at byte 4100, expected \d+ bytes"):
            reading()
    with pytest.raises(DamagedIndexError, match=r"000001.safetensors: 4100 bytes, expected \d+"):
        _ = index.shards[1].stored
    s3.rm_file(SHARD)
    with pytest.raises(DamagedIndexError, match=r"000001.safetensors: missing"):
        list(index.iterate(2))
    s3.pipe_file(SHARD, content[:-1] + b"\xff")
    assert [SHARD in problem for problem in store.verify(URL).problems] == [True]


def test_foreign_objects_are_noted(s3: s3fs.S3FileSystem) -> None:
    write_small_index(URL)
    s3.pipe_file(f"{URL}/README.txt", b"what this is")
    s3.pipe_file(f"{URL}/shards/", b"")  # as some tools mark a folder
    assert store.verify(URL).notes == (f"{URL}/README.txt: does not belong to the index",)
    assert store.Index.open(URL).rows == 8


def test_no_index_and_no_server_are_one_line(s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    for open_ in (store.Index.open, store.verify):
        with pytest.raises(StoreError, match=r"^s3://bucket/none: not an index \(no manifest.json\)"):
            open_("s3://bucket/none")
    dead = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", dead | KEYS)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(StoreError, match=r"^s3://bucket/none/manifest.json: cannot be read \(Could not connect to the"):
        store.Index.open("s3://bucket/none")


# Commands


def run(*arguments: object) -> int:
    return framework.run(command_group, [str(argument) for argument in arguments])


def test_every_command_takes_urls(
    s3: s3fs.S3FileSystem, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"id": f"t{place}", "text": text}) + "\n" for place, text in enumerate(TEXTS)]
    s3.pipe_file("bucket/corpus.jsonl", "".join(lines[:16]).encode())
    s3.pipe_file("bucket/more.jsonl.gz", gzip.compress("".join(lines[16:]).encode()))
    shared = ("index", "--model", tiny_model_folder, "--side", 8, "--layer-blocks", 2, "--shard-examples", 8)
    assert run(*shared, "--data", "s3://bucket/corpus.jsonl", "--out", "s3://bucket/wide", "--codec", "float16") == 0
    assert "s3://bucket/wide: 16 examples, 256 dimensions, float16; query it with" in capsys.readouterr().out
    assert run(*shared, "--data", "s3://bucket/corpus.jsonl", "--out", tmp_path / "wide", "--codec", "float16") == 0
    assert server_bytes(s3, "s3://bucket/wide") == index_bytes(tmp_path / "wide")
    assert run("convert", "--index", "s3://bucket/wide", "--codec", "1-bit", "--out", "s3://bucket/small") == 0
    grown = ("add", "--index", "s3://bucket/small", "--data", "s3://bucket/more.jsonl.gz", "--out", "s3://bucket/grown")
    assert run(*grown) == 0
    assert run(*grown) == 0  # nothing left to do
    (tmp_path / "names.txt").write_text("t3\nt20\n")
    thinned = ("--names", tmp_path / "names.txt", "--out", "s3://bucket/thinned")
    assert run("remove", "--index", "s3://bucket/grown", *thinned) == 0
    for half, others in (("low", range(8, 16)), ("high", range(8))):
        (tmp_path / "others.txt").write_text("".join(f"t{place}\n" for place in others))
        cut = ("--names", tmp_path / "others.txt", "--out", f"s3://bucket/{half}")
        assert run("remove", "--index", "s3://bucket/small", *cut) == 0
    assert run("merge", "s3://bucket/low", "s3://bucket/high", "--out", tmp_path / "both") == 0
    assert store.Index.open(tmp_path / "both").rows == 16
    capsys.readouterr()
    assert run("verify", "s3://bucket/thinned") == 0
    assert capsys.readouterr().out.startswith("s3://bucket/thinned: undamaged, 3 shards with 22 examples")
    ask = ("--prompt", "The capital of France is", "--completion", "Paris", "--json")
    answers = []
    for index in ("s3://bucket/wide", tmp_path / "wide"):
        assert run("query", "--index", index, *ask) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    assert run("query", "--index", "s3://bucket/grown", "--rerank", 6, "--top", 4, *ask) == 0
    assert run("convert", "--index", "s3://bucket/wide", "--codec", "1-bit", "--out", "s3://bucket/wide/in") == 1
    assert "is the index itself or lies in it (s3://bucket/wide)" in capsys.readouterr().err


def test_the_default_store_is_built_and_resumed_on_the_server(
    s3: s3fs.S3FileSystem, tiny_model_folder: Path, tmp_path: Path
) -> None:
    """With a first pass, whose index lies within the new one until the new one is finished."""
    settings: dict[str, Any] = {
        "side": 8, "layer_blocks": 2, "codec": "1-bit", "shard_examples": 5, "progress": False,
    }  # fmt: skip
    settings |= {"whitening_examples": 12}
    build_index(tiny_model_folder, TEXTS, tmp_path, **settings)
    put, sent = s3.put_file, [0]

    def failing(*arguments: Any) -> None:
        sent[0] += 1
        if sent[0] >= 8:
            raise ConnectionResetError("lost")
        put(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(s3, "put_file", failing)
        with pytest.raises(StoreError, match=r"cannot be written \(lost\); .* try again"):
            build_index(tiny_model_folder, TEXTS, URL, **settings)
    assert build_index(tiny_model_folder, TEXTS, UPath(URL), **settings).rows == len(TEXTS)
    assert server_bytes(s3) == index_bytes(tmp_path)


def test_credentials_and_endpoint_come_from_the_environment(s3: s3fs.S3FileSystem, endpoint: str) -> None:
    write_small_index(URL)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FSSPEC_"))}
    environment |= {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anything", "AWS_ENDPOINT_URL": endpoint}
    command = "from trackstar.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", command, "verify", URL], env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{URL}: undamaged, 3 shards with 8 examples")


@pytest.mark.parametrize("place", ["s3://bucket/results.jsonl", "memory://results.jsonl"])
def test_only_indexes_can_be_remote(place: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"{place}: expected a file of this machine, found a URL"):
        check_writable(place)
    (tmp_path / "report.toml").write_text("")
    assert run("evaluate", "--config", tmp_path / "report.toml", "--out", place) == 1
    assert run("pretrain", "--data", tmp_path / "corpus.jsonl", "--out", place) == 1
    assert run("demo", "--out", place) == 1
    assert capsys.readouterr().err.count(f"--out: expected a folder on this machine, found {place}") == 3


# Corpora


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_corpora_are_read_from_the_server_and_from_memory(s3: s3fs.S3FileSystem, ending: str, tmp_path: Path) -> None:
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    compress = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.ZstdCompressor().compress}[ending]
    stored = compress(content)
    (tmp_path / f"corpus.{ending}").write_bytes(stored)
    here = open_corpus(str(tmp_path / f"corpus.{ending}"))
    for protocol in ("s3", "memory"):
        fsspec.filesystem(protocol).pipe_file(f"{protocol}://bucket/corpus.{ending}", stored)
        there = open_corpus(f"{protocol}://bucket/corpus.{ending}")
        assert there.digest() == here.digest()
        assert [example.text for example in there.examples()] == TEXTS
        assert there.name == f"{protocol}://bucket/corpus.{ending}"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


# Places


def test_only_a_word_and_two_slashes_are_a_url(tmp_path: Path) -> None:
    for text in ("C:x", "a:b/c", "name:/x", "://x", "notes: a//b", "S3://x", "x y://z", "/tmp/s3://x"):
        assert not is_url(text)
        assert as_folder(text) == Path(text)
    for text in ("s3://bucket/x", "memory://x", "gs://b", "abc+d1://x"):
        assert is_url(text)
    assert as_folder(f"file://{tmp_path}/x") == tmp_path / "x"
    assert type(as_folder(UPath(tmp_path))) is type(tmp_path)
    assert as_folder("memory://a/b/") == as_folder("memory://a/b")
    assert isinstance(store.Index.open(f"file://{_written(tmp_path / 'index')}").path, Path)


def _written(path: Path) -> Path:
    write_small_index(path)
    return path


def test_a_location_within_an_index_is_detected() -> None:
    assert lies_in("memory://a/b", "memory://a")
    assert lies_in("memory://a/", "memory://a")
    assert not lies_in("memory://ab", "memory://a")
    assert not lies_in("memory://a", "memory://a/b")
    assert not lies_in("a", "memory://a")
    assert not lies_in("memory://a", "a")


def test_a_memory_file_system_holds_an_index(tmp_path: Path) -> None:
    write_small_index("memory://some/index")
    write_small_index(tmp_path)
    filesystem = fsspec.filesystem("memory")
    found = {name.removeprefix("/some/index/"): read(filesystem, name) for name in filesystem.find("/some")}
    assert found == index_bytes(tmp_path)
    assert store.verify("memory://some/index").ok
    filesystem.rm("/some", recursive=True)


def test_an_invalid_location_is_one_line() -> None:
    with pytest.raises(StoreError, match=r"^none://x: not a URL of a folder \(.*\); pass a folder, or a"):
        as_folder("none://x")
    with pytest.raises(StoreError, match="a URL within a URL, expected one file system"):
        as_folder("simplecache::s3://bucket/x")
    with pytest.raises(StoreError, match=r"^ftp://host/x: the URL contains a password") as caught:
        as_folder("ftp://me:hidden@host/x")
    assert "hidden" not in str(caught.value)
    with pytest.raises(StoreError, match=r"^ftp://127.0.0.1:9/x: its file system cannot be reached \(Connection ref"):
        as_folder("ftp://127.0.0.1:9/x")
    with pytest.raises(StoreError, match=r"the package for gs:// is missing; install it, and .*gcsfs"):
        as_folder("gs://bucket/x")


def test_a_missing_package_is_named_and_a_local_folder_needs_none(tmp_path: Path) -> None:
    program = f"""
import sys
from trackstar import store
from trackstar.errors import StoreError
store.Index.open({str(_written(tmp_path))!r})
store.verify({str(tmp_path)!r})
print([module for module in ("fsspec", "upath", "s3fs") if module in sys.modules])
for package in ("upath", "s3fs"):
    sys.modules[package] = None
    try:
        store.Index.open("s3://bucket/x")
    except StoreError as error:
        print(error)
    del sys.modules[package]
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    missing = "s3://bucket/x: the package for s3:// is missing; pip install 'trackstar-tda[remote]'"
    assert result.stdout.splitlines() == ["[]", missing, missing]


def test_an_unusable_temporary_folder_is_named(s3: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote_files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(StoreError, match=r"cannot be assembled in .* \(No space left on device\); free some space"):
        write_small_index(URL)
