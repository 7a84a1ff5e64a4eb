"""Runs that each make a share of an index: together they make the index that one run makes, byte for byte."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import fsspec
import pytest

from shard_bytes import without_places
from small_index import index_bytes
from tiny_models import save_tiny_model
from trackstar import store
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.errors import CorpusError, IncompleteIndexError, IndexMismatchError, OptionError, StoreError
from trackstar.indexing import array_tasks as arrays
from trackstar.indexing import groups as shard_groups
from trackstar.indexing.array_tasks import Share, finish_index
from trackstar.indexing.build import build_index
from trackstar.model.language_model import LanguageModel, load_model
from trackstar.store import Index

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["trackstar.attribution.answering", "transformers.models.llama.modeling_llama"])

SETTINGS: dict[str, Any] = {
    "side": 8, "shard_examples": 8, "batch_tokens": 64, "second_moment_examples": 16,
    "window_tokens": 20, "progress": False,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "whitened": {"codec": "1-bit", "whitening_examples": 30},
    "projected": {"codec": "float16"},
}
WORDS = ["Paris", "is", "the", "capital", "of", "France", "Berlin", "Germany", "people", "speak"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of no, one and several windows; the last have nothing to score."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lengths = [generator.choice([0, 1, 3, 8, 25]) for _ in range(50)] + [5] + [0] * 6
    with path.open("w", encoding="utf-8") as file:
        for number, length in enumerate(lengths):
            file.write(json.dumps({"id": f"e{number}", "text": " ".join(generator.choices(WORDS, k=length))}) + "\n")
    return path


Build = Callable[..., Index]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> LanguageModel:
    return load_model(tiny_model_folder, layer_blocks=2)


@pytest.fixture
def build(model: LanguageModel, corpus: Path, kind: str) -> Build:
    def call(out: Path | str, **changes: Any) -> Index:
        return build_index(model, corpus, out, **{**SETTINGS, **KINDS[kind], **changes})

    return call


@pytest.fixture(scope="module")
def plain(model: LanguageModel, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The indexes of one run each."""
    folders = {kind: tmp_path_factory.mktemp("plain") / kind for kind in KINDS}
    for kind, folder in folders.items():
        index = build_index(model, corpus, folder, **SETTINGS, **KINDS[kind])
        assert len(index.shards) >= 8
        completion = index.manifest.completion
        assert completion is not None
        assert completion.skipped > 6
    return folders


def run(*arguments: object) -> int:
    return framework.run(command_group, [str(argument) for argument in arguments])


def tasks(build: Build, out: Path | str, *shares: str) -> None:
    for share in shares:
        build(out, share=share)


def slow(*values: Any) -> list[Any]:
    """Cases much like others, which `make test-all` runs."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# Any order


@pytest.mark.parametrize(
    "shares",
    [
        ("3/3", "1/3", "2/3"),
        ("2/3", "1/2", "3/3", "2/2"),
        *slow(
            *(tuple(f"{i}/3" for i in order) for order in itertools.permutations((1, 2, 3)) if order != (3, 1, 2)),
            ("1/1",),
            ("2/3", "2/3", "1/3", "3/3", "1/3"),
            ("1/2", "4/4", "2/4"),
            tuple(f"{i}/20" for i in range(20, 0, -1)),
        ),
    ],
    ids="-".join,
)
def test_tasks_in_any_order_make_the_index_of_one_run(
    build: Build, plain: dict[str, Path], kind: str, shares: tuple[str, ...], tmp_path: Path
) -> None:
    tasks(build, tmp_path, *shares)
    finish_index(tmp_path, progress=False)
    assert index_bytes(tmp_path) == index_bytes(plain[kind])
    assert store.verify(tmp_path).ok


def test_shards_of_several_groups_are_the_same(
    build: Build, plain: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_groups, "GROUP_EXAMPLES", 3)
    build(tmp_path / "plain")
    tasks(build, tmp_path / "tasks", "2/3", "3/3", "1/3")
    finish_index(tmp_path / "tasks", progress=False)
    assert index_bytes(tmp_path / "tasks") == index_bytes(tmp_path / "plain")


def test_one_run_finishes_what_tasks_began(build: Build, plain: dict[str, Path], kind: str, tmp_path: Path) -> None:
    tasks(build, tmp_path, "3/4", "2/4")
    assert build(tmp_path).manifest.completion is not None
    assert index_bytes(tmp_path) == index_bytes(plain[kind])


def test_tasks_finish_what_one_run_began(
    build: Build, plain: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = store.IndexWriter.write_shard, itertools.count()

    def interrupted(self: store.IndexWriter, content: store.ShardContent) -> store.Shard:
        if self.manifest.removed is None and next(count) == 4:
            raise KeyboardInterrupt
        return write(self, content)

    with monkeypatch.context() as patched:
        patched.setattr(store.IndexWriter, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path)
    before = {name: content for name, content in index_bytes(tmp_path).items() if name.startswith("shards/")}
    assert len(before) == 4
    tasks(build, tmp_path, "2/2", "1/2")
    finish_index(tmp_path, progress=False)
    assert index_bytes(tmp_path) == index_bytes(plain[kind])


def test_a_task_of_a_complete_index_has_nothing_to_do(build: Build, kind: str, tmp_path: Path) -> None:
    build(tmp_path)
    before = index_bytes(tmp_path)
    assert build(tmp_path, share="2/3").manifest.completion is not None
    assert index_bytes(tmp_path).keys() - before.keys() <= {store.PREPARING_LOCK}
    assert {name: content for name, content in index_bytes(tmp_path).items() if name in before} == before


def test_a_task_that_ends_after_the_index_is_complete_leaves_nothing(
    build: Build, plain: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run twice at the same time, one of two is late."""
    tasks(build, tmp_path, "1/2", "2/2")
    (tmp_path / "shards" / "000001.safetensors").unlink()
    write = store.ShardFolder.write

    def late(self: store.ShardFolder, number: int, content: store.ShardContent) -> None:
        write(self, number, content)
        finish_index(tmp_path, progress=False)

    monkeypatch.setattr(store.ShardFolder, "write", late)
    build(tmp_path, share="2/2")
    assert index_bytes(tmp_path) == index_bytes(plain[kind])


def test_a_shard_that_is_there_by_now_is_left(
    build: Build, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index may be finished with it, and another machine's bytes may be others."""
    tasks(build, tmp_path, "1/2", "2/2")
    path, aside = tmp_path / "shards" / "000001.safetensors", tmp_path.parent / f"{tmp_path.name}-aside"
    path.rename(aside)
    write, written = store.ShardFolder.write, aside.stat().st_ino

    def late(self: store.ShardFolder, number: int, content: store.ShardContent) -> None:
        if aside.exists():
            aside.rename(path)
            finish_index(tmp_path, progress=False)
        write(self, number, content)

    monkeypatch.setattr(store.ShardFolder, "write", late)
    build(tmp_path, share="2/2")
    assert path.stat().st_ino == written
    assert store.verify(tmp_path).ok


def test_a_task_waits_for_nobody_once_all_that_it_needs_is_there(build: Build, kind: str, tmp_path: Path) -> None:
    build(tmp_path, share="1/2")
    with filelock.FileLock(tmp_path / store.PREPARING_LOCK):
        build(tmp_path, share="2/2")
    assert finish_index(tmp_path, progress=False).manifest.completion is not None


def test_a_task_makes_its_own_shards_alone(build: Build, kind: str, tmp_path: Path) -> None:
    build(tmp_path, share="2/3")
    shards = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert shards[:3] == ["000001.safetensors", "000004.safetensors", "000007.safetensors"]
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    build(tmp_path, share="2/3")
    build(tmp_path, share="1/3")
    assert times == {name: (tmp_path / "shards" / name).stat().st_mtime_ns for name in shards}


# At the same time, and killed


def make_share(model: str, corpus: str, out: str, kind: str, share: str) -> None:
    """What runs, and is killed, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    arrays._CHECK_EVERY = 0.1
    build_index(model, corpus, out, share=share, layer_blocks=2, **SETTINGS, **KINDS[kind])


def started(*arguments: object) -> Any:
    process = START.Process(target=make_share, args=tuple(map(str, arguments)))
    process.start()
    return process


def ended(process: Any) -> int:
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def test_tasks_at_the_same_time_make_the_index_of_one_run(
    tiny_model_folder: Path, corpus: Path, plain: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    processes = [started(tiny_model_folder, corpus, tmp_path, kind, share) for share in ("1/3", "2/3", "3/3", "2/3")]
    assert [ended(process) for process in processes] == [0, 0, 0, 0]
    finish_index(tmp_path, progress=False)
    assert index_bytes(tmp_path) == index_bytes(plain[kind])


def test_tasks_killed_at_random_moments_make_the_index_of_one_run(
    tiny_model_folder: Path, corpus: Path, plain: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    begun = time.monotonic()
    assert ended(started(tiny_model_folder, corpus, tmp_path / "another", kind, "1/1")) == 0
    whole = time.monotonic() - begun
    generator = random.Random(time.time_ns())
    out, moments = tmp_path / "out", []
    for _ in range(5):
        processes = [started(tiny_model_folder, corpus, out, kind, share) for share in ("1/3", "2/3", "3/3")]
        for process in generator.sample(processes, 3):
            moments.append(generator.uniform(0, 0.5 * whole))
            process.join(moments[-1])
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            assert ended(process) in (0, -signal.SIGKILL)
    processes = [started(tiny_model_folder, corpus, out, kind, share) for share in ("1/3", "2/3", "3/3")]
    assert [ended(process) for process in processes] == [0, 0, 0]
    finish_index(out, progress=False)
    assert index_bytes(out) == index_bytes(plain[kind]), f"killed after {moments}, {whole} seconds are needed"


# Finishing


def test_finish_names_what_is_missing_and_keeps_what_is_there(
    build: Build, plain: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks(build, tmp_path, "1/3", "3/3")
    count = len(Index.open(plain[kind]).shards)
    before = index_bytes(tmp_path)
    named = ", ".join(map(str, range(1, count, 3)[:8])) + (", ..." if len(range(1, count, 3)) > 8 else "")
    expected = (
        f"{tmp_path}: {len(range(1, count, 3))} of {count} shards are missing ({named}); repeat the tasks that write"
    )
    with pytest.raises(IncompleteIndexError) as caught:
        finish_index(tmp_path, progress=False)
    assert str(caught.value).startswith(expected)
    capsys.readouterr()
    assert run("finish", tmp_path) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [f"trackstar: {caught.value}"]
    assert shown.out == ""
    assert index_bytes(tmp_path) == before
    tasks(build, tmp_path, "2/3")
    assert run("finish", tmp_path) == 0
    assert f"{tmp_path}: {Index.open(tmp_path).rows} examples, " in capsys.readouterr().out
    assert index_bytes(tmp_path) == index_bytes(plain[kind])


def flipped(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit of the data": lambda path: flipped(path, 0.9),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 100),
    "empty": lambda path: os.truncate(path, 0),
    "of zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": Path.unlink,
}
QUICK_DAMAGE = ("a bit of the data", "missing")
SOME_DAMAGE = [
    pytest.param(damage, id=name, marks=() if name in QUICK_DAMAGE else pytest.mark.slow)
    for name, damage in DAMAGE.items()
]


@pytest.mark.parametrize("damage", SOME_DAMAGE[:-1])  # missing ones have a test of their own
def test_finish_names_damaged_shards_and_their_task_makes_them_again(
    build: Build, plain: dict[str, Path], kind: str, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    tasks(build, tmp_path, "1/3", "2/3", "3/3")
    for number in (4, 7):
        damage(tmp_path / "shards" / f"{number:06}.safetensors")
    with pytest.raises(
        IncompleteIndexError, match=r"2 of \d+ shards are damaged \(4, 7\); repeat the tasks that write"
    ):
        finish_index(tmp_path, progress=False)
    with pytest.raises(
        IncompleteIndexError,
        match=r"2 of \d+ shards are missing \(4, 7\); repeat the tasks .*of n tasks, task s % n \+ 1",
    ):
        finish_index(tmp_path, progress=False)
    tasks(build, tmp_path, "2/3")
    finish_index(tmp_path, progress=False)
    assert index_bytes(tmp_path) == index_bytes(plain[kind])


@pytest.mark.parametrize("damage", SOME_DAMAGE)
def test_a_task_makes_its_damaged_shards_again(
    build: Build, plain: dict[str, Path], kind: str, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    tasks(build, tmp_path, "2/3", "1/3")
    for number in (3, 4):
        damage(tmp_path / "shards" / f"{number:06}.safetensors")
    tasks(build, tmp_path, "3/3", "2/3", "1/3")
    finish_index(tmp_path, progress=False)
    assert index_bytes(tmp_path) == index_bytes(plain[kind])


@pytest.mark.parametrize("name", ["second_moment", "whitening"])
@pytest.mark.parametrize("damage", SOME_DAMAGE)
def test_damage_to_what_all_tasks_need_is_mended(
    build: Build, plain: dict[str, Path], kind: str, tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    if name == "whitening" and kind == "projected":
        pytest.skip("R_train is summed at the end")
    tasks(build, tmp_path, "1/3", "2/3")
    damage(tmp_path / f"{name}.safetensors")
    tasks(build, tmp_path, "3/3")
    finish_index(tmp_path, progress=False)
    assert index_bytes(tmp_path) == index_bytes(plain[kind])


@pytest.mark.parametrize("place", [0.01, 0.3, *slow(0.03, 0.1, 0.2, 0.5)])
def test_a_damaged_header_leads_no_other_task_astray(
    build: Build, plain: dict[str, Path], kind: str, tmp_path: Path, place: float
) -> None:
    """Of other tasks' shards, headers alone are read, for where the next shard begins."""
    tasks(build, tmp_path, "1/3")
    path = tmp_path / "shards" / "000003.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(
        content[: int(place * end)] + bytes([content[int(place * end)] ^ 1]) + content[int(place * end) + 1 :]
    )
    tasks(build, tmp_path, "2/3", "3/3", "1/3")
    finish_index(tmp_path, progress=False)
    assert index_bytes(tmp_path) == index_bytes(plain[kind])


def test_finish_of_no_index_and_of_a_complete_one(
    build: Build, plain: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(StoreError, match=r"none: no index there \(no manifest.json\); run the tasks first"):
        finish_index(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert run("finish", tmp_path / "none") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    before = index_bytes(plain[kind])
    assert finish_index(plain[kind]).manifest.completion is not None
    assert run("finish", plain[kind]) == 0
    assert index_bytes(plain[kind]) == before


def test_finish_looks_at_every_byte_of_a_complete_index(
    build: Build, plain: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    tasks(build, tmp_path, "1/2", "2/2")
    finish_index(tmp_path, progress=False)
    path = tmp_path / "shards" / "000003.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        IncompleteIndexError, match=r"was complete, but 1 of \d+ shards are missing or were damaged \(3\);"
    ):
        finish_index(tmp_path, progress=False)
    tasks(build, tmp_path, "2/2")
    finish_index(tmp_path, progress=False)
    assert index_bytes(tmp_path) == index_bytes(plain[kind])


@pytest.mark.parametrize("damage", SOME_DAMAGE)
def test_finish_without_the_corpus_end(
    build: Build, plain: dict[str, Path], kind: str, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    tasks(build, tmp_path, "1/2", "2/2")
    damage(tmp_path / "corpus_end.safetensors")
    with pytest.raises(IncompleteIndexError, match="no task has reached the end of the corpus; repeat the tasks"):
        finish_index(tmp_path)
    tasks(build, tmp_path, "2/2")
    finish_index(tmp_path, progress=False)
    assert index_bytes(tmp_path) == index_bytes(plain[kind])


def test_nothing_is_left_of_the_making(build: Build, plain: dict[str, Path], kind: str, tmp_path: Path) -> None:
    tasks(build, tmp_path, "2/2", "1/2")
    (tmp_path / "shards" / "000003.safetensors.123-abc.partial").write_bytes(b"some")
    (tmp_path / "corpus_end.safetensors.123-abc.partial").write_bytes(b"some")
    assert (tmp_path / "corpus_end.safetensors").exists()
    finish_index(tmp_path, progress=False)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} - {".lock"}
    there = {path.relative_to(plain[kind]).as_posix() for path in plain[kind].rglob("*")} - {".lock"}
    assert found == there


def test_a_half_made_index_is_verified_as_far_as_it_goes(
    build: Build, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks(build, tmp_path, "2/3")
    report = store.verify(tmp_path)
    assert report.problems == ()
    assert not report.completed
    assert report.good_shards[:3] == (1, 4, 7)
    assert any("not finished" in note for note in report.notes)
    foreign = [note for note in report.notes if "does not belong to the index" in note]
    assert not foreign, "what the index is made from is its own"
    assert run("verify", tmp_path) == 0
    assert "undamaged so far, unfinished" in capsys.readouterr().out
    flipped(tmp_path / "shards" / "000004.safetensors", 0.9)
    assert run("verify", tmp_path) == 1
    assert "000004.safetensors: its content has digest" in capsys.readouterr().err


# Refused


@pytest.mark.parametrize(
    "share", ["0/3", "4/3", "x", "1/0", "0/0", "1", "1/3/5", "-1/3", "1 / 3", "1/", "/3", "1/3\n", "١/٣"]
)
def test_a_share_that_cannot_be_is_refused_in_one_line(
    share: str, tiny_model_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        OptionError, match="`share`: expected i/n with i from 1 to n, such as 3/8 for the third of eight tasks, found "
    ):
        Share.parsed(share)
    out = tmp_path / "index"
    assert run("index", "--model", tiny_model_folder, "--data", corpus, "--out", out, f"--shard={share}") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not out.exists()


def test_a_task_of_something_else_is_refused(
    build: Build, corpus: Path, kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path / "index"
    tasks(build, out, "1/3")
    before = index_bytes(out)
    another = save_tiny_model(tmp_path / "model", "llama", special_tokens="bos", seed=1)
    for changes in ({"side": 16}, {"seed": 3}, {"shard_examples": 16}, {"window_tokens": 10}, {"codec": "float32"}):
        with pytest.raises(IndexMismatchError, match=f"{out}: the existing index "):
            build(out, share="2/3", **changes)
    with pytest.raises(IndexMismatchError, match=r"the existing index has model.digest"):
        build_index(another, corpus, out, share="2/3", layer_blocks=2, **SETTINGS, **KINDS[kind])
    assert index_bytes(out) == before


def test_a_folder_of_something_else_is_refused(build: Build, kind: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"contains 'notes.txt' but no manifest.json"):
        build(tmp_path, share="1/2")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_corpus_without_anything_to_score_is_refused(model: LanguageModel, kind: str, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="has a token to score"):
        build_index(model, ["", ""], tmp_path / "plain", **SETTINGS, **KINDS[kind])
    with pytest.raises(CorpusError, match="has a token to score"):
        build_index(model, ["", ""], tmp_path / "task", share="1/2", **SETTINGS, **KINDS[kind])


# Corpora of other forms


@pytest.mark.parametrize("examples", [8, 9, *slow(1, 7, 16, 17)])
@pytest.mark.parametrize("empty", [0, 3])
def test_the_corpus_may_end_anywhere(
    model: LanguageModel, kind: str, tmp_path: Path, examples: int, empty: int
) -> None:
    texts = ["", *(f"{WORDS[n % 10]} is {WORDS[n % 7]}" for n in range(examples)), *[""] * empty]
    settings = {**SETTINGS, **KINDS[kind], "window_tokens": 32}
    build_index(model, texts, tmp_path / "plain", **settings)
    for share in ("3/3", "1/3", "2/3"):
        build_index(model, texts, tmp_path / "tasks", share=share, **settings)
    index = finish_index(tmp_path / "tasks", progress=False)
    assert index.rows == examples
    assert index_bytes(tmp_path / "tasks") == index_bytes(tmp_path / "plain")


# Elsewhere


@pytest.fixture
def url() -> Iterator[str]:
    yield "memory://array/index"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/array"):
        filesystem.rm("/array", recursive=True)


def url_bytes(url: str) -> dict[str, bytes]:
    filesystem, begin = fsspec.filesystem("memory"), url.removeprefix("memory:/") + "/"
    files = {name.removeprefix(begin): bytes(filesystem.cat_file(name)) for name in filesystem.find(begin)}
    return files | {"manifest.json": without_places(files["manifest.json"])}


def test_tasks_make_an_index_elsewhere(build: Build, plain: dict[str, Path], kind: str, url: str) -> None:
    tasks(build, url, "1/3", "3/3")
    shard = f"{url.removeprefix('memory:/')}/shards/000003.safetensors"
    filesystem = fsspec.filesystem("memory")
    content = bytes(filesystem.cat_file(shard))
    filesystem.pipe_file(shard, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IncompleteIndexError, match=r"shards are missing \(1, 4, 7"):
        finish_index(url, progress=False)
    tasks(build, url, "2/3")
    with pytest.raises(IncompleteIndexError, match=r"1 of \d+ shards are damaged \(3\)"):
        finish_index(url, progress=False)
    tasks(build, url, "1/3")
    finish_index(url, progress=False)
    assert url_bytes(url) == index_bytes(plain[kind])


def test_elsewhere_the_first_task_prepares_and_others_wait(
    build: Build, plain: dict[str, Path], kind: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def first_task(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            tasks(build, url, "1/2")

    monkeypatch.setattr(arrays.time, "sleep", first_task)
    tasks(build, url, "2/2")
    finish_index(url, progress=False)
    assert len(waits) == 3
    assert url_bytes(url) == index_bytes(plain[kind])
