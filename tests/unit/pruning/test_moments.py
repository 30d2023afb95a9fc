"""Sums of products against fp64 ones: odd shapes, weights, batches of matrices, and rows far from 0."""

import pytest
import torch

from homodistil.pruning.compensation.moments import Moments, moments_of, sums_of_products


def reference(left, right, weights=None):
    left, right = (torch.cat([rows.double(), torch.ones_like(rows[..., :1].double())], -1) for rows in (left, right))
    if weights is not None:
        left, right = left * weights.double(), right * weights.double()
    return left.transpose(-1, -2) @ right


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 2), (7, 1, 5), (61, 5, 9), (2, 13, 4, 3)])
def test_like_products_in_double_precision(shape, weighted):
    generator = torch.Generator().manual_seed(len(shape))
    *batch, rows, inputs, targets = shape
    left = torch.randn(*batch, rows, inputs, generator=generator) * 3 + 2
    right = torch.randn(*batch, rows, targets, generator=generator) - 5
    weights = torch.rand(*batch, rows, 1, generator=generator) if weighted else None
    # fp32 rounds by 6e-8; the sums are of some dozen products below 100.
    torch.testing.assert_close(
        sums_of_products(left, right, weights), reference(left, right, weights), rtol=1e-5, atol=1e-4
    )
    exact = sums_of_products(left.double(), right.double(), weights)
    torch.testing.assert_close(exact, reference(left, right, weights), rtol=1e-12, atol=1e-12)


def test_spread_of_rows_far_from_zero_is_kept():
    """Products of what has not been centred lose it: 1,000 squared has no digits left for a variance of 1."""
    rows = 1000 + torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    covariance = Moments(moments_of(rows)).covariance
    torch.testing.assert_close(covariance, torch.cov(rows.double().T, correction=0), rtol=1e-4, atol=1e-5)
    plain = torch.cat([rows, torch.ones(400, 1)], 1)
    assert (Moments((plain.T @ plain).double()).covariance - covariance).abs().max() > 1e-2


def test_no_rows_and_rows_of_no_weight():
    empty = Moments(moments_of(torch.empty(0, 3)))
    assert torch.equal(empty.mean, torch.zeros(3, dtype=torch.float64))
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sums_of_products(rows, rows, torch.zeros(5, 1)), torch.zeros(4, 4, dtype=torch.float64))
