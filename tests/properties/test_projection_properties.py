"""What the projections must do whatever the matrices: unbiased, independent, the same everywhere, weightless in shape.

A peer's projections were once scaled by the matrix's shape, and its tests, which compared the code with its own
matrices, let it pass. Here projected inner products are compared with those of the *unprojected* gradients.
"""

import math

import numpy as np
import pytest
import torch

from comparisons import language_model, random_examples, reference_gradients
from trackstar.layer_blocks import WeightMatrix
from trackstar.projection import projections, random_projection

SHAPES = [(8, 8), (3, 200), (200, 3), (64, 24), (1, 5), (72, 24)]


def matrix(rows: int, columns: int, name: str = "model.layers.0.mlp.up_proj") -> WeightMatrix:
    return WeightMatrix(name=name, layer=0, kind="mlp", block=0, rows=rows, columns=columns, transposed=False)


def unit_normal(*shape: int, seed: int) -> torch.Tensor:
    """A random matrix of Frobenius norm 1."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values / values.norm()


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values) / math.sqrt(len(values)))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_projected_inner_products_are_unbiased_for_unprojected_ones_whatever_the_shape(rows: int, columns: int):
    one = unit_normal(rows, columns, seed=0)
    two = (one + unit_normal(rows, columns, seed=1)) / 2
    products, squares = [], []
    for seed in range(1500):
        left, right = projections(matrix(rows, columns), seed=seed, side=8)
        projected = left @ one @ right.T
        products.append(float((projected * (left @ two @ right.T)).sum()))
        squares.append(float(projected.square().sum()))
    for found, expected in ((products, float((one * two).sum())), (squares, 1.0)):
        mean, error = mean_and_error(found)
        assert error < 0.03
        assert mean == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("layer_blocks", [1, 3])
def test_a_matrixs_weight_does_not_depend_on_how_many_matrices_share_its_block(layer_blocks: int):
    # Over seeds, a block's projected inner product is the plain sum of its matrices' unprojected ones, whether it
    # pools one layer or three, of shapes 24×24, 12×24, 40×24 and 24×40, some of them reading the same input.
    model, examples = language_model("llama", layer_blocks=layer_blocks), random_examples([12, 9])
    examples[1].token_ids[3:] = examples[0].token_ids[6:]  # so that the two gradients have something in common
    one, two = reference_gradients(model, examples)
    for block in model.blocks:
        names = [matrix.name for matrix in block.matrices]
        squares, products = [], []
        for seed in range(200):
            phi = torch.zeros(2, 8, 8, dtype=torch.float64)
            for matrix in block.matrices:
                left, right = (half.double() for half in projections(matrix, seed=seed, side=8))
                phi += torch.stack([left @ of[matrix.name] @ right.T for of in (one, two)])
            squares.append(float((phi[0] * phi[0]).sum()))
            products.append(float((phi[0] * phi[1]).sum()))
        square = sum(float((one[name] * one[name]).sum()) for name in names)
        product = sum(float((one[name] * two[name]).sum()) for name in names)
        for found, expected in ((squares, square), (products, product)):
            mean, error = mean_and_error(found)
            assert error < 0.08 * square
            assert mean == pytest.approx(expected, abs=4 * error), block.name


def test_entries_are_normal_with_the_side_as_inverse_variance():
    entries = random_projection(0, "any", 2000, 16).double() * math.sqrt(16)
    count = entries.numel()
    assert float(entries.mean()) == pytest.approx(0, abs=4 / math.sqrt(count))
    assert float(entries.square().mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / count))
    assert float((entries**4).mean()) == pytest.approx(3, abs=4 * math.sqrt(96 / count))


def test_projections_of_different_matrices_sides_and_seeds_are_independent():
    drawn = [
        random_projection(seed, f"{name} {half}", 4000, 4).flatten()
        for seed in (0, 1)
        for name in ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj", "model.layers.1.mlp.up_proj")
        for half in ("left", "right")
    ]
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert float(correlations.abs().max()) < 5 / math.sqrt(16_000)


def test_projections_follow_from_seed_and_name_alone():
    torch.manual_seed(1)
    before = projections(matrix(5, 7), seed=3, side=4)
    torch.manual_seed(2)
    torch.randn(10)
    np.random.default_rng(0).normal()
    after = projections(matrix(5, 7), seed=3, side=4)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert [half.shape for half in before] == [(4, 5), (4, 7)]
    # Pinned: an index made on one machine is asked on another, and by later versions.
    pinned = torch.tensor([[1.642453, -0.6479173, -0.3429157]])
    torch.testing.assert_close(random_projection(0, "model.layers.0.mlp.up_proj left", 1, 3), pinned, rtol=1e-6, atol=0)
