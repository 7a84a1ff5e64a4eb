"""The random rotation of signs and fast transforms: orthogonal, a function of its seed, and spreading."""

import pytest
import torch

from trackstar.curvature.rotation import Rotation

# Powers of two, products with odd squares as sides give them, and odd numbers.
DIMENSIONS = [1, 2, 9, 25, 64, 196, 576, 1600, 4096]


@pytest.mark.parametrize("dim", DIMENSIONS)
def test_rotation_is_orthogonal_and_its_transpose_is_its_inverse(dim: int):
    rotation = Rotation(dim=dim, seed=3)
    rows = torch.eye(dim, dtype=torch.float64)[: min(dim, 300)]
    turned = rotation.apply(rows)
    torch.testing.assert_close(turned @ turned.T, torch.eye(len(rows), dtype=torch.float64))
    torch.testing.assert_close(rotation.apply_transposed(turned), rows)


def test_rows_are_rotated_alike_however_they_are_batched():
    rotation, rows = Rotation(dim=4096, seed=0), torch.randn(70, 4096, generator=torch.Generator().manual_seed(0))
    together = rotation.apply(rows)
    alone = torch.cat([rotation.apply(part) for part in rows.split(1)])
    torch.testing.assert_close(together, alone)
    assert not rotation.apply(rows[:0]).numel()


def test_seeds_give_different_rotations_and_one_seed_gives_one():
    rows = torch.eye(64)
    first, again, other = (Rotation(dim=64, seed=seed).apply(rows) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert float((first * other).sum(dim=1).abs().mean()) < 0.3


@pytest.mark.parametrize("dim", [256, 576, 4096])
def test_pointed_rows_become_as_flat_as_normal_numbers(dim: int):
    """Of a uniform rotation a unit vector's entries have a kurtosis near 3, and the largest is near √(2 ln d / d)."""
    for row in (0, dim // 3, dim - 1):
        turned = Rotation(dim=dim, seed=7).apply(torch.eye(dim, dtype=torch.float64)[row : row + 1])[0] * dim**0.5
        assert 2.3 < float((turned**4).mean()) < 3.9
        assert float(turned.abs().max()) < 5
