"""Low-bit stores at the command line: build, convert, add, merge, remove and query."""

import json
from pathlib import Path

import pytest

from capitals import TEXTS
from trackstar.cli import framework
from trackstar.cli import trackstar as command_group
from trackstar.errors import StoreError
from trackstar.store import Index


def run(*arguments: object) -> int:
    return framework.run(command_group, [str(argument) for argument in arguments])


def write_corpus(path: Path, texts: list[str], first: int = 0) -> Path:
    lines = [json.dumps({"id": f"t{first + place}", "text": text}) for place, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Indexes of the first 16 texts, in 1-bit and in float16."""
    made = tmp_path_factory.mktemp("stores")
    corpus = write_corpus(made / "corpus.jsonl", TEXTS[:16])
    shared = ("index", "--model", tiny_model_folder, "--data", corpus, "--side", 8, "--layer-blocks", 2)
    assert run(*shared, "--out", made / "index", "--codec", "1-bit") == 0
    assert run(*shared, "--out", made / "wide", "--codec", "float16") == 0
    write_corpus(made / "more.jsonl", TEXTS[16:], first=16)
    return made


ASK = ("--prompt", "The capital of France is", "--completion", "Paris")


def answers(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[list[str], str]:
    """Names of the proponents, and the text on stderr."""
    capsys.readouterr()
    assert run("query", *arguments, *ASK, "--json") == 0
    said = capsys.readouterr()
    return json.loads(said.out)["proponent_ids"], said.err


def test_a_store_of_one_bit_per_dimension(folder: Path, capsys: pytest.CaptureFixture[str]):
    index = Index.open(folder / "index")
    assert index.manifest.codec == "1-bit"
    assert index.shards[0].stored.codes.shape == (16, index.dimensions // 8)
    names, said = answers(capsys, "--index", folder / "index", "--top", 5)
    assert "ranking: exact, by the recomputed gradient of every candidate" in said  # 16 candidates: all re-ranked
    exact, _ = answers(capsys, "--index", folder / "index", "--top", 5, "--exact")
    assert names == exact
    _, said = answers(capsys, "--index", folder / "index", "--top", 5, "--rerank", 0)
    assert "ranking: by the 1-bit store" in said
    _, said = answers(capsys, "--index", folder / "wide", "--top", 5)
    assert "ranking: by the float16 store" in said


def test_convert_add_merge_and_remove(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run("convert", "--index", folder / "wide", "--codec", "4-bit", "--out", tmp_path / "small") == 0
    assert f"{tmp_path / 'small'}: 16 examples, 256 dimensions, 4-bit; query it with" in capsys.readouterr().out
    grown = ("--data", folder / "more.jsonl", "--out", tmp_path / "grown")
    assert run("add", "--index", tmp_path / "small", *grown) == 0
    assert f"{tmp_path / 'grown'}: 24 examples" in capsys.readouterr().out
    assert run("add", "--index", tmp_path / "small", *grown) == 0  # nothing left to do
    (tmp_path / "names.txt").write_text("t3\nt20\n")
    thinned = ("--names", tmp_path / "names.txt", "--out", tmp_path / "thinned")
    assert run("remove", "--index", tmp_path / "grown", *thinned) == 0
    names = [one.example.example_id for one in Index.open(tmp_path / "thinned").examples()]
    assert names == [f"t{place}" for place in range(24) if place not in (3, 20)]
    rest = ("--names", tmp_path / "rest.txt", "--out", tmp_path / "rest")
    (tmp_path / "rest.txt").write_text("".join(f"{name}\n" for name in names))
    assert run("remove", "--index", tmp_path / "grown", *rest) == 0
    assert run("merge", tmp_path / "thinned", tmp_path / "rest", "--out", tmp_path / "both") == 0
    assert Index.open(tmp_path / "both").rows == 24
    for name in ("small", "grown", "thinned", "both"):
        assert run("verify", tmp_path / name) == 0
    names, _ = answers(capsys, "--index", tmp_path / "grown", "--top", 24)
    assert len(names) == 24


def test_a_corpus_is_queried_without_an_index(
    folder: Path, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    capsys.readouterr()
    out = tmp_path / "results.jsonl"
    data = ("--data", folder / "corpus.jsonl", "--model", tiny_model_folder)
    made = ("--side", 8, "--seed", 3, "--limit", 16, "--second-moment", "none")
    assert run("query", *data, *made, *ASK, "--top", 4, "--out", out) == 0
    said = capsys.readouterr().err
    assert f"corpus: {folder / 'corpus.jsonl'}, 16 candidates" in said
    assert "V: none" in said
    assert "ranking: exact, by the recomputed gradient of every candidate" in said
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["results.audit.json", "results.jsonl", "results.report.json"]
    assert run("audit", tmp_path / "results.audit.json", *data) == 0
    assert len(json.loads(out.read_text())["proponents"]) == 4
    report = json.loads((tmp_path / "results.report.json").read_text())
    assert (report["codec"], report["candidates"], report["reranked"]) == ("none", 16, 16)


def test_a_pass_is_not_lost_if_results_cannot_be_written(
    folder: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "results.jsonl"
    command = (
        "query",
        "--data",
        folder / "corpus.jsonl",
        "--model",
        tiny_model_folder,
        "--side",
        8,
        *ASK,
        "--out",
        out,
    )

    def full(*_arguments: object, **_options: object) -> None:
        raise StoreError(f"{out}: no space is left on the device")

    with monkeypatch.context() as patch:
        patch.setattr("trackstar.attribution.writing.write_results", full)
        assert run(*command) == 1
    assert (tmp_path / "results.jsonl.unfinished").exists()
    monkeypatch.setattr("trackstar.attribution.streaming.influences", None)  # nothing is scored twice
    assert run(*command) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["results.audit.json", "results.jsonl", "results.report.json"]


def test_the_report_states_the_estimated_miss_rate(folder: Path, tmp_path: Path):
    out = tmp_path / "results.jsonl"
    assert run("query", "--index", folder / "index", *ASK, "--top", 3, "--rerank", 12, "--out", out) == 0
    report = json.loads((tmp_path / "results.report.json").read_text())
    assert (report["codec"], report["reranked"]) == ("1-bit", 12)
    assert 0 <= report["queries"][0]["missed"] <= 1
