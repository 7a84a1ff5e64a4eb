"""Whitened stores against the direct formula in float64: R = λR_eval + (1-λ)(R_train + cI), inverted as a matrix."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from capitals import QUERIES, TEXTS
from capitals_oracle import second_moments, tokenized_corpus, tokenized_queries
from comparisons import language_model, reference_phi
from trackstar.attribution.answering import answer_queries, query_gradients
from trackstar.choices import CODECS, CodecName
from trackstar.curvature.autocorrelation import autocorrelation
from trackstar.curvature.low_rank import TaskWhitening
from trackstar.curvature.task import task_correction
from trackstar.curvature.whitening import Whitening, whitening
from trackstar.errors import OptionError
from trackstar.indexing.build import build_index
from trackstar.retrieval import scoring as retrieval
from trackstar.retrieval.scoring import Scorer, _products_on_device, all_scores, scores_of, whitened_norms
from trackstar.retrieval.top_candidates import top_candidates
from trackstar.store import Index, encode

BLOCKS, DIM, ROWS = 3, 64, 400
LAMBDAS = (0.0, 1e-3, 0.3, 0.9, 0.945, 0.999)
DAMPING = 0.2


def gradients(rows: int, seed: int) -> Tensor:
    """Anisotropic φ, some directions a hundred times as large as others, in float64."""
    draw = torch.Generator().manual_seed(seed)
    mixer = torch.randn(BLOCKS, DIM, DIM, generator=draw, dtype=torch.float64)
    scales = torch.logspace(0, -2, DIM, dtype=torch.float64)
    phi = torch.randn(BLOCKS, rows, DIM, generator=draw, dtype=torch.float64) * scales
    return torch.bmm(phi, mixer / DIM**0.5).transpose(0, 1).reshape(rows, -1)


def blocks_of(phi: Tensor) -> Tensor:
    return phi.double().reshape(len(phi), BLOCKS, -1).transpose(0, 1)


def direct_inverse(candidates: Tensor, queries: Tensor, mixing: float, damping: float = DAMPING) -> Tensor:
    """R⁻¹ of each block, by the formula as written and numpy's inverse."""
    inverses = []
    for train, task in zip(blocks_of(candidates).numpy(), blocks_of(queries).numpy(), strict=True):
        r_train, r_eval = train.T @ train / len(train), task.T @ task / len(task)
        damped = r_train + damping * np.trace(r_train) / len(r_train) * np.eye(len(r_train))
        inverses.append(np.linalg.inv(mixing * r_eval + (1 - mixing) * damped))
    return torch.from_numpy(np.stack(inverses))


def direct_influences(candidates: Tensor, queries: Tensor, inverse: Tensor) -> Tensor:
    c, q = blocks_of(candidates), blocks_of(queries)
    products = torch.einsum("bqi,bij,bcj->qc", q, inverse, c)
    norms = [torch.einsum("bni,bij,bnj->n", x, inverse, x).sqrt() for x in (q, c)]
    return products / norms[0][:, None] / norms[1]


@pytest.fixture(scope="module")
def candidates() -> Tensor:
    return gradients(ROWS, 1)


@pytest.mark.parametrize("queries", [1, 20, 200], ids=lambda count: f"{count} queries")
@pytest.mark.parametrize("mixing", LAMBDAS)
def test_the_low_rank_correction_equals_the_direct_formula(candidates: Tensor, mixing: float, queries: int):
    """Also where the task has more queries than a block has dimensions."""
    asked = gradients(queries, 2)
    train = whitening(autocorrelation(candidates.float(), BLOCKS), damping=DAMPING, rotation=5)
    task = TaskWhitening.of(train.apply(asked.float()), blocks=BLOCKS, mixing=mixing)
    u, q = train.apply(candidates.float()), train.apply(asked.float())
    inverse = direct_inverse(candidates, asked, mixing)
    norms = torch.einsum("bni,bij,bnj->n", blocks_of(candidates), inverse, blocks_of(candidates)).sqrt()
    # Near λ = 1 nearly all of u is taken off, and what single precision has lost of it counts for more.
    precision = 2e-6 / (1 - mixing)
    torch.testing.assert_close(task.norms(u).double(), norms, rtol=1e-4 + precision, atol=0)
    vectors = task.apply_inverse(q) / task.norms(q)[:, None]
    found = vectors @ u.T / task.norms(u)
    torch.testing.assert_close(
        found.double(), direct_influences(candidates, asked, inverse), rtol=0, atol=1e-5 + precision
    )
    # What meets φ itself gives the same inner products.
    in_phi = train.apply_transposed(vectors) @ candidates.float().T / task.norms(u)
    torch.testing.assert_close(in_phi, found, rtol=0, atol=1e-4)
    # And so does the norm, from ‖u‖ and the task's directions in φ's space.
    directions = task.in_gradients(train)
    from_phi = directions.norms(torch.linalg.vector_norm(u, dim=1), directions.squares(candidates.float()))
    torch.testing.assert_close(from_phi.double(), norms, rtol=1e-4 + precision, atol=0)


def test_reranked_candidates_are_not_whitened(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither where R is R_train alone, nor for a task of few directions."""
    index = build(tiny_model_folder, tmp_path / "index", "1-bit")
    whitened: list[int] = []
    original = Whitening.apply

    def counting(self: Whitening, rows: Tensor) -> Tensor:
        whitened.append(len(rows))
        return original(self, rows)

    monkeypatch.setattr(Whitening, "apply", counting)
    for mixing in (0.0, 0.5):
        whitened.clear()
        answer_queries(index, QUERIES, k=3, reranked=len(TEXTS), progress=False, mixing=mixing)
        assert whitened
        assert max(whitened) <= len(QUERIES) < len(TEXTS)


def test_candidates_norms_under_r_train_alone_are_the_stored_ones(tiny_model_folder: Path, tmp_path: Path):
    index = build(tiny_model_folder, tmp_path / "index", "1-bit")
    alone = TaskWhitening.of(torch.zeros(0, index.dimensions), blocks=len(index.manifest.layer_blocks), mixing=0.0)
    norms = whitened_norms(index, alone)
    torch.testing.assert_close(norms, index.norms())
    rows = [1, 3, index.rows - 1]
    torch.testing.assert_close(index.some_norms(rows), norms[rows])
    torch.testing.assert_close(alone.stored_norms(index.some_rows(rows)), norms[rows])


def test_the_same_in_float64_is_equal_to_rounding(candidates: Tensor):
    """The algebra itself, apart from single precision: w_k and v_k written out anew."""
    asked = gradients(20, 2)
    for mixing in LAMBDAS:
        inverse = direct_inverse(candidates, asked, mixing)
        for block in range(BLOCKS):
            c, q = blocks_of(candidates)[block], blocks_of(asked)[block]
            r_train = c.T @ c / len(c)
            damped = r_train + DAMPING * r_train.trace() / DIM * torch.eye(DIM, dtype=torch.float64)
            w_train = torch.linalg.inv(torch.linalg.cholesky(damped))
            sigma, v = torch.linalg.eigh(w_train @ (q.T @ q / len(q)) @ w_train.T)
            w = mixing * sigma / (mixing * sigma + 1 - mixing)
            low_rank = (torch.eye(DIM, dtype=torch.float64) - (v * w) @ v.T) / (1 - mixing)
            torch.testing.assert_close(w_train.T @ low_rank @ w_train, inverse[block], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("queries", [1, 8, 200], ids=lambda count: f"{count} queries")
@pytest.mark.parametrize("mixing", [*LAMBDAS, 0.9999])
def test_a_candidate_like_the_task_keeps_its_influence(mixing: float, queries: int):
    """Of its norm nearly all is taken off near λ = 1: a candidate that is a query has influence 1 all the same, and
    a near one what the formula says. Blocks as large as this have σ in the thousands.
    """
    dim, draw = 1024, torch.Generator().manual_seed(queries)
    asked = 2 * torch.randn(queries, 2 * dim, generator=draw)
    near = asked + 0.3 * torch.randn(queries, 2 * dim, generator=draw)
    task = TaskWhitening.of(asked, blocks=2, mixing=mixing)
    vectors = task.apply_inverse(asked) / task.norms(asked)[:, None]
    itself = (vectors * asked).sum(dim=1) / task.norms(asked)
    torch.testing.assert_close(itself, torch.ones(queries), rtol=1e-4, atol=0)
    found = (vectors * near).sum(dim=1) / task.norms(near)
    products, squares = torch.zeros(queries, dtype=torch.float64), torch.zeros(2, queries, dtype=torch.float64)
    for q, c in zip(asked.double().split(dim, dim=1), near.double().split(dim, dim=1), strict=True):
        inverse = torch.linalg.inv(mixing * q.T @ q / queries + (1 - mixing) * torch.eye(dim, dtype=torch.float64))
        products += ((q @ inverse) * c).sum(dim=1)
        squares += torch.stack([((x @ inverse) * x).sum(dim=1) for x in (q, c)])
    torch.testing.assert_close(found.double(), products / squares.prod(dim=0).sqrt(), rtol=1e-4, atol=0)


def test_a_rotation_changes_no_score(candidates: Tensor):
    r_train = autocorrelation(candidates.float(), BLOCKS)
    plain = whitening(r_train, damping=DAMPING)
    turned = whitening(r_train, damping=DAMPING, rotation=3)
    a, b = plain.apply(candidates.float()), turned.apply(candidates.float())
    torch.testing.assert_close(a @ a.T, b @ b.T, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(plain.norms(candidates.float()), turned.norms(candidates.float()), rtol=1e-4, atol=0)
    found = torch.stack(list(turned.autocorrelation(DAMPING)))
    expected = autocorrelation(candidates.float(), BLOCKS).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_all_of_r_eval_is_refused_for_whitened_rows():
    with pytest.raises(OptionError, match=r"`mixing`: expected 0 to less than 1 for whitened coordinates, found 1.0"):
        TaskWhitening.of(torch.ones(1, 64), blocks=1, mixing=1.0)


@pytest.mark.parametrize("codec", CODECS)
def test_norms_under_a_task_from_codes_are_those_of_the_rows(codec: CodecName):
    """Unbiased, though (v·û)² is too large by the codes' error; 100 directions a block of 1,024 dimensions."""
    draw = torch.Generator().manual_seed(0)
    u = torch.randn(300, 2 * 1024, generator=draw)
    task = TaskWhitening.of(3 * torch.randn(100, 2 * 1024, generator=draw), blocks=2, mixing=0.9)
    exact, found = task.norms(u), task.stored_norms(encode(u, codec, 2))
    assert float((found / exact).log().mean()) == pytest.approx(0, abs=3e-3)
    assert float((found / exact).log().std()) < 0.03


@dataclasses.dataclass(frozen=True)
class Direct:
    """What the oracle makes of the capitals' texts: φ by brute force, and R as written."""

    candidates: Tensor
    queries: Tensor

    def influences(self, mixing: float, damping: float) -> Tensor:
        products = torch.zeros(len(self.queries), len(self.candidates), dtype=torch.float64)
        squares = [torch.zeros(len(x), dtype=torch.float64) for x in (self.queries, self.candidates)]
        for block in range(self.candidates.shape[1]):
            c, q = self.candidates[:, block], self.queries[:, block]
            r_train, r_eval = reference.autocorrelation(c), reference.autocorrelation(q)
            damped = r_train + damping * r_train.trace() / len(r_train) * torch.eye(len(r_train), dtype=c.dtype)
            inverse = torch.linalg.inv(reference.mix(r_eval, damped, mixing))
            products += q @ inverse @ c.T
            for total, x in zip(squares, (q, c), strict=True):
                total += (x @ inverse * x).sum(dim=1)
        return products / squares[0].sqrt()[:, None] / squares[1].sqrt()


@pytest.fixture(scope="module")
def direct() -> Direct:
    model = language_model("llama")
    corpus, asked = tokenized_corpus(), tokenized_queries(QUERIES)
    V = second_moments(model, corpus, "factored")
    phi = [torch.stack(list(reference_phi(model, x, V, seed=0, side=8).values()), dim=1) for x in (corpus, asked)]
    return Direct(candidates=phi[0], queries=phi[1])


def build(folder: Path, out: Path, codec: CodecName, **options: object) -> Index:
    settings = {"layer_blocks": 2, "side": 8, "damping": DAMPING, "progress": False, "coordinates": "whitened"}
    return build_index(str(folder), TEXTS, out, codec=codec, **{**settings, **options})  # pyright: ignore[reportArgumentType]


def influences_of(index: Index, **options: object) -> Tensor:
    report = answer_queries(index, QUERIES, k=len(TEXTS), progress=False, **options)  # pyright: ignore[reportArgumentType]
    found = torch.full((len(QUERIES), len(TEXTS)), torch.nan, dtype=torch.float64)
    for number, result in enumerate(report.results):
        for ranked in result.proponents:
            found[number, ranked.row] = ranked.influence
    return found


@pytest.mark.parametrize("mixing", [0.0, 0.5, 0.95])
def test_an_index_of_whitened_rows_answers_every_task(
    direct: Direct, mixing: float, tiny_model_folder: Path, tmp_path: Path
):
    index = build(tiny_model_folder, tmp_path / "index", "float32")
    expected = direct.influences(mixing, DAMPING)
    torch.testing.assert_close(influences_of(index, mixing=mixing), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("codec", ["int8", "4-bit", "2-bit", "1-bit"])
def test_codes_are_as_near_as_their_bits_and_ranking_again_is_exact(
    codec: CodecName, direct: Direct, tiny_model_folder: Path, tmp_path: Path
):
    index = build(tiny_model_folder, tmp_path / "index", codec)
    expected = direct.influences(0.5, DAMPING)
    coarse = influences_of(index, mixing=0.5, reranked=0)
    error = float((coarse - expected).square().mean().sqrt())
    assert 1e-5 < error < {"int8": 0.01, "4-bit": 0.05, "2-bit": 0.15, "1-bit": 0.3}[codec]
    for options in ({"reranked": len(TEXTS)}, {"exact": True}):
        exact = influences_of(index, mixing=0.5, **options)
        torch.testing.assert_close(exact, expected, rtol=0, atol=2e-3)


def test_lambda_follows_the_rule_on_a_whitened_index_too(tiny_model_folder: Path, tmp_path: Path):
    whitened = build(tiny_model_folder, tmp_path / "whitened", "float32")
    projected = build(tiny_model_folder, tmp_path / "projected", "float32", coordinates="projected", damping=None)
    phi, _ = query_gradients(projected, language_model("llama"), QUERIES, progress=False)
    found, expected = (task_correction(index, phi).mixing for index in (whitened, projected))
    assert found.value == pytest.approx(expected.value, rel=1e-2)
    assert 0 < found.value < 1


def test_what_a_whitened_index_cannot_be_asked_with_is_refused(tiny_model_folder: Path, tmp_path: Path):
    index = build(tiny_model_folder, tmp_path / "index", "1-bit")
    with pytest.raises(OptionError, match=r"`mixing`: expected 0 to less than 1 for .* whitened by R_train, found 1.0"):
        answer_queries(index, QUERIES[:1], mixing=1.0, progress=False)
    with pytest.raises(OptionError, match=r"`mixing`: expected 0 without queries that R_eval comes from, found 0.3"):
        answer_queries(index, QUERIES[:1], task=[], mixing=0.3, progress=False)
    with pytest.raises(OptionError, match=r"`damping`: expected 0.2, with which .* was whitened by R_train, found 0.1"):
        answer_queries(index, QUERIES[:1], damping=0.1, progress=False)


@pytest.mark.parametrize("codec", ["int8", "4-bit", "2-bit", "1-bit"])
def test_few_queries_and_many_are_scored_alike(
    codec: CodecName, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Straight from the bytes for a few, by products of bytes or decoded for many: the products of the decoded rows."""
    index = build(tiny_model_folder, tmp_path / "index", codec, shard_examples=7)
    draw = torch.Generator().manual_seed(0)
    scorer = Scorer(
        vectors=torch.randn(40, index.dimensions, generator=draw), multipliers=torch.rand(index.rows, generator=draw)
    )
    decoded = torch.cat([shard.stored.decode() for shard in index.shards])
    expected = scorer.vectors @ decoded.T * scorer.multipliers
    scale = scorer.vectors.norm(dim=1)[:, None] * (decoded.norm(dim=1) * scorer.multipliers)
    with monkeypatch.context() as patched:
        patched.setattr(retrieval, "_byte_products_serve", lambda: False)
        torch.testing.assert_close(all_scores(index, scorer), expected, rtol=1e-4, atol=1e-4)
    assert bool(((all_scores(index, scorer) - expected).abs() <= 3e-4 * scale).all())
    for count in (1, 2, 16):
        few = dataclasses.replace(scorer, vectors=scorer.vectors[:count])
        assert bool(((all_scores(index, few) - expected[:count]).abs() <= 0.015 * scale[:count]).all())
    torch.testing.assert_close(scores_of(index, scorer, torch.tensor([1, 8, 20])), expected[:, [1, 8, 20]])
    on_device = [part for _, part in _products_on_device(index, scorer.vectors)]
    torch.testing.assert_close((torch.cat(on_device) * scorer.multipliers[:, None]).T, expected, rtol=1e-4, atol=1e-4)
    best = top_candidates(index, scorer, 3)
    assert torch.equal(best.proponents, all_scores(index, scorer).topk(3, dim=1).indices)
