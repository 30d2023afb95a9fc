"""Descent over matrices with orthonormal columns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from homodistil.pruning.compensation.learned_basis import OrthonormalAdam, orthonormal, tangent_part


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("rows", "columns"), [(7, 3), (11, 10), (5, 5), (6, 1)])
def test_the_tangent_part_is_the_nearest_direction_that_keeps_columns_orthonormal(rows, columns):
    point, gradient = torch.linalg.qr(random(rows, columns)).Q, random(rows, columns, seed=1)
    # All tangents: those matrices T for which P'T + T'P = 0, as the null space of this linear map.
    constraint = torch.stack(
        [
            (point.T @ one + one.T @ point).flatten()
            for one in torch.eye(rows * columns).double().view(-1, rows, columns)
        ],
        1,
    )
    _, values, vectors = torch.linalg.svd(constraint)
    tangents = vectors[int((values > 1e-10).sum()) :]
    expected = (tangents.T @ (tangents @ gradient.flatten())).view(rows, columns)
    torch.testing.assert_close(tangent_part(point, gradient), expected, rtol=0, atol=1e-12)


def test_orthonormal_columns_stay_where_they_are():
    basis = torch.linalg.qr(random(9, 4)).Q * torch.tensor([1, -1, -1, 1])
    torch.testing.assert_close(orthonormal(basis), basis, rtol=0, atol=1e-14)
    near = orthonormal(basis + 1e-3 * random(9, 4, seed=1))
    torch.testing.assert_close(near.T @ near, torch.eye(4).double(), rtol=0, atol=1e-14)
    assert (near - basis).abs().max() < 0.01


@pytest.mark.parametrize(("rows", "columns"), [(7, 3), (60, 31)])
def test_a_rate_is_an_angle_whatever_the_size(rows, columns):
    start = torch.linalg.qr(random(rows, columns)).Q
    descent = OrthonormalAdam(start)
    descent.step(1e4 * random(rows, columns, seed=1), 1e-3)
    cosines = (descent.point * start).sum(0).clamp(max=1)
    mean_square = cosines.arccos().square().mean()
    assert math.sqrt(mean_square) == pytest.approx(1e-3, rel=0.05)


def test_it_finds_the_leading_directions():
    """The trace of P'AP is largest, over orthonormal P, on the eigenvectors of the largest eigenvalues."""
    half = random(13, 13)
    matrix = half @ half.T
    descent = OrthonormalAdam(torch.linalg.qr(random(13, 4, seed=1)).Q)
    for step in range(400):
        descent.step(-2 * matrix @ descent.point, 0.1 * (1 - step / 400))
        point = descent.point
        torch.testing.assert_close(point.T @ point, torch.eye(4).double(), rtol=0, atol=1e-12)
    best = torch.linalg.eigh(matrix).eigenvectors[:, -4:]
    torch.testing.assert_close(point @ point.T, best @ best.T, rtol=0, atol=1e-3)
