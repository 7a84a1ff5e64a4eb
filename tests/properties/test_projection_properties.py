"""Projections are unbiased, independent, the same on all machines, and of equal weight for every shape.

Another implementation once scaled its projections by the matrix's shape. Its tests compared the code
with its own matrices, and passed. Here projected inner products are compared with those of the
*unprojected* gradients.
"""

import math
from typing import Literal

import numpy as np
import pytest
import torch

from comparisons import language_model, random_examples, reference_gradients
from trackstar.errors import OptionError
from trackstar.gradients.dense_projection import FlattenedGradients, check_flattened_size
from trackstar.gradients.per_example import gradient_pass
from trackstar.gradients.projection import projections, random_projection
from trackstar.gradients.second_moment import NO_SECOND_MOMENT, ElementwiseMoment, FactoredMoment, SecondMoment
from trackstar.model.batching import make_batch
from trackstar.model.layer_blocks import WeightMatrix

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
    # In expectation over seeds, a block's projected inner product is the sum of its matrices'
    # unprojected ones. The block pools one layer or three, of shapes 24×24, 12×24, 40×24 and 24×40,
    # some of which read the same input.
    model, examples = language_model("llama", layer_blocks=layer_blocks), random_examples([12, 9])
    examples[1].token_ids[3:] = examples[0].token_ids[6:]  # so that the two gradients are correlated
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


@pytest.mark.parametrize("kind", ["none", "factored", "elementwise"])
def test_flattened_gradients_are_the_dense_projection_of_the_oracles_corrected_gradients(
    kind: Literal["none", "factored", "elementwise"],
):
    model, examples = language_model("llama", layer_blocks=2), random_examples([9, 12, 5])
    gradients = reference_gradients(model, examples)
    generator = torch.Generator().manual_seed(0)
    moments, dense = {}, {}
    for one in model.matrices:
        row, column = (torch.rand(n, generator=generator) + 0.1 for n in (one.rows, one.columns))
        entries = torch.rand(one.rows, one.columns, generator=generator) + 0.1
        moments[one.name] = (
            FactoredMoment(row=row, column=column) if kind == "factored" else ElementwiseMoment(entries=entries)
        )
        dense[one.name] = torch.outer(row, column) / row.mean() if kind == "factored" else entries
    v = NO_SECOND_MOMENT if kind == "none" else SecondMoment(kind=kind, moments=moments, source="drawn", floor=0.0)
    consumer = FlattenedGradients(model, v, seed=7, side=3)
    with gradient_pass(model, consumer) as run:
        run(make_batch(examples, [0, 1, 2]))
    for place, found in enumerate(consumer.result().double()):
        expected = []
        for block in model.blocks:
            phi = torch.zeros(9, dtype=torch.float64)
            for one in block.matrices:
                p = random_projection(7, f"{one.name} flattened", one.rows * one.columns, 9).double().T
                g = gradients[place][one.name]
                phi += p @ (g if kind == "none" else g / dense[one.name].double().sqrt()).flatten()
            expected.append(phi)
        exact = torch.cat(expected)
        # An entry sums thousands of products in float32: its error is relative to the vector.
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


def test_flattened_projection_too_large_for_memory_is_refused_before_it_is_drawn():
    with pytest.raises(OptionError, match=r"1,000,000 parameters by 4,096 dimensions need 15.3 GiB, expected at most"):
        check_flattened_size([matrix(1000, 1000)], 64)
    check_flattened_size([matrix(1000, 1000)], 16)


def test_projections_follow_from_seed_and_name_alone():
    torch.manual_seed(1)
    before = projections(matrix(5, 7), seed=3, side=4)
    torch.manual_seed(2)
    torch.randn(10)
    np.random.default_rng(0).normal()
    after = projections(matrix(5, 7), seed=3, side=4)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert [half.shape for half in before] == [(4, 5), (4, 7)]
    # Pinned, because an index made on one machine is queried on others and by later versions.
    pinned = torch.tensor([[1.642453, -0.3429157, 0.4010029], [-0.6479173, -0.664452, -0.311699]])
    torch.testing.assert_close(random_projection(0, "model.layers.0.mlp.up_proj left", 2, 3), pinned, rtol=1e-6, atol=0)
