"""Pipes, sockets, devices, links and files that change are one clear line, never a hang or a wrong corpus."""

import functools
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer
from trackstar.audit.checks import file_digest, queries_of_results
from trackstar.audit.record import read_audit
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.corpus import data_files, local_files, open_corpus, read_names, read_queries
from trackstar.errors import CorpusError, TrackstarError
from trackstar.evaluation.config import read_config
from trackstar.evaluation.fact_files import read_facts
from trackstar.gradients.optimizer_state import second_moment_from_state
from trackstar.model.language_model import LanguageModel, load_model, wrap_model

GOOD = '{"id": "%s", "text": "Paris"}\n'
HANG_SECONDS = 20


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A read that waits for ever fails the test."""

    def give_up(_signal: int, _frame: object) -> None:
        raise TimeoutError("the reader hangs")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HANG_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def _pipe(path: Path) -> str:
    os.mkfifo(path)
    return "a pipe"


def _socket(path: Path) -> str:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)
    return "a socket"


def _device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "a device"


MAKERS = [_pipe, _socket, _device]


def _state(path: Path) -> object:
    return second_moment_from_state(path, _model())


@functools.cache
def _model() -> LanguageModel:
    return wrap_model(tiny_model("llama"), tiny_tokenizer())


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "corpus": ("c.jsonl", open_corpus),
    "corpus, compressed": ("c.txt.gz", open_corpus),
    "corpus, Parquet": ("c.parquet", open_corpus),
    "corpus without ending": ("c", open_corpus),
    "queries": ("q.jsonl", read_queries),
    "facts": ("f.jsonl", read_facts),
    "names": ("names.txt", read_names),
    "config": ("config.toml", read_config),
    "optimizer state": ("optimizer.pt", _state),
    "optimizer state, safetensors": ("optimizer.safetensors", _state),
    "model": ("model", load_model),
    "GGUF": ("model.gguf", load_model),
    "audit": ("r.audit.json", read_audit),
    "audited results": ("r.jsonl", queries_of_results),
    "digest of results": ("r.jsonl", file_digest),
}
FOLDERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "corpus": ("c.jsonl", open_corpus),
    "corpus, deep": ("deep/c.jsonl", open_corpus),
    "files that are not read": ("notes", open_corpus),
    "saved dataset": ("data.arrow", open_corpus),
    "queries": ("q.jsonl", read_queries),
    "optimizer state": ("optimizer.pt", _state),
    "configuration": ("config.json", load_model),
    "weights": ("model.safetensors", load_model),
    "tokenizer": ("tokenizer.json", load_model),
}


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__[1:])
@pytest.mark.parametrize("reader", READERS)
def test_special_file_is_refused_by_every_reader(reader: str, make: Callable[[Path], str], tmp_path: Path):
    name, read = READERS[reader]
    kind = make(tmp_path / name)
    with pytest.raises(TrackstarError) as caught:
        read(tmp_path / name)
    assert (
        str(caught.value) == f"{tmp_path / name}: is {kind}; expected a regular file; copy its content into one first"
    )


@pytest.mark.parametrize("reader", FOLDERS)
def test_special_file_in_a_folder_is_refused(reader: str, tmp_path: Path):
    name, read = FOLDERS[reader]
    if read is load_model:
        save_tiny_model(tmp_path)
        (tmp_path / name).unlink()
    elif reader == "saved dataset":
        for each in ("dataset_info.json", "state.json"):
            (tmp_path / each).write_text("{}")
    else:
        (tmp_path / "a.jsonl").write_text(GOOD % "a")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    _pipe(path)
    with pytest.raises(TrackstarError, match=rf"^{re.escape(str(path))}: is a pipe; expected a regular file"):
        read(tmp_path)


def test_pattern_that_matches_a_special_file_is_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(GOOD % "a")
    _pipe(tmp_path / "b.jsonl")
    for pattern in ("*.jsonl", "**/*.jsonl"):
        with pytest.raises(CorpusError, match=r"b\.jsonl: is a pipe; expected a regular file"):
            open_corpus(str(tmp_path / pattern)).survey()


def test_link_cycle_and_broken_link_are_refused_and_other_links_are_followed(tmp_path: Path):
    inside = tmp_path / "corpus" / "inside"
    inside.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.jsonl").write_text(GOOD % "b")
    (inside / "a.jsonl").write_text(GOOD % "a")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    for pattern in ("corpus", "corpus/**/*.jsonl"):
        found = [example.example_id for example in open_corpus(str(tmp_path / pattern)).examples()]
        assert found == ["a", "b"]
    (inside / "around").symlink_to(tmp_path / "corpus")
    for pattern in ("corpus", "corpus/**/*.jsonl"):
        with pytest.raises(
            CorpusError, match=r"inside/around: is a link to a folder that contains it; remove the link"
        ):
            open_corpus(str(tmp_path / pattern))
    (inside / "around").unlink()
    (inside / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"gone\.jsonl: is a link to nothing \(.*nowhere\); remove it, or restore"):
        open_corpus(str(tmp_path / "corpus"))


def test_unreadable_folder_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.jsonl").write_text(GOOD % "a")
    listdir = os.listdir

    def denied(path: str) -> list[str]:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(local_files.os, "listdir", denied)
    with pytest.raises(CorpusError, match=r"closed: the folder cannot be read \(Permission denied\); make it readable"):
        open_corpus(str(tmp_path))


def _append(path: Path) -> None:
    with path.open("a") as file:
        file.write(GOOD % "more")


def _rewrite(path: Path) -> None:
    text = path.read_text()
    path.unlink()
    path.write_text(text)


@pytest.mark.parametrize("change", [_append, _rewrite])
def test_file_that_changes_after_it_was_opened_is_refused(change: Callable[[Path], None], tmp_path: Path):
    path = tmp_path / "c.jsonl"
    path.write_text("".join(GOOD % number for number in range(9)))
    corpus = open_corpus(path)
    examples = corpus.examples()
    next(examples)
    change(path)
    for read in (lambda: list(examples), lambda: list(corpus.examples()), corpus.survey, corpus.digest, corpus.count):
        with pytest.raises(CorpusError, match=rf"^{re.escape(str(path))}: changed while it was read \("):
            read()
    open_corpus(path).survey()


def test_file_that_is_cut_while_it_is_read_is_named_as_changed_and_not_as_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data_files, "BLOCK_BYTES", 16)
    path = tmp_path / "c.jsonl"
    path.write_text("".join(GOOD % number for number in range(9)))
    examples = open_corpus(path).examples()
    next(examples)
    path.write_text(path.read_text()[:70])
    with pytest.raises(CorpusError, match="changed while it was read"):
        list(examples)


def test_file_that_vanishes_is_named(tmp_path: Path):
    path = tmp_path / "c.jsonl"
    path.write_text(GOOD % "a")
    corpus = open_corpus(path)
    path.unlink()
    with pytest.raises(CorpusError, match=rf"^{re.escape(str(path))}: no such file; check the path"):
        corpus.survey()


def test_command_line_refuses_a_pipe_as_queries(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _pipe(tmp_path / "q.jsonl")
    words = ["query", "--data", "none.jsonl", "--model", "none", "--queries", str(tmp_path / "q.jsonl")]
    assert framework.run(command_group, words) == 1
    assert capsys.readouterr().err.startswith(f"trackstar: {tmp_path / 'q.jsonl'}: is a pipe; expected a regular file")
