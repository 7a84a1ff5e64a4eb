"""R, its mixing, λ and whitening of the package, held against the oracle."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import reference
from trackstar.curvature.autocorrelation import Autocorrelation, autocorrelation
from trackstar.curvature.mixing import mixed, mixing_by_spectra, spectrum_of_autocorrelation, spectrum_of_examples
from trackstar.curvature.whitening import Whitening, shrinkage_damping, whitening
from trackstar.errors import CurvatureError, OptionError

BLOCKS = 3


def correlated(rows: int, dim: int, *, seed: int = 0, blocks: int = BLOCKS) -> Tensor:
    """φ of some examples, [rows, blocks·dim] in float32, with a decaying spectrum as gradients have."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, dim + 1).float() ** -0.5
    parts = [
        (torch.randn(rows, dim, generator=draw) * scales) @ torch.randn(dim, dim, generator=draw) for _ in range(blocks)
    ]
    return torch.cat(parts, dim=1)


def of_reference(phi: Tensor, blocks: int = BLOCKS) -> list[Tensor]:
    return [reference.autocorrelation(block) for block in phi.chunk(blocks, dim=1)]


@hypothesis.given(seed=st.integers(0, 100), rows=st.integers(1, 9), cut=st.integers(0, 9))
def test_autocorrelation_is_the_mean_of_outer_products_however_examples_are_batched(seed: int, rows: int, cut: int):
    phi = correlated(rows, 4, seed=seed)
    expected = torch.stack(of_reference(phi))
    torch.testing.assert_close(autocorrelation(phi, BLOCKS).double(), expected, rtol=1e-4, atol=1e-5)
    accumulator = Autocorrelation(BLOCKS, 4)
    for part in (phi[:cut], phi[cut:]):
        accumulator.add(part)
    torch.testing.assert_close(accumulator.mean().double(), expected, rtol=1e-4, atol=1e-5)


def test_a_block_summed_alone_has_the_same_bits_and_panels_meet():
    """1,100 dimensions are two panels; sums in float64 keep what a float32 sum of the same batches would lose."""
    batches = [correlated(40, 1100, seed=seed) for seed in range(3)]
    together, alone = Autocorrelation(BLOCKS, 1100), Autocorrelation(1, 1100)
    for phi in batches:
        together.add(phi)
        alone.add(phi[:, 1100:2200])
    mean = together.mean()
    assert torch.equal(mean[1], alone.mean()[0])
    assert torch.equal(mean, mean.mT)
    expected = torch.stack(of_reference(torch.cat(batches)))
    torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=1e-4)
    one = Autocorrelation(1, 1)
    for value in [1e4] + [1.0] * 1000:
        one.add(torch.full((1, 1), value))
    assert float(one.mean()) == pytest.approx((1e8 + 1000) / 1001, rel=1e-7)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("mixing", [0.0, 0.3, 1.0])
def test_mixed_autocorrelation_is_equation_three_with_a_damped_r_train(mixing: float, damping: float):
    for evaluation, train in zip(*(of_reference(correlated(20, 4, seed=seed)) for seed in (0, 1)), strict=True):
        before = train.clone()
        expected = reference.mix(evaluation, train, mixing, damping=damping)
        torch.testing.assert_close(mixed(evaluation, train, mixing, damping=damping), expected)
        assert torch.equal(train, before)


def test_both_spectra_equal_the_pooled_singular_values():
    phi = correlated(5, 12)
    expected = reference.pooled_singular_values(of_reference(phi))
    torch.testing.assert_close(spectrum_of_autocorrelation(torch.stack(of_reference(phi))), expected)
    by_examples = spectrum_of_examples(phi, BLOCKS)
    assert len(by_examples) == 5 * BLOCKS
    torch.testing.assert_close(by_examples, expected[: 5 * BLOCKS], rtol=1e-6, atol=1e-6)


@hypothesis.given(seed=st.integers(0, 100), scale=st.sampled_from([0.01, 1.0, 50.0]), dim=st.sampled_from([40, 110]))
def test_mixing_equals_the_papers_rule_where_both_autocorrelations_have_full_rank(seed: int, scale: float, dim: int):
    queries, candidates = scale * correlated(2 * dim, dim, seed=seed), correlated(2 * dim, dim, seed=seed + 1)
    evaluation, train = of_reference(queries), of_reference(candidates)
    found = mixing_by_spectra(
        reference.pooled_singular_values(evaluation),
        reference.pooled_singular_values(train),
        dimensions=BLOCKS * dim,
        queries=len(queries),
    )
    assert found.rank == reference.mixing_rank(BLOCKS * dim)
    assert found.value == pytest.approx(reference.paper_mixing(evaluation, train), rel=1e-6)


def test_mixing_of_few_queries_is_taken_at_half_the_smaller_rank_and_says_so():
    blocks, dim, queries = 4, 256, 5  # the paper's rank would be 16; R_eval has 20 singular values
    evaluation = spectrum_of_examples(correlated(queries, dim, seed=0, blocks=blocks), blocks)
    train = spectrum_of_examples(correlated(400, dim, seed=1, blocks=blocks), blocks)
    found = mixing_by_spectra(evaluation, train, dimensions=blocks * dim, queries=queries)
    assert (found.rank, found.evaluation_rank, found.queries) == (10, 20, 5)
    assert "16" in found.rule
    assert found.value == pytest.approx(float(train[9] / (evaluation[9] + train[9])))


def test_spectrum_that_is_zero_throughout_has_no_mixing():
    with pytest.raises(CurvatureError, match="pass `mixing`"):
        mixing_by_spectra(torch.zeros(4), torch.ones(4), dimensions=4, queries=1)


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("dim", [1, 9, 100, 600])
def test_whitened_inner_products_and_norms_equal_those_of_the_symmetric_root(dim: int, damping: float):
    phi = correlated(2 * dim + 2, dim, blocks=2)
    blocks = of_reference(phi, blocks=2)
    found = whitening(torch.stack(blocks).float(), damping=damping)
    few = phi[:7]
    roots = {str(number): reference.whitening(block, damping=damping) for number, block in enumerate(blocks)}
    G = reference.whitened({str(n): part for n, part in enumerate(few.chunk(2, dim=1))}, roots)
    tolerance = 2e-3 * float((G @ G.T).diagonal().mean())
    torch.testing.assert_close((found.apply(few) @ found.apply(few).T).double(), G @ G.T, rtol=2e-3, atol=tolerance)
    torch.testing.assert_close((found.apply_inverse(few) @ few.T).double(), G @ G.T, rtol=2e-3, atol=tolerance)
    torch.testing.assert_close(found.norms(few).double(), G.norm(dim=1), rtol=2e-3, atol=0)


def test_whitening_norms_leave_out_only_zeros():
    factors = torch.tril(torch.ones(2, 150, 150))
    phi = torch.arange(300.0).reshape(1, 300) / 300
    direct = torch.cat([phi[:, :150] @ factors[0].T, phi[:, 150:] @ factors[1].T], dim=1)
    torch.testing.assert_close(Whitening(factors=factors).norms(phi), direct.norm(dim=1))


def test_singular_autocorrelation_is_refused_by_name_unless_damped():
    R = torch.stack(of_reference(correlated(3, 8)))
    with pytest.raises(CurvatureError, match=r"mlp\.0-1: R is singular"):
        whitening(torch.stack([torch.eye(8, dtype=torch.float64), R[0], R[1]]), names=["attention.0-1", "mlp.0-1", "c"])
    expected = reference.whitening(R[0], damping=0.2)
    W = whitening(R, damping=0.2).factors[0].double()
    torch.testing.assert_close(W.T @ W, expected @ expected, rtol=1e-4, atol=1e-4 * float((expected @ expected).max()))


def test_negative_damping_is_refused():
    with pytest.raises(OptionError, match="`damping`: expected 0 or more"):
        whitening(torch.eye(2)[None], damping=-0.1)


@pytest.mark.parametrize("examples", [12, 60, 400])
def test_shrinkage_damping_comes_near_the_best_convex_combination_with_the_identity(examples: int):
    dim = 24
    draw = torch.Generator().manual_seed(examples)
    truth = torch.diag(torch.arange(1, dim + 1).double() ** -1)

    def distance(S: Tensor, damping: float) -> float:
        shrunk = S + damping * S.trace() / dim * torch.eye(dim)
        return float((shrunk / (1 + damping) - truth).norm())

    found, best, undamped = 0.0, 0.0, 0.0
    for _ in range(20):
        S = reference.autocorrelation(torch.randn(examples, dim, generator=draw, dtype=torch.float64) @ truth.sqrt())
        found += distance(S, shrinkage_damping(S[None].float(), examples))
        best += min(distance(S, 0.02 * step) for step in range(51))  # in hindsight, knowing the truth
        undamped += distance(S, 0.0)
    assert found < 1.15 * best
    assert found < undamped


def test_shrinkage_damping_does_not_depend_on_the_scale_and_vanishes_with_many_examples():
    R = torch.stack(of_reference(correlated(200, 8))).float()
    dampings = [shrinkage_damping(R, examples) for examples in (10, 1000, 100_000)]
    assert 1 >= dampings[0] > dampings[1] > dampings[2] > 0
    assert dampings[2] < 1e-3
    assert shrinkage_damping(1000 * R, 10) == pytest.approx(dampings[0], rel=1e-4)
