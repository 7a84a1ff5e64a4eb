"""Without an index: the same ranking as with one, from one pass, and what was found survives an interruption."""

import json
from pathlib import Path

import pytest
import torch

from capitals import QUERIES, TEXTS
from trackstar.attribution import streaming
from trackstar.attribution.answering import answer_queries
from trackstar.attribution.streaming import PARTIAL_FIELDS, stream_queries
from trackstar.errors import CorpusError, OptionError
from trackstar.indexing.build import build_index

SETTINGS = {"side": 4, "second_moment_examples": 64, "progress": False}


def test_it_ranks_as_an_index_does(tiny_model_folder: Path, tmp_path: Path):
    index = build_index(str(tiny_model_folder), TEXTS, tmp_path / "index", codec="float32", **SETTINGS)  # pyright: ignore[reportArgumentType]
    for task in (None, QUERIES[:9]):
        report = answer_queries(index, QUERIES, k=6, task=task, progress=False)
        found = stream_queries(str(tiny_model_folder), TEXTS, QUERIES, k=6, task=task, **SETTINGS)  # pyright: ignore[reportArgumentType]
        assert found.mixing.value == pytest.approx(report.mixing.value, rel=1e-2)
        assert found.candidates == len(TEXTS)
        for one, other in zip(found.results, report.results, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5)
            for mine, theirs in ((one.proponents, other.proponents), (one.opponents, other.opponents)):
                assert [r.text for r in mine] == [r.text for r in theirs]
                assert [r.influence for r in mine] == pytest.approx([r.influence for r in theirs], abs=2e-3)
                assert [r.row for r in mine] == [r.row for r in theirs]


def test_an_interrupted_pass_goes_on(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(streaming, "_EXAMPLES_AT_ONCE", 5)
    monkeypatch.setattr(streaming, "_SAVE_EVERY", -1.0)
    kept = tmp_path / "results.unfinished"

    def ask() -> object:
        return stream_queries(str(tiny_model_folder), TEXTS, QUERIES, k=3, kept=kept, **SETTINGS)  # pyright: ignore[reportArgumentType]

    expected = ask()
    assert json.loads(kept.read_text())["rows"] == len(TEXTS)  # until the caller has the results safe
    kept.unlink()
    scored: list[int] = []
    original = streaming.influences

    def stopping(correction: object, vectors: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
        if len(scored) in (2, 3):
            scored.append(0)
            raise KeyboardInterrupt
        scored.append(len(phi))
        return original(correction, vectors, phi)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(streaming, "influences", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            ask()
        assert json.loads(kept.read_text())["rows"] == 10
    capfd.readouterr()
    assert ask() == expected
    assert f"{kept}: 10 examples are done" in capfd.readouterr().err
    assert sum(scored) == len(TEXTS)
    # Results that could not be written are had again without a pass.
    assert ask() == expected
    assert sum(scored) == len(TEXTS)


@pytest.mark.parametrize("content", ["{}", '{"question": 1}', "[1]", "\0\0", '{"question": "x", "rows": "many"}'])
def test_a_kept_file_that_is_not_ours_is_refused(content: str, tiny_model_folder: Path, tmp_path: Path):
    kept = tmp_path / "kept"
    kept.write_text(content)
    with pytest.raises(OptionError, match="kept: an existing file that is not an earlier output of the same kind"):
        stream_queries(str(tiny_model_folder), TEXTS, QUERIES[:1], k=3, kept=kept, **SETTINGS)  # pyright: ignore[reportArgumentType]
    assert kept.read_text() == content


@pytest.mark.parametrize("content", ["", json.dumps(dict.fromkeys(sorted(PARTIAL_FIELDS), "x"))])
def test_an_empty_or_damaged_kept_file_is_passed_over(content: str, tiny_model_folder: Path, tmp_path: Path):
    kept = tmp_path / "kept"
    kept.write_text(content)
    found = stream_queries(str(tiny_model_folder), TEXTS, QUERIES[:1], k=3, kept=kept, **SETTINGS)  # pyright: ignore[reportArgumentType]
    assert found.candidates == len(TEXTS)


def test_what_cannot_be_asked_is_refused(tiny_model_folder: Path):
    ask = {"progress": False, "side": 4}
    with pytest.raises(OptionError, match="`queries`: expected one or more, found none"):
        stream_queries(str(tiny_model_folder), TEXTS, [], **ask)  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="`k`: expected 1 or more, found 0"):
        stream_queries(str(tiny_model_folder), TEXTS, QUERIES, k=0, **ask)  # pyright: ignore[reportArgumentType]
    for name, value, expected in (
        ("side", 0, "`side`: expected 1 or more, found 0"),
        ("batch_tokens", 0, "`batch_tokens`: expected 1 or more, found 0"),
        ("whitening_examples", -1, "`whitening_examples`: expected 1 or more, found -1"),
        ("second_moment_examples", 0, "`second_moment_examples`: expected 1 or more, found 0"),
        ("window_tokens", 10**6, "`window_tokens`: expected at most the [0-9]+ tokens that the model reads, found 10"),
    ):
        with pytest.raises(OptionError, match=expected):
            stream_queries(str(tiny_model_folder), TEXTS, QUERIES, **{**ask, name: value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(CorpusError, match="has a token to score"):
        stream_queries(str(tiny_model_folder), ["", ""], QUERIES, second_moment="none", **ask)  # pyright: ignore[reportArgumentType]
