"""A narrowed index equals the one built with the smaller side, without computing a gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from tiny_models import TinyModelFolder
from trackstar.attribution.answering import answer_queries
from trackstar.corpus import Query
from trackstar.editing.narrowing import narrow_index
from trackstar.errors import DamagedIndexError, OptionError
from trackstar.gradients.projection import random_projection
from trackstar.indexing.build import build_index
from trackstar.store import Index, verify

TEXTS = [f"Trains to {city} leave when it rains in {land}." for city in ("Rome", "Lima") for land in "abcdefgh"]
TEXTS.insert(3, "")  # has no token to score, but counts as a record
QUERIES = [Query(query_id=f"q{n}", prompt="Trains to", completion=city) for n, city in enumerate(("Rome", "Lima"))]


def phi_of(index: Index) -> torch.Tensor:
    return torch.cat([chunk.stored.decode() for chunk in index.iterate(4)])


@pytest.mark.parametrize(("kind", "output"), [("factored", "loss"), ("elementwise", "loss"), ("none", "margin")])
def test_narrowed_index_equals_one_built_with_the_smaller_side(
    kind: str, output: str, tiny_model_folders: TinyModelFolder, tmp_path: Path
):
    model = str(tiny_model_folders("llama", "bos"))
    options: dict[str, Any] = {
        "second_moment": "none" if kind == "none" else "estimate",
        "second_moment_kind": "factored" if kind == "none" else kind,
        "output": output, "codec": "float32", "shard_examples": 5, "progress": False,
    }  # fmt: skip
    wide = build_index(model, TEXTS, tmp_path / "wide", side=6, **options)
    expected = build_index(model, TEXTS, tmp_path / "anew", side=4, **options)
    found = narrow_index(tmp_path / "wide", tmp_path / "narrowed", side=4, progress=False)

    assert found.manifest.projection == expected.manifest.projection
    assert found.manifest.identity_digest() == expected.manifest.identity_digest()
    torch.testing.assert_close(phi_of(found), phi_of(expected), rtol=1e-4, atol=1e-5 * float(phi_of(wide).abs().max()))
    r_found, r_expected = (one.tensors("autocorrelation")["autocorrelation"] for one in (found, expected))
    torch.testing.assert_close(r_found, r_expected, rtol=1e-4, atol=1e-5 * float(r_expected.abs().max()))
    assert [one.example.example_id for one in found.examples()] == [one.example.example_id for one in wide.examples()]
    assert found.manifest.completion is not None
    assert expected.manifest.completion is not None
    for name in ("rows", "tokens", "targets", "records", "skipped"):
        assert getattr(found.manifest.completion, name) == getattr(expected.manifest.completion, name)
    verify(tmp_path / "narrowed")
    if output == "loss":
        answers = [answer_queries(one, QUERIES, damping=0.1, k=16, progress=False) for one in (found, expected)]
        influence = [{r.row: r.influence for r in report.results[0].proponents} for report in answers]
        assert influence[0] == pytest.approx(influence[1], abs=1e-3)


def test_projections_of_a_smaller_side_are_the_first_columns_of_a_larger_ones():
    small, large = random_projection(3, "any left", 50, 4), random_projection(3, "any left", 50, 16)
    torch.testing.assert_close(small, large[:, :4] * 2)


def test_narrowing_resumes_after_an_interruption_and_opens_a_finished_index(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    wide = build_index(
        str(tiny_model_folder), TEXTS, tmp_path / "wide", side=6, codec="float16", shard_examples=5, progress=False
    )
    whole = narrow_index(wide, tmp_path / "whole", side=3, progress=False)
    narrow_half(wide, tmp_path / "out", monkeypatch)
    assert len(Index.open(tmp_path / "out", allow_incomplete=True).shards) == 2
    found = narrow_index(tmp_path / "wide", tmp_path / "out", side=3, progress=False)
    assert found.manifest.to_json() == whole.manifest.to_json()
    again = narrow_index(tmp_path / "wide", tmp_path / "out", side=3, progress=False)
    assert again.manifest == found.manifest


def narrow_half(wide: Index, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt narrowing after two shards."""
    from trackstar.editing import narrowing

    calls = []

    def interrupted(phi: torch.Tensor, *, blocks: int, side: int) -> torch.Tensor:
        calls.append(side)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return original(phi, blocks=blocks, side=side)

    original = narrowing.narrowed
    with monkeypatch.context() as patch:
        patch.setattr(narrowing, "narrowed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            narrow_index(wide, out, side=3, progress=False)


def test_damaged_number_is_not_copied_with_a_valid_digest(tiny_model_folder: Path, tmp_path: Path):
    wide = build_index(str(tiny_model_folder), TEXTS, tmp_path / "wide", side=6, codec="float16", progress=False)
    path = wide.shards[0].path
    content = bytearray(path.read_bytes())
    content[wide.shards[0].file.tensors["codes"].start + 40] ^= 64
    path.write_bytes(content)
    with pytest.raises(DamagedIndexError, match=path.name):
        narrow_index(tmp_path / "wide", tmp_path / "out", side=3, progress=False)


@pytest.mark.parametrize("side", [4.0, "4", None, True])
def test_side_must_be_a_whole_number(side: Any, tiny_model_folder: Path, tmp_path: Path):
    wide = build_index(str(tiny_model_folder), TEXTS[:2], tmp_path / "wide", side=6, codec="float16", progress=False)
    with pytest.raises((OptionError, TypeCheckError), match="side"):
        narrow_index(wide, tmp_path / "out", side=side, progress=False)


@pytest.mark.parametrize("side", [0, 7])
def test_side_must_not_be_larger(side: int, tiny_model_folder: Path, tmp_path: Path):
    wide = build_index(str(tiny_model_folder), TEXTS[:2], tmp_path / "wide", side=6, codec="float16", progress=False)
    with pytest.raises(OptionError, match=f"`side`: expected 1 to 6, the side of .*, found {side}"):
        narrow_index(wide, tmp_path / "out", side=side, progress=False)
    assert not (tmp_path / "out").exists()
