"""Influences, rankings and task corrections over an index on disk, held against the oracle."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

import reference
from small_index import SECOND_MOMENT, small_example, small_manifest
from trackstar import store
from trackstar.choices import CodecName
from trackstar.curvature.autocorrelation import autocorrelation
from trackstar.curvature.task import task_correction
from trackstar.errors import GradientError, OptionError
from trackstar.retrieval import top_candidates as top
from trackstar.retrieval.float16_scan import CoarseQueries, Finalists
from trackstar.retrieval.scoring import Scorer, all_scores, cosine_scorer, dot_product_scorer, trackstar_scorer
from trackstar.retrieval.top_candidates import top_candidates

SIDE, BLOCKS, ROWS = 8, 2, 160
BLOCK_DIM = SIDE**2


def gradients(rows: int, seed: int) -> Tensor:
    """φ with a decaying spectrum and rows of different sizes, [rows, dimensions]."""
    draw = torch.Generator().manual_seed(seed)
    mixer = torch.randn(BLOCKS * BLOCK_DIM, BLOCKS * BLOCK_DIM, generator=torch.Generator().manual_seed(0))
    scales = torch.arange(1, BLOCKS * BLOCK_DIM + 1).float() ** -0.5
    sizes = torch.exp(0.7 * torch.randn(rows, 1, generator=draw))
    return sizes * (torch.randn(rows, len(scales), generator=draw) * scales) @ mixer


def write_index(path: Path, phi: Tensor, *, codec: CodecName = "float32", shard_examples: int = 37) -> store.Index:
    """An index of these projected gradients with their own R_train."""
    manifest = dataclasses.replace(
        small_manifest(codec),
        projection=store.ProjectionEntry(seed=0, side=SIDE, digest="d" * 32),
        shard_examples=shard_examples,
    )
    with store.IndexWriter.open(path, manifest) as writer:
        writer.write_tensors("second_moment", SECOND_MOMENT)
        for first in range(0, len(phi), shard_examples):
            part = phi[first : first + shard_examples]
            writer.write_shard(
                store.ShardContent(
                    stored=store.encode(part, codec, BLOCKS),
                    losses=torch.ones(len(part)),
                    examples=[small_example(first + row) for row in range(len(part))],
                    next_record=first + len(part),
                    next_window=0,
                    skipped=0,
                )
            )
        writer.write_tensors("autocorrelation", {"autocorrelation": autocorrelation(phi, BLOCKS)})
        writer.finish(records=len(phi), skipped=0)
    return store.Index.open(path)


@pytest.fixture(scope="module")
def candidates() -> Tensor:
    return gradients(ROWS, seed=1)


@pytest.fixture(scope="module")
def queries() -> Tensor:
    return gradients(12, seed=2)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, candidates: Tensor) -> store.Index:
    return write_index(tmp_path_factory.mktemp("index") / "float32", candidates)


def blocks(phi: Tensor) -> dict[str, Tensor]:
    return {str(number): part for number, part in enumerate(phi.chunk(BLOCKS, dim=1))}


def reference_influences(queries: Tensor, candidates: Tensor, *, mixing: float, damping: float) -> Tensor:
    """Eq. 1-3 from the projected gradients."""
    whitenings = {}
    for name, train in blocks(candidates).items():
        R_eval, R_train = reference.autocorrelation(blocks(queries)[name]), reference.autocorrelation(train)
        whitenings[name] = reference.whitening(reference.mix(R_eval, R_train, mixing, damping=damping))
    return reference.influences(blocks(queries), blocks(candidates), whitenings)


@pytest.mark.parametrize(("mixing", "damping"), [(0.0, 0.0), (0.7, 0.0), (0.3, 0.1)])
def test_influences_equal_the_references(
    index: store.Index, queries: Tensor, candidates: Tensor, mixing: float, damping: float
):
    correction = task_correction(index, queries, mixing=mixing, damping=damping)
    assert (correction.mixing.value, correction.damping) == (mixing, damping)
    found = all_scores(index, trackstar_scorer(index, queries, correction.whitening, key=correction.key))
    expected = reference_influences(queries, candidates, mixing=mixing, damping=damping)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-4 if damping == 0 else 2e-5)


def test_lambda_follows_the_papers_rule(index: store.Index, queries: Tensor, candidates: Tensor):
    correction = task_correction(index, queries)
    expected = reference.paper_mixing(
        [reference.autocorrelation(part) for part in blocks(queries).values()],
        [reference.autocorrelation(part) for part in blocks(candidates).values()],
    )
    assert correction.mixing.rank == reference.mixing_rank(BLOCKS * BLOCK_DIM) == 2
    assert correction.mixing.value == pytest.approx(expected, rel=1e-4)


def test_task_of_too_few_queries_is_corrected_by_the_training_examples_alone(index: store.Index, queries: Tensor):
    correction = task_correction(index, queries[:7])
    assert correction.mixing.value == 0
    assert "7" in correction.mixing.rule
    assert task_correction(index, queries[:8]).mixing.value > 0


def test_default_damping_is_said_and_makes_a_singular_autocorrelation_usable(tmp_path: Path, queries: Tensor):
    few = gradients(20, seed=5)
    index = write_index(tmp_path / "few", few)
    correction = task_correction(index, queries, mixing=0.0)
    assert 0 < correction.damping <= 1
    assert "20 examples" in correction.damping_rule
    found = all_scores(index, trackstar_scorer(index, queries, correction.whitening))
    expected = reference_influences(queries, few, mixing=0.0, damping=correction.damping)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_self_influence_is_one(index: store.Index, candidates: Tensor, mixing: float):
    correction = task_correction(index, candidates, mixing=mixing, damping=0.01)
    found = all_scores(index, trackstar_scorer(index, candidates, correction.whitening))
    torch.testing.assert_close(found.diagonal(), torch.ones(ROWS), rtol=1e-4, atol=0)
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-4)


def test_influence_does_not_depend_on_the_scale_of_a_loss(tmp_path: Path, queries: Tensor, candidates: Tensor):
    # R fixed, each query and each candidate scaled by a factor of its own.
    index = write_index(tmp_path / "one", candidates)
    W = task_correction(index, queries, mixing=0.0, damping=0.01).whitening
    scales = torch.exp(3 * torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(3)))
    scaled = write_index(tmp_path / "scaled", scales * candidates)
    one = all_scores(index, trackstar_scorer(index, queries, W))
    two = all_scores(scaled, trackstar_scorer(scaled, 1e-3 * queries, W))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_simpler_methods_equal_the_references_ablations(index: store.Index, queries: Tensor, candidates: Tensor):
    dot = reference.influences(blocks(queries), blocks(candidates), unit_norm=False)
    cosine = reference.influences(blocks(queries), blocks(candidates))
    found = all_scores(index, dot_product_scorer(index, queries))
    torch.testing.assert_close(found.double(), dot, rtol=1e-4, atol=1e-5 * float(dot.abs().max()))
    torch.testing.assert_close(all_scores(index, cosine_scorer(index, queries)).double(), cosine, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
@pytest.mark.parametrize("k", [1, 10, ROWS + 5])
def test_top_candidates_equal_a_full_sort_however_the_index_is_read(
    index: store.Index, queries: Tensor, k: int, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("trackstar.retrieval.scoring._VALUE_ROWS", chunk_rows)
    # Three and a half parts to a row.
    monkeypatch.setattr("trackstar.retrieval.scoring.SCAN_BYTES", chunk_rows * 4 * index.dimensions * 2 // 7)
    scorer = cosine_scorer(index, queries)
    scores = all_scores(index, scorer)
    found = top_candidates(index, scorer, k)
    for query in range(len(queries)):
        proponents = reference.top_proponents(scores[query].tolist(), k)
        opponents = reference.top_opponents(scores[query].tolist(), k)
        assert found.proponents[query].tolist() == proponents
        assert found.opponents[query].tolist() == opponents
        torch.testing.assert_close(found.proponent_scores[query], scores[query][proponents], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(found.opponent_scores[query], scores[query][opponents], rtol=1e-5, atol=2e-5)


def test_one_query_alone_scores_as_among_others(index: store.Index, queries: Tensor):
    W = task_correction(index, queries, mixing=0.0, damping=0.1).whitening
    together = all_scores(index, trackstar_scorer(index, queries, W))
    alone = torch.cat([all_scores(index, trackstar_scorer(index, query[None], W)) for query in queries])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)


def test_equal_scores_are_ranked_by_their_place_in_the_index(tmp_path: Path, queries: Tensor):
    phi = gradients(3, seed=4)[[0, 1, 0, 2, 1, 0, 2]]
    index = write_index(tmp_path / "ties", phi, shard_examples=2)
    scorer = dot_product_scorer(index, queries)
    scores, found = all_scores(index, scorer), top_candidates(index, scorer, 7)
    for query in range(len(queries)):
        assert found.proponents[query].tolist() == reference.top_proponents(scores[query].tolist(), 7)
        assert found.opponents[query].tolist() == reference.top_opponents(scores[query].tolist(), 7)


@pytest.mark.parametrize(("codec", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_rounded_codes_change_influences_by_no_more_than_their_rounding(
    tmp_path: Path, queries: Tensor, candidates: Tensor, codec: CodecName, tolerance: float
):
    index = write_index(tmp_path / codec, candidates, codec=codec)
    W = task_correction(index, queries, mixing=0.5, damping=0.1)
    found = all_scores(index, trackstar_scorer(index, queries, W.whitening))
    expected = reference_influences(queries, candidates, mixing=0.5, damping=0.1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_norms_kept_for_one_autocorrelation_are_not_used_for_another(
    tmp_path: Path, queries: Tensor, candidates: Tensor
):
    index = write_index(tmp_path / "kept", candidates)
    for _ in range(2):  # the second time from what was kept
        for mixing in (0.2, 0.8):
            correction = task_correction(index, queries, mixing=mixing, damping=0.1)
            scorer = trackstar_scorer(index, queries, correction.whitening, key=correction.key)
            expected = reference_influences(queries, candidates, mixing=mixing, damping=0.1)
            torch.testing.assert_close(all_scores(index, scorer).double(), expected, rtol=0, atol=2e-5)
    assert (
        task_correction(index, queries, mixing=0.2, damping=0.1).key
        == task_correction(index, queries.clone(), mixing=0.2, damping=0.1).key
    )
    assert (
        len({task_correction(index, task, mixing=0.2, damping=0.1).key for task in (queries, queries[:9], 2 * queries)})
        == 3
    )


def test_candidate_without_any_gradient_scores_zero_and_such_a_query_is_refused(tmp_path: Path, queries: Tensor):
    phi = gradients(90, seed=6)
    phi[4] = 0
    index = write_index(tmp_path / "zero", phi)
    W = task_correction(index, queries, mixing=0.0, damping=0.1).whitening
    scores = all_scores(index, trackstar_scorer(index, queries, W))
    assert torch.isfinite(scores).all()
    assert (scores[:, 4] == 0).all()
    with pytest.raises(GradientError, match="query 1"):
        trackstar_scorer(index, torch.cat([queries[:1], torch.zeros(1, queries.shape[1])]), W)


@pytest.mark.parametrize("k", [0, -1])
def test_number_of_candidates_must_be_positive(index: store.Index, queries: Tensor, k: int):
    with pytest.raises(OptionError, match=f"`k`: expected 1 or more, found {k}"):
        top_candidates(index, dot_product_scorer(index, queries), k)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 0.0], ids=["apart", "close", "equal"])
def test_coarse_scan_gives_the_plain_scans_ranking_however_close_scores_are(
    tmp_path: Path, queries: Tensor, candidates: Tensor, spread: float
):
    """Candidates that differ by less than float16 can tell apart are told apart all the same."""
    draw = torch.Generator().manual_seed(3)
    phi = candidates[0] + spread * torch.randn(400, candidates.shape[1], generator=draw)
    index = write_index(tmp_path / "half", phi, codec="float16", shard_examples=150)
    scorer = Scorer(vectors=queries, multipliers=torch.linspace(0.5, 1, 400) if spread else torch.ones(400))
    for k in (1, 10, 400):
        found = top._top_by_coarse_scan(index, scorer, k)
        expected = top._top_by_plain_scan(index, scorer, k)
        torch.testing.assert_close(found.proponent_scores, expected.proponent_scores, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(found.opponent_scores, expected.opponent_scores, rtol=1e-5, atol=2e-5)
        full = all_scores(index, scorer)
        for query in range(len(queries)):
            for rows, scores in (
                (found.proponents[query], found.proponent_scores[query]),
                (found.opponents[query], found.opponent_scores[query]),
            ):
                assert len(set(rows.tolist())) == k
                torch.testing.assert_close(full[query, rows], scores, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e12])
def test_coarse_scores_are_within_their_bound(tmp_path: Path, queries: Tensor, candidates: Tensor, magnitude: float):
    index = write_index(tmp_path / "half", candidates * magnitude, codec="float16")
    coarse = CoarseQueries(queries / magnitude)
    exact = all_scores(index, Scorer(vectors=queries / magnitude, multipliers=torch.ones(ROWS))).double()
    for chunk in index.iterate(64):
        values, slack = coarse.scores(chunk.stored.codes, chunk.stored.scales)
        error = (values - exact[:, chunk.first_row : chunk.first_row + len(chunk.stored.codes)]).abs()
        assert (error <= slack).all()
        assert float((slack / error.mean(dim=1, keepdim=True)).max()) < 1e4  # a bound that says something


def test_scores_out_of_their_bounds_give_the_plain_scan(
    index: store.Index, tmp_path: Path, queries: Tensor, candidates: Tensor, monkeypatch: pytest.MonkeyPatch
):
    """A machine that sums float16 products in float16 loses speed, not exactness."""
    half = write_index(tmp_path / "half", candidates, codec="float16")
    scorer = Scorer(vectors=queries[:2], multipliers=torch.ones(ROWS))
    expected = top._top_by_plain_scan(half, scorer, 5)
    original = CoarseQueries.scores

    def wrong(self: CoarseQueries, codes: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        values, slack = original(self, codes, factors)
        return values.flip(1), slack

    monkeypatch.setattr(CoarseQueries, "scores", wrong)
    found = top_candidates(half, scorer, 5)
    assert torch.equal(found.proponents, expected.proponents)
    assert torch.equal(found.opponents, expected.opponents)


def test_few_candidates_are_scored_twice(tmp_path: Path, queries: Tensor):
    index = write_index(tmp_path / "half", gradients(2000, seed=8), codec="float16", shard_examples=500)
    coarse = CoarseQueries(queries)
    for query in range(len(queries)):
        finalists = Finalists(10)
        for chunk in index.iterate(256):
            values, slack = coarse.scores(chunk.stored.codes, chunk.stored.scales)
            finalists.add(chunk.first_row, values[query], slack[query])
        assert 10 <= len(finalists.rows()) < 40
