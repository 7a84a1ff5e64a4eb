"""Two-stage retrieval: re-ranked candidates have exact scores, and misses are as frequent as estimated."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from capitals import QUERIES, TEXTS
from trackstar import Attributor, load_model
from trackstar.attribution.answering import answer_queries
from trackstar.choices import CODECS
from trackstar.errors import OptionError
from trackstar.indexing.build import build_index
from trackstar.retrieval import reranking
from trackstar.retrieval.reranking import RERANKED, calibration, missed_chance
from trackstar.store import Index


@pytest.fixture(scope="module")
def index(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("reranking") / "index"
    return build_index(
        str(tiny_model_folder),
        TEXTS,
        out,
        layer_blocks=2,
        side=8,
        codec="1-bit",
        second_moment_examples=8,
        progress=False,
    )


def test_one_bit_a_dimension_is_whitened_and_ranked_again(index: Index):
    assert (index.manifest.codec, index.manifest.coordinates) == ("1-bit", "whitened")
    report = answer_queries(index, QUERIES[:2], k=3, progress=False)
    assert report.reranked == min(RERANKED["1-bit"], len(TEXTS)) == len(TEXTS)
    assert any("exact" in line for line in report.summary())
    assert set(RERANKED) == set(CODECS)


def test_what_is_ranked_again_has_exact_influences(index: Index):
    exact = {
        (number, ranked.row): ranked.influence
        for number, result in enumerate(
            answer_queries(index, QUERIES, k=len(TEXTS), exact=True, progress=False).results
        )
        for ranked in result.proponents
    }
    report = answer_queries(index, QUERIES, k=3, reranked=12, progress=False)
    for number, result in enumerate(report.results):
        for ranked in (*result.proponents, *result.opponents):
            assert ranked.influence == pytest.approx(exact[number, ranked.row], abs=1e-5)
        assert list(result.proponents) == sorted(result.proponents, key=lambda one: -one.influence)
        assert list(result.opponents) == sorted(result.opponents, key=lambda one: one.influence)
        assert result.missed is not None
        assert 0 <= result.missed <= 1
    assert "estimated chance that a true proponent is missing" in " ".join(report.summary())


def test_each_query_has_exact_scores_of_its_own_candidates(index: Index, monkeypatch: pytest.MonkeyPatch):
    """Also where they come in parts, and more are asked for than there are."""
    expected = answer_queries(index, QUERIES, k=len(TEXTS) + 5, exact=True, mixing=0.3, progress=False)
    monkeypatch.setattr(reranking, "_ROWS_AT_ONCE", 3)
    report = answer_queries(index, QUERIES, k=len(TEXTS) + 5, reranked=len(TEXTS) + 9, mixing=0.3, progress=False)
    for result, whole in zip(report.results, expected.results, strict=True):
        for found, exact in ((result.proponents, whole.proponents), (result.opponents, whole.opponents)):
            assert [one.row for one in found] == [one.row for one in exact]
            assert len(found) == len(TEXTS)
            torch.testing.assert_close(*(torch.tensor([one.influence for one in part]) for part in (found, exact)))


def test_a_ranking_does_not_depend_on_what_else_is_asked(tiny_model_folder: Path, tmp_path: Path):
    """But for how a store of few bits is scanned for many queries; this one has numbers."""
    index = build_index(str(tiny_model_folder), TEXTS, tmp_path / "index", codec="float32", side=8, progress=False)
    options = {"k": 3, "reranked": 4, "mixing": 0.0, "progress": False}
    together = answer_queries(index, QUERIES, **options)
    assert 4 <= together.recomputed <= 8 * len(QUERIES)
    assert f"(of {together.recomputed} examples)" in " ".join(together.summary())
    for query, result in zip(QUERIES, together.results, strict=True):
        alone = answer_queries(index, [query], **options).results[0]
        assert [one.row for one in alone.proponents] == [one.row for one in result.proponents]
        assert [one.row for one in alone.opponents] == [one.row for one in result.opponents]


def test_an_interrupted_exact_pass_goes_on(index: Index, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reranking, "_ROWS_AT_ONCE", 7)
    options = {"k": 4, "exact": True, "mixing": 0.3, "progress": False}
    done: list[int] = []
    original = reranking.projected

    def stopping(projector: Any, examples: Sequence[Any], *others: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(len(examples))
        return original(projector, examples, *others)

    with monkeypatch.context() as patch:
        patch.setattr(reranking, "projected", stopping)
        with pytest.raises(KeyboardInterrupt):
            answer_queries(index, QUERIES, **options)
    again: list[int] = []

    def counting(projector: Any, examples: Sequence[Any], *others: Any) -> Any:
        again.append(len(examples))
        return original(projector, examples, *others)

    monkeypatch.setattr(reranking, "projected", counting)
    found = answer_queries(index, QUERIES, **options)
    assert sum(again) == len(TEXTS) - 14
    assert [len(result.proponents) for result in found.results] == [4] * len(QUERIES)
    whole = answer_queries(index, QUERIES, k=len(TEXTS), reranked=len(TEXTS), mixing=0.3, progress=False)
    for one, other in zip(found.results, whole.results, strict=True):
        assert [r.row for r in one.proponents] == [r.row for r in other.proponents[:4]]


def test_fewer_ranked_again_than_asked_for_is_refused(index: Index):
    with pytest.raises(OptionError, match="`reranked`: expected at least `k=5`, or 0 to skip re-ranking, found 2"):
        answer_queries(index, QUERIES[:1], k=5, reranked=2, progress=False)
    with pytest.raises(OptionError, match=r"`reranked`: expected none with `exact=True`, .*, found 20"):
        answer_queries(index, QUERIES[:1], k=5, reranked=20, exact=True, progress=False)


def test_a_single_question_is_ranked_again_too(index: Index, tiny_model_folder: Path):
    model = load_model(str(tiny_model_folder), layer_blocks=2)
    attributor = Attributor(index, model, reranked=6)
    attribution = attributor.attribute(QUERIES[0])
    exact = Attributor(index, model, reranked=len(TEXTS)).attribute(QUERIES[0])
    assert len(exact.reranked) == len(TEXTS)
    assert 6 <= len(attribution.reranked) <= 12
    rows = attribution.reranked
    torch.testing.assert_close(attribution.influences[rows], exact.influences[rows], rtol=0, atol=1e-5)
    row = int(attribution.top(1)[0])
    for split in (attributor.over_candidate(attribution, row), attributor.over_query(attribution, row)):
        assert float(split.parts.sum()) == pytest.approx(split.influence, abs=1e-4)


def simulated(queries: int, rows: int, again: int, noise: float) -> list[tuple[float, bool]]:
    """Estimated chances and what happened, for exact scores that are normal and coarse ones with noise added."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for _ in range(queries):
        exact = torch.randn(rows, generator=draw)
        coarse, order = (exact + noise * torch.randn(rows, generator=draw)).sort(descending=True)
        best = exact[order[:again]]
        chance = missed_chance(coarse[:again], best, coarse[again:], threshold=float(best.topk(10).values[-1]))
        assert chance is not None
        found.append((chance, bool(exact.topk(10).values[-1] > best.topk(10).values[-1])))
    return found


@pytest.mark.parametrize(("again", "noise"), [(20, 0.3), (40, 0.3), (60, 0.6), (100, 0.6), (200, 1.0)])
def test_the_estimated_chance_is_how_often_it_happens(again: int, noise: float):
    found = simulated(400, 3000, again, noise)
    expected = sum(chance for chance, _ in found) / len(found)
    happened = sum(missed for _, missed in found) / len(found)
    assert expected == pytest.approx(happened, abs=0.08)


def test_nothing_is_missed_where_all_are_ranked_again_and_nothing_said_of_few():
    coarse = torch.linspace(1, 0, 20)
    assert missed_chance(coarse, coarse, torch.empty(0), threshold=0.5) == 0.0
    assert missed_chance(coarse[:11], coarse[:11], coarse[11:], threshold=0.5) is None


def test_calibration_is_the_line_of_least_squares():
    coarse = torch.tensor([1.0, 2.0, 3.0, 4.0])
    fitted = calibration(coarse, torch.tensor([2.0, 4.5, 5.5, 8.0]))
    assert fitted.slope == pytest.approx(1.9)
    assert fitted.intercept == pytest.approx(0.25)
    assert fitted.spread == pytest.approx(math.sqrt(0.45 / 2), rel=0.05)
    torch.testing.assert_close(fitted.expected(torch.tensor([10.0])), torch.tensor([19.25]))
