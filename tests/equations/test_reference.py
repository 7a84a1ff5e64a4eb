"""The oracle itself, against finite differences, hand-computed numbers and the equations' own properties."""

import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import reference
from tiny_models import ARCHITECTURES, SENTENCES, TinyModel, matrix_parameters


def tokens(tokenizer, sentence: str = SENTENCES[2], *, targets_from: int = 1) -> tuple[Tensor, Tensor]:
    token_ids = torch.tensor(tokenizer(sentence)["input_ids"])
    return token_ids, torch.arange(len(token_ids)) >= targets_from


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def positive_definite(dim: int, seed: int = 0) -> Tensor:
    return reference.autocorrelation(normal(3 * dim, dim, seed=seed))


# ---- Gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_equals_finite_differences(architecture: str, tiny_models: TinyModel, tiny_tokenizer):
    model = reference.double_copy(tiny_models(architecture))
    token_ids, mask = tokens(tiny_tokenizer, targets_from=4)
    names = matrix_parameters(tiny_models(architecture))
    gradients = reference.loss_gradients(model, token_ids, mask, names)
    step = 1e-5
    for number, name in enumerate(names):
        weight = model.get_parameter(name).detach()
        direction = normal(*weight.shape, seed=number)
        weight.add_(direction, alpha=step)
        above = float(reference.output_value(model, token_ids, mask))
        weight.add_(direction, alpha=-2 * step)
        below = float(reference.output_value(model, token_ids, mask))
        weight.add_(direction, alpha=step)
        stored_as_rows_columns = direction.T if architecture == "gpt2" else direction
        expected = float((gradients[name] * stored_as_rows_columns).sum())
        assert (above - below) / (2 * step) == pytest.approx(expected, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("output", [reference.loss_output, reference.margin_output, reference.logit_output])
def test_output_function_gradient_equals_finite_differences(output: reference.Output):
    logits, token_ids, mask = normal(6, 9), torch.tensor([1, 4, 8, 0, 2, 2]), torch.arange(6) >= 2
    assert torch.autograd.gradcheck(lambda values: output(values, token_ids, mask), logits.requires_grad_(True))


def test_loss_is_the_sum_of_the_targets_cross_entropies():
    # Uniform logits over 8 tokens: each target costs log 8; p = 1/8 has the margin log((1/8)/(7/8)) = -log 7.
    logits, token_ids, mask = torch.zeros(5, 8, dtype=torch.float64), torch.arange(5), torch.arange(5) >= 2
    assert float(reference.loss_output(logits, token_ids, mask)) == pytest.approx(3 * math.log(8))
    assert float(reference.margin_output(logits, token_ids, mask)) == pytest.approx(-3 * math.log(7))
    # A target is predicted by the position before it.
    logits[1, 2], logits[2, 2], logits[3, 4] = 5.0, 100.0, 7.0
    assert float(reference.logit_output(logits, token_ids, mask)) == pytest.approx(12.0)


def test_loss_equals_the_models_own(tiny_models: TinyModel, tiny_tokenizer):
    for architecture in ARCHITECTURES:
        model = tiny_models(architecture)
        token_ids, mask = tokens(tiny_tokenizer, SENTENCES[1])
        with torch.no_grad():
            mean = model(input_ids=token_ids[None], labels=token_ids[None]).loss
        found = float(reference.output_value(reference.double_copy(model), token_ids, mask))
        assert found == pytest.approx(float(mean) * int(mask.sum()), rel=1e-5), architecture


def test_first_token_cannot_be_a_target():
    with pytest.raises(ValueError, match="nothing before it"):
        reference.loss_output(torch.zeros(3, 8), torch.arange(3), torch.ones(3, dtype=torch.bool))


def test_gradient_of_a_sum_of_targets_is_the_sum_of_gradients(tiny_models: TinyModel, tiny_tokenizer):
    model = reference.double_copy(tiny_models("llama-tied"))
    names = matrix_parameters(tiny_models("llama-tied"))
    token_ids, every = tokens(tiny_tokenizer)
    first, rest = every & (torch.arange(len(every)) < 3), every & (torch.arange(len(every)) >= 3)
    whole, one, two = (reference.loss_gradients(model, token_ids, mask, names) for mask in (every, first, rest))
    for name in names:
        torch.testing.assert_close(whole[name], one[name] + two[name])


# ---- V -------------------------------------------------------------------------------------------------------


def test_second_moments_equal_numbers_computed_by_hand():
    # r = (1, 3), c = (2, 2): V = r cᵀ / mean(r) = [[2, 2], [6, 6]] / 2.
    r, c = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])
    expected = torch.tensor([[1.0, 1.0], [3.0, 3.0]], dtype=torch.float64)
    assert torch.equal(reference.adafactor_second_moment(r, c), expected)
    assert torch.equal(reference.torch_adafactor_second_moment(r[:, None], c[None], epsilon1=1e-8), expected)
    # mean(r) = 2 is below ε₁ = 4: V = [[2, 2], [6, 6]] / 4, then raised to ε₁² = 16.
    raised = reference.torch_adafactor_second_moment(r[:, None], c[None], epsilon1=4.0)
    assert torch.equal(raised, torch.full((2, 2), 16.0, dtype=torch.float64))
    # Two steps with g = 1 and β₂ = 0.9: v = 0.9·0.1 + 0.1 = 0.19 and v̂ = 0.19 / (1 - 0.81) = 1.
    assert float(reference.adam_second_moment(torch.tensor([0.19]), 2, 0.9)) == pytest.approx(1.0)


def test_estimated_second_moment_is_the_mean_square():
    found = reference.mean_squared_gradient([torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0]])])
    assert torch.equal(found, torch.tensor([[5.0, 2.0]]))


@hypothesis.given(seed=st.integers(0, 1000), rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_factoring_keeps_row_and_column_means_and_rank_one_exactly(seed: int, rows: int, columns: int):
    V = normal(rows, columns, seed=seed) ** 2
    factored = reference.factored_second_moment(V)
    torch.testing.assert_close(factored.mean(dim=0), V.mean(dim=0))
    torch.testing.assert_close(factored.mean(dim=1), V.mean(dim=1))
    torch.testing.assert_close(reference.factored_second_moment(factored), factored)


def test_corrected_gradient_divides_by_the_root_of_the_floored_second_moment():
    gradient = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    V = torch.tensor([[4.0, 1e-12]])
    assert torch.equal(reference.corrected_gradient(gradient, V, floor=0.25), torch.tensor([[1.0, 6.0]]).double())
    assert reference.corrected_gradient(gradient, None) is gradient


# ---- P -------------------------------------------------------------------------------------------------------


@hypothesis.given(seed=st.integers(0, 1000), rows=st.integers(1, 7), columns=st.integers(1, 7), side=st.integers(1, 5))
def test_kronecker_projection_is_two_sided(seed: int, rows: int, columns: int, side: int):
    left, right = normal(side, rows, seed=seed), normal(side, columns, seed=seed + 1)
    gradient = normal(rows, columns, seed=seed + 2)
    torch.testing.assert_close(
        reference.project(gradient, left, right).reshape(side, side),
        torch.einsum("ai,ij,bj->ab", left, gradient, right),
    )


@hypothesis.given(
    seed=st.integers(0, 1000),
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    side=st.integers(1, 4),
)
def test_projecting_the_block_diagonal_equals_summing(seed: int, shapes: list[tuple[int, int]], side: int):
    draw = generator(seed)
    gradients = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    lefts = [reference.gaussian_projection(side, rows, draw) for rows, _ in shapes]
    rights = [reference.gaussian_projection(side, columns, draw) for _, columns in shapes]
    torch.testing.assert_close(
        reference.projected_block_diagonal(gradients, lefts, rights),
        reference.projected_gradient(gradients, lefts, rights),
    )


def test_projected_inner_products_are_unbiased_for_the_sum_over_matrices():
    shapes, side, seeds = [(3, 7), (11, 2), (5, 5)], 4, 3000
    one, two = ([normal(*shape, seed=10 * i + which) for i, shape in enumerate(shapes)] for which in (0, 1))
    two = [a + b for a, b in zip(one, two, strict=True)]  # correlated, so that the inner product is not near zero
    expected = sum(float((a * b).sum()) for a, b in zip(one, two, strict=True))
    draw = generator()
    found = []
    for _ in range(seeds):
        lefts = [reference.gaussian_projection(side, rows, draw) for rows, _ in shapes]
        rights = [reference.gaussian_projection(side, columns, draw) for _, columns in shapes]
        phi = reference.projected_block_diagonal(one, lefts, rights)
        found.append(float(phi @ reference.projected_block_diagonal(two, lefts, rights)))
    standard_error = float(np.std(found)) / math.sqrt(seeds)
    assert standard_error < 0.05 * expected
    assert np.mean(found) == pytest.approx(expected, abs=4 * standard_error)


# ---- R -------------------------------------------------------------------------------------------------------


def test_autocorrelation_and_mixing_equal_numbers_computed_by_hand():
    R = reference.autocorrelation(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    assert torch.equal(R, torch.tensor([[5.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    assert torch.equal(reference.mix(R, torch.zeros(2, 2), 0.25), R / 4)


def test_mixing_rank_scales_the_papers_thousand():
    assert [reference.mixing_rank(d) for d in (65536, 131072, 16384, 4096, 32, 1)] == [1000, 2000, 250, 62, 1, 1]


def test_paper_mixing_equals_a_number_computed_by_hand():
    # 128 dimensions: k = round(1000 · 128 / 65,536) = 2. Pooled, s_eval is 9, 6, ... and s_train 8, 2, ...;
    # so λ 6 = (1 - λ) 2.
    def blocks(first: list[float], second: list[float]) -> list[Tensor]:
        return [torch.diag(torch.tensor(values + [0.1] * (64 - len(values)))) for values in (first, second)]

    found = reference.paper_mixing(blocks([9.0], [6.0, 5.0]), blocks([8.0, 2.0], [1.0]))
    assert found == pytest.approx(0.25)


@hypothesis.given(seed=st.integers(0, 1000), scale=st.floats(0.01, 100))
def test_paper_mixing_equates_the_weighted_spectra_whatever_their_scales(seed: int, scale: float):
    evaluation, training = ([positive_definite(33, seed=seed + i) for i in pair] for pair in ((0, 1), (2, 3)))
    scaled = [scale * block for block in evaluation]
    mixing = reference.paper_mixing(scaled, training)
    k = reference.mixing_rank(66) - 1
    left = reference.pooled_singular_values([mixing * block for block in scaled])[k]
    right = reference.pooled_singular_values([(1 - mixing) * block for block in training])[k]
    torch.testing.assert_close(left, right)


@hypothesis.given(seed=st.integers(0, 1000), dim=st.integers(1, 12), damping=st.sampled_from([0.0, 0.1, 2.0]))
def test_whitening_is_the_symmetric_inverse_root_of_the_damped_autocorrelation(seed: int, dim: int, damping: float):
    R = positive_definite(dim, seed=seed)
    W = reference.whitening(R, damping=damping)
    damped = R + damping * R.trace() / dim * torch.eye(dim)
    torch.testing.assert_close(W, W.T)
    torch.testing.assert_close(W @ damped @ W, torch.eye(dim, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_singular_autocorrelation_cannot_be_whitened_undamped():
    R = torch.diag(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="not positive"):
        reference.whitening(R)
    torch.testing.assert_close(
        reference.whitening(R, damping=1.0), torch.diag(torch.tensor([1.5, 0.5]).double() ** -0.5)
    )


def test_whitened_examples_have_unit_autocorrelation():
    phi = normal(50, 6)
    whitened = reference.whitened({"a": phi}, {"a": reference.whitening(reference.autocorrelation(phi))})
    torch.testing.assert_close(reference.autocorrelation(whitened), torch.eye(6, dtype=torch.float64))


# ---- Influence -----------------------------------------------------------------------------------------------


def example_phi(rows: int, seed: int) -> dict[str, Tensor]:
    return {"attention.0-1": normal(rows, 4, seed=seed), "mlp.0-1": normal(rows, 9, seed=seed + 100)}


def example_whitenings() -> dict[str, Tensor]:
    return {
        "attention.0-1": reference.whitening(positive_definite(4)),
        "mlp.0-1": reference.whitening(positive_definite(9)),
    }


def test_influence_equals_a_number_computed_by_hand():
    # Blocks (1, 0) and (2) against (0, 1) and (3), R^(-1/2) = (2 I, I): (2, 0, 2)·(0, 2, 3) / (√8 √13).
    one = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[2.0]])}
    two = {"a": torch.tensor([[0.0, 1.0]]), "b": torch.tensor([[3.0]])}
    W = {"a": 2 * torch.eye(2, dtype=torch.float64), "b": torch.eye(1, dtype=torch.float64)}
    assert float(reference.influences(one, two, W)) == pytest.approx(6 / math.sqrt(8 * 13))
    assert float(reference.influences(one, two, W, unit_norm=False)) == pytest.approx(6)
    assert float(reference.influences(one, two)) == pytest.approx(6 / math.sqrt(5 * 10))


def test_self_influence_is_one():
    phi = example_phi(5, seed=3)
    scores = reference.influences(phi, phi, example_whitenings())
    torch.testing.assert_close(scores.diagonal(), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(scores, scores.T)
    assert float(scores.abs().max()) <= 1 + 1e-12


def test_influence_does_not_depend_on_the_scale_of_a_loss():
    queries, candidates, W = example_phi(3, 0), example_phi(4, 50), example_whitenings()
    scaled = {name: phi * torch.tensor([[0.01], [7.0], [300.0]]) for name, phi in queries.items()}
    torch.testing.assert_close(
        reference.influences(scaled, candidates, W), reference.influences(queries, candidates, W)
    )


def test_influence_does_not_depend_on_the_scale_of_the_autocorrelation():
    queries, candidates, W = example_phi(3, 0), example_phi(4, 50), example_whitenings()
    scaled = {name: 5 * block for name, block in W.items()}
    torch.testing.assert_close(
        reference.influences(queries, candidates, scaled), reference.influences(queries, candidates, W)
    )


@hypothesis.given(scores=st.lists(st.integers(-3, 3), min_size=1, max_size=8), k=st.integers(1, 9))
def test_opponents_are_the_proponents_of_the_negated_scores(scores: list[int], k: int):
    proponents, opponents = reference.top_proponents(scores, k), reference.top_opponents(scores, k)
    assert opponents == reference.top_proponents([-score for score in scores], k)
    left_out = [scores[m] for m in range(len(scores)) if m not in proponents]
    assert len(proponents) == min(k, len(scores))
    assert all(scores[m] >= other for m in proponents for other in left_out)


def test_ties_are_ranked_by_index():
    assert reference.top_proponents([1.0, 2.0, 2.0, -1.0], 3) == [1, 2, 0]
    assert reference.top_opponents([1.0, -2.0, -2.0, 5.0], 3) == [1, 2, 0]


def test_metrics_equal_numbers_computed_by_hand():
    # First relevant ranks: 1, 3, none.
    rankings, relevant = [[4, 1, 2], [0, 1, 2], [0, 1, 2]], [{4, 2}, {2}, {9}]
    assert reference.mean_reciprocal_rank(rankings, relevant) == pytest.approx((1 + 1 / 3) / 3)
    assert reference.recall_at(1, rankings, relevant) == pytest.approx(1 / 3)
    assert reference.recall_at(3, rankings, relevant) == pytest.approx(2 / 3)
