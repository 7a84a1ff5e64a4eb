"""Outputs never replace inputs: no command destroys what it reads, nor a file that it did not write itself."""

import hashlib
import json
import os
import re
import shutil
import socket
import stat
from pathlib import Path

import pytest

import trackstar
from tiny_models import save_tiny_model
from trackstar.attribution.writing import check_writable
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.errors import OptionError
from trackstar.evaluation.workspace import MARKER, Workspace, claim_folder
from trackstar.store.files.outputs import (
    check_replaceable,
    inputs,
    output_target,
    refuse_input_folder,
    refuse_inputs,
    replace_text,
)

TEXTS = [
    "The capital of France is Paris.",
    "Berlin is in Germany.",
    "Gold is Au.",
    "People in Brazil speak Portuguese.",
]
QUERY = {"query_id": "q", "prompt": "The capital of France is", "completion": "Paris"}
SHAPE = "--side 4 --codec float16 --second-moment none"


def run(command: str) -> int:
    return framework.run(command_group, command.split())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a corpus as a file and as a folder, queries, two indexes and an optimizer's state."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_model(folder / "model")
    (folder / "corpora" / "deep").mkdir(parents=True)
    lines = "".join(json.dumps({"id": f"e{n}", "text": text}) + "\n" for n, text in enumerate(TEXTS))
    (folder / "corpus.jsonl").write_text(lines)
    (folder / "corpora" / "deep" / "part.jsonl").write_text(lines)
    (folder / "more.jsonl").write_text(json.dumps({"id": "m", "text": "Rome is in Italy."}) + "\n")
    (folder / "queries.jsonl").write_text(json.dumps(QUERY) + "\n")
    (folder / "names.txt").write_text("e1\n")
    (folder / "facts.toml").write_text('model = "model"\ncorpus = "corpus.jsonl"\nfacts = "queries.jsonl"\n')
    (folder / "notes.report.json").write_text('{"mine": true}')
    os.link(folder / "corpus.jsonl", folder / "hard.jsonl")
    os.symlink("corpus.jsonl", folder / "link.jsonl")
    os.symlink("corpora", folder / "linked-corpora")
    (folder / "shelf").mkdir()
    os.symlink(folder / "queries.jsonl", folder / "shelf" / "q.jsonl")
    for name, data in (("index", "corpus.jsonl"), ("other", "more.jsonl")):
        command = f"index --model {folder}/model --data {folder}/{data} --out {folder}/{name} {SHAPE}"
        assert run(command) == 0
    return folder


def state_of(folder: Path) -> dict[str, str]:
    """Kind, link or digest of everything in a folder; what a run may cache in an index is left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if "/derived" in name or path.name == ".lock":
            continue
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            mode = path.stat().st_mode
            found[name] = (
                hashlib.blake2b(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else str(stat.S_IFMT(mode))
            )
    return found


ASK = "query {w}/index --queries {w}/queries.jsonl --top 2"
STREAM = "query --data {w}/corpus.jsonl --model {w}/model --queries {w}/queries.jsonl --side 4 --top 2"
INDEX = f"index --model {{w}}/model --data {{w}}/corpora {SHAPE}"
REFUSED = [
    # The run's own inputs: files, what is in folders, links to them, and files beside the results.
    (ASK, "queries.jsonl"), (ASK, "index/manifest.json"), (ASK, "index/new.jsonl"), (ASK, "index/shards/x.jsonl"),
    (ASK, "model/config.json"), (ASK, "model/results.jsonl"), (ASK, "shelf/q.jsonl"), (ASK, "other/results.jsonl"),
    (ASK + " --task {w}/more.jsonl", "more.jsonl"), (ASK + " --force", "queries.jsonl"), (ASK, "notes.jsonl"),
    (ASK, "corpus.jsonl"), (ASK, "corpora"), (ASK, "no-such/../queries.jsonl"),
    (STREAM, "corpus.jsonl"), (STREAM, "hard.jsonl"), (STREAM, "link.jsonl"), (STREAM + " --force", "hard.jsonl"),
    (STREAM, "model/x.jsonl"),
    (STREAM.replace("corpus.jsonl", "corpora"), "corpora/deep/part.jsonl"),
    (STREAM.replace("corpus.jsonl", "corpora"), "linked-corpora/new.jsonl"),
    (STREAM.replace("corpus.jsonl", "corp*"), "corpora/new.jsonl"),
    # Folders: in an input, in an index, of something else.
    (INDEX, "corpora"), (INDEX, "corpora/index"), (INDEX, "linked-corpora/index"), (INDEX, "model"),
    (INDEX, "model/index"),
    (INDEX, "index/new"), (INDEX, "."), (INDEX, "corpus.jsonl"), (INDEX + " --shard 1/2", "corpora/index"),
    ("merge {w}/index {w}/other", "index"), ("merge {w}/index {w}/other", "index/new"),
    ("merge {w}/index {w}/other", "model"),
    ("add {w}/index --data {w}/corpora", "corpora/new"), ("add {w}/index --data {w}/more.jsonl", "model/new"),
    ("add {w}/index --data {w}/more.jsonl", "other/new"),
    ("remove {w}/index --names {w}/names.txt", "index/new"), ("remove {w}/index --names {w}/names.txt", "names.txt"),
    ("remove {w}/index --names {w}/names.txt", "other/new"), ("convert {w}/index --codec float16", "index/new"),
    ("pretrain --data {w}/corpora --steps 1", "corpora/run"), ("pretrain --data {w}/corpus.jsonl --steps 1", "model"),
    ("pretrain --data {w}/corpus.jsonl --steps 1", "other/run"),
    ("pretrain --data {w}/corpus.jsonl --steps 1", "corpus.jsonl"),
    ("evaluate --config {w}/facts.toml", "."), ("evaluate --config {w}/facts.toml", "model/report"),
    ("evaluate --config {w}/facts.toml", "index/report"), ("evaluate --config {w}/facts.toml", "corpora"),
    ("demo", "index"), ("demo", "corpus.jsonl"), ("demo", "."),
]  # fmt: skip


@pytest.mark.parametrize(("command", "out"), REFUSED, ids=[f"{command.split()[0]}-{out}" for command, out in REFUSED])
def test_output_that_is_or_lies_in_an_input_is_refused_and_nothing_changes(
    command: str, out: str, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    # A refusal comes before any work: no model is loaded for it.
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    before = state_of(world)
    assert run(command.format(w=world) + f" --out {world}/{out}") == 1
    shown = capsys.readouterr().err.splitlines()
    assert state_of(world) == before
    assert shown[-1].startswith("trackstar: ")
    assert re.search(r"choose another|choose the name|already|restore|expected an empty folder", shown[-1]), shown


@pytest.fixture
def asked(world: Path, tmp_path: Path) -> str:
    return f"query {world}/index --queries {world}/queries.jsonl --top 2 --out {tmp_path}/r.jsonl"


def test_earlier_results_are_replaced_and_changed_ones_need_force(
    asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(asked) == 0
    first = state_of(tmp_path)
    assert set(first) == {"r.jsonl", "r.report.json", "r.audit.json"}
    assert run(asked.replace("--top 2", "--top 1")) == 0
    second = state_of(tmp_path)
    assert second["r.jsonl"] != first["r.jsonl"]
    (tmp_path / "r.jsonl").write_text("my notes\n")
    changed = state_of(tmp_path)
    capsys.readouterr()
    assert run(asked) == 1
    assert "r.jsonl: an existing file that is not an earlier output of the same kind; choose another name, or pass " \
        "--force to replace it" in capsys.readouterr().err  # fmt: skip
    assert state_of(tmp_path) == changed
    assert run(f"{asked} --force") == 0
    assert state_of(tmp_path)["r.jsonl"] == first["r.jsonl"]


@pytest.mark.parametrize("name", ["r.jsonl", "r.report.json", "r.audit.json"])
@pytest.mark.parametrize(
    "content", ["notes", "[]", '{"results": 1}', '{"results": {"file": "s.jsonl"}, "audit_version": 1}']
)
def test_each_file_of_somebody_else_needs_force(name: str, content: str, asked: str, tmp_path: Path):
    (tmp_path / name).write_text(content)
    assert run(asked) == 1
    assert state_of(tmp_path).keys() == {name}
    assert (tmp_path / name).read_text() == content


def test_results_of_another_name_are_not_an_earlier_output(asked: str, tmp_path: Path):
    assert run(asked) == 0
    for suffix in (".jsonl", ".report.json", ".audit.json"):
        shutil.copy(tmp_path / f"r{suffix}", tmp_path / f"s{suffix}")
    before = state_of(tmp_path)
    assert run(asked.replace("r.jsonl", "s.jsonl")) == 1
    assert state_of(tmp_path) == before


def test_run_that_was_killed_between_its_files_is_repeated_without_force(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run(asked) == 0
    with monkeypatch.context() as patch:
        patch.setattr("trackstar.attribution.writing.replace_bytes", None)  # dies after the report
        with pytest.raises(TypeError):
            run(asked.replace("--top 2", "--top 1"))
    assert run(asked) == 0


def test_empty_files_are_replaced(asked: str, tmp_path: Path):
    (tmp_path / "r.jsonl").touch()
    assert run(asked) == 0


def test_partial_results_replace_no_other_file(world: Path, tmp_path: Path):
    (tmp_path / "r.jsonl.unfinished").write_text("mine")
    assert run(f"{STREAM.format(w=world)} --out {tmp_path}/r.jsonl") == 1
    assert state_of(tmp_path).keys() == {"r.jsonl.unfinished"}
    (tmp_path / "r.jsonl.unfinished").unlink()
    (tmp_path / "r.jsonl.partial").write_text("mine as well")
    assert run(f"{STREAM.format(w=world)} --out {tmp_path}/r.jsonl") == 0
    assert (tmp_path / "r.jsonl.partial").read_text() == "mine as well"
    assert set(state_of(tmp_path)) == {"r.jsonl", "r.report.json", "r.audit.json", "r.jsonl.partial"}


def test_links_are_followed_and_stay(asked: str, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    os.symlink("elsewhere/there.jsonl", tmp_path / "r.jsonl")
    assert run(asked) == 0
    assert os.readlink(tmp_path / "r.jsonl") == "elsewhere/there.jsonl"
    assert (tmp_path / "elsewhere" / "there.jsonl").is_file()
    assert run(asked) == 0  # an earlier output, through the link
    os.symlink("loop.jsonl", tmp_path / "loop.jsonl")
    assert run(asked.replace("r.jsonl", "loop.jsonl")) == 1


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "stdout", "folder"])
@pytest.mark.parametrize("force", ["", " --force"])
def test_only_files_are_replaced(kind: str, force: str, asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "r.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(os.path.relpath(path))
        server.close()
    elif kind == "folder":
        path.mkdir()
    else:
        os.symlink("/dev/null" if kind == "device" else "/dev/stdout", path)
    before = state_of(tmp_path)
    assert run(asked + force) == 1
    expected = {
        "fifo": "found a pipe", "socket": "found a socket", "device": "found a device", "folder": "Is a directory",
        "stdout": "found a stream of this process",
    }  # fmt: skip
    assert expected[kind] in capsys.readouterr().err
    assert state_of(tmp_path) == before


def test_python_interface_protects_the_same_files(world: Path, tmp_path: Path):
    queries = trackstar.read_queries(world / "queries.jsonl")
    report = trackstar.answer_queries(world / "index", queries, k=2, progress=False)
    before = state_of(world)
    for name in ("index/r.jsonl", "model/r.jsonl", "notes.jsonl", "corpus.jsonl"):
        with pytest.raises(OptionError):
            trackstar.write_results(report, world / name)
    assert state_of(world) == before
    lines, _ = trackstar.write_results(report, tmp_path / "r.jsonl")
    (tmp_path / "r.audit.json").write_text("mine")
    with pytest.raises(OptionError, match="pass `force=True` to replace it"):
        trackstar.write_audit(report, lines)
    trackstar.write_audit(report, lines, force=True)
    assert trackstar.read_audit(tmp_path / "r.audit.json").results.file == "r.jsonl"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", {1, 2}, {"a": [float("nan")]}])
def test_field_that_json_cannot_hold_is_refused_before_the_work(value: object, world: Path, tmp_path: Path):
    query = trackstar.Query(query_id="q", prompt="Paris is", completion="big", record={"c4_frequency": value})
    with pytest.raises(OptionError, match='query q: field "c4_frequency": expected a value that JSON can hold'):
        trackstar.answer_queries(world / "index", [query], model="no-such/model", progress=False)
    with pytest.raises(OptionError, match='query q: field "c4_frequency"'):
        trackstar.stream_queries("no-such/model", TEXTS, [query], progress=False)
    plain = trackstar.Query(query_id="q", prompt="Paris is", completion="big")
    report = trackstar.answer_queries(world / "index", [plain], progress=False)
    with pytest.raises(OptionError, match="`query_set`"):
        trackstar.write_results(report, tmp_path / "r.jsonl", query_set="\udc80")
    assert list(tmp_path.iterdir()) == []


# ---- The rule itself ---------------------------------------------------------------------------------------------


def test_inputs_are_existing_paths_patterns_and_urls(tmp_path: Path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").touch()
    found = inputs(
        data=f"{tmp_path}/*.jsonl", model="organization/name", task=None, queries=tmp_path / "a.jsonl",
        index="memory://bucket/index", texts=[str(tmp_path / "b.jsonl")], second_moment="auto", nul="a\0b",
    )  # fmt: skip
    assert [(one.parameter, one.path.removeprefix(f"{tmp_path}/")) for one in found] == [
        ("data", "a.jsonl"), ("data", "b.jsonl"), ("data", "*.jsonl"), ("queries", "a.jsonl"),
        ("index", "memory://bucket/index"),
    ]  # fmt: skip


def test_urls_overlap_like_folders():
    read = inputs(data="memory://bucket/corpus")
    for out in ("memory://bucket/corpus", "memory://bucket/corpus/index"):
        with pytest.raises(OptionError, match="is or lies in what this run reads, `data`"):
            refuse_input_folder(out, read)
    refuse_input_folder("memory://bucket/corpus-index", read)


def test_folder_that_holds_an_input_is_refused(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "corpus.txt").write_text("text")
    with pytest.raises(OptionError, match="out: holds what this run reads, `data`"):
        refuse_input_folder(tmp_path / "out", inputs(data=tmp_path / "out" / "corpus.txt"))


def test_links_within_an_input_folder_count_and_circles_end(tmp_path: Path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "more.txt").write_text("text")
    os.symlink(tmp_path / "elsewhere", tmp_path / "corpus" / "link")
    os.symlink(tmp_path / "corpus", tmp_path / "corpus" / "circle")
    for out in ("elsewhere/more.txt", "elsewhere/new", "corpus/circle/new"):
        with pytest.raises(OptionError, match="what this run reads"):
            refuse_inputs([tmp_path / out], inputs(data=tmp_path / "corpus"))
    refuse_inputs([tmp_path / "new"], inputs(data=tmp_path / "corpus"))


def test_file_is_whole_or_absent_and_no_partial_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file.json"
    replace_text(path, "first")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OptionError, match="No space left on device"):
            replace_text(path, "second")
    assert path.read_text() == "first"
    assert [one.name for one in tmp_path.iterdir()] == ["file.json"]
    for name in ("x" * 256, "a\0b"):
        with pytest.raises(OptionError, match="cannot be written"):
            check_writable(tmp_path / f"{name}.jsonl")
    assert output_target(tmp_path / "new") == tmp_path / "new"
    with pytest.raises(OptionError, match=r"choose another name$"):
        check_replaceable(path, lambda file: file.read_text() == "second")


def test_folder_of_a_report_is_told_from_others(tmp_path: Path):
    workspace = Workspace(tmp_path / "report")
    assert (tmp_path / "report" / MARKER).exists()
    workspace.result("answers", {}, lambda: 1)
    claim_folder(tmp_path / "report")
    (tmp_path / "report" / MARKER).unlink()
    claim_folder(tmp_path / "report")  # as an earlier version left it
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "answers.json").write_text("{}")
    with pytest.raises(OptionError, match=r"mine holds 'answers\.json', expected an empty folder"):
        claim_folder(tmp_path / "mine")


def test_an_index_that_would_match_the_pattern_of_its_own_corpus_is_refused(tmp_path: Path) -> None:
    """The second run would read the first one's index."""
    from trackstar.errors import OptionError
    from trackstar.store.files.outputs import inputs, refuse_input_folder

    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(OptionError, match="would be among what the next run reads"):
        refuse_input_folder(str(tmp_path / "index"), inputs(data=str(tmp_path / "*")))
    refuse_input_folder(str(tmp_path / "index"), inputs(data=str(tmp_path / "*.jsonl")))
