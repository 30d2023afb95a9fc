"""Sums of products of rows, and the moments that they are: what every fit and every choice of a basis is made of.

Products are the larger part of an event's work, so they are made in the precision of the rows, fp32; what is
added up over micro-batches and ranks is fp64. The rows are centred first, by their own mean, so that what fp32 rounds
off is a part of their spread, however far from 0 they lie.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-30
"""Keeps quotients of sums that are all zero (a dead layer, no rows) finite."""


class Moments(NamedTuple):
    """Moments of rows with a one appended: sums of products, fp64, (..., K + 1, K + 1)."""

    sums: Tensor

    @property
    def mean(self) -> Tensor:
        return self.sums[..., -1, :-1] / self._count

    @property
    def second(self) -> Tensor:
        """E[x x'], (..., K, K)."""
        return self.sums[..., :-1, :-1] / self._count.unsqueeze(-1)

    @property
    def covariance(self) -> Tensor:
        return self.second - self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)

    @property
    def _count(self) -> Tensor:
        return self.sums[..., -1, -1:].clamp(min=TINY)


def sums_of_products(left: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums over rows of w^2 [x 1]' [y 1], fp64, (..., K + 1, M + 1).

    With a and b near the means of x and y (any a and b give the same sums):
    sum w^2 x y' = sum w^2 (x - a)(y - b)' + a (sum w^2 y)' + (sum w^2 x) b' - a b' sum w^2.

    Args:
        left: x, (..., rows, K), fp32 or fp64, in which its products are made (on a GPU without TF32, torch's default).
        right: y, (..., rows, M), of the same dtype.
        weights: w, (..., rows, 1); None: all 1.
    """
    x, y = (_Centred.of(rows, weights) for rows in (left, right))
    products = (x.rows.transpose(-1, -2) @ y.rows).double()
    products += _outer(x.shift, y.sums) + _outer(x.sums, y.shift) - _outer(x.shift, y.shift) * x.count
    rest = torch.cat([y.sums.unsqueeze(-2), x.count.expand(*y.sums.shape[:-1], 1, 1)], -1)
    return torch.cat([torch.cat([products, x.sums.unsqueeze(-1)], -1), rest], -2)


class _Centred(NamedTuple):
    rows: Tensor
    """w (x - shift), (..., rows, K)."""
    shift: Tensor
    """(..., K), fp64, of values that are exact in the dtype of the rows."""
    sums: Tensor
    """sum w^2 x, (..., K), fp64."""
    count: Tensor
    """sum w^2, fp64, (..., 1, 1); without weights (1, 1)."""

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor | None) -> _Centred:
        if weights is None:
            count = rows.new_tensor([[rows.shape[-2]]], dtype=torch.float64)
            sums = rows.sum(-2, dtype=torch.float64)
        else:
            weights = weights.to(rows.dtype)
            squares = weights.double().square()
            count, sums = squares.sum(-2, keepdim=True), (rows * squares).sum(-2)
        shift = (sums / count.squeeze(-1).clamp(min=TINY)).to(rows.dtype)
        centred = rows - shift.unsqueeze(-2)
        return cls(centred if weights is None else centred * weights, shift.double(), sums, count)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def moments_of(rows: Tensor) -> Tensor:
    """`Moments.sums` of rows (..., rows, K)."""
    return sums_of_products(rows, rows)
