"""The residual stream's projection, trained against what the cut network computes (basis_distance.py).

Descent over matrices with orthonormal columns (the Stiefel manifold): a gradient is projected to the tangent space, and
a QR decomposition brings each step back. Source: Absil, Mahony and Sepulchre 2008, Optimization Algorithms on Matrix
Manifolds, examples 3.6.2 and 4.1.3; moments as in Becigneul and Ganea 2019 (Riemannian adaptive optimisation, arXiv
1810.00760), with the whole matrix as one variable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from homodistil.distributed import ranks, watchdog
from homodistil.pruning.compensation.basis_distance import BasisDistance
from homodistil.pruning.compensation.moments import TINY

_BETAS = 0.9, 0.99


class OrthonormalAdam:
    """Adam for one matrix with orthonormal columns.

    The second moment is one number, the mean square of the columns' gradients: one for each entry would turn the step
    out of the tangent space and depend on the coordinates. So a rate is an angle, whatever the size of the matrix.

    Args:
        start: (K, M), M <= K, orthonormal columns.
    """

    def __init__(self, start: Tensor) -> None:
        self.point = start
        self._momentum, self._square, self._steps = torch.zeros_like(start), start.new_zeros(()), 0

    def step(self, gradient: Tensor, rate: float) -> None:
        """Move `point` against `gradient` (of its shape)."""
        self._steps += 1
        tangent, (of_mean, of_square) = tangent_part(self.point, gradient), _BETAS
        self._momentum = of_mean * tangent_part(self.point, self._momentum) + (1 - of_mean) * tangent
        self._square = of_square * self._square + (1 - of_square) * tangent.square().sum(0).mean()
        mean = self._momentum / (1 - of_mean**self._steps)
        size = (self._square / (1 - of_square**self._steps)).sqrt().clamp(min=TINY)
        self.point = orthonormal(self.point - rate / size * mean)


def tangent_part(point: Tensor, gradient: Tensor) -> Tensor:
    """G - P (P'G + G'P) / 2: what changes P without taking its columns' orthonormality to first order."""
    product = point.T @ gradient
    return gradient - point @ (product + product.T) / 2


def orthonormal(matrix: Tensor) -> Tensor:
    """Q of the QR decomposition whose R has a positive diagonal: near orthonormal columns they stay where they are."""
    basis, triangle = torch.linalg.qr(matrix)
    return basis * triangle.diagonal().sign()


def train_basis(distance: BasisDistance, start: Tensor, fixed: Tensor, steps: int, rate: float) -> Tensor:
    """P after training, fp64 (D, d), the same bits on every rank. Every rank calls it.

    Args:
        start: P to begin with, fp64: unit vectors of `fixed`, then orthonormal columns without a part in these dims.
        fixed: int64, dims that stay coordinate axes.
        rate: of the first step (radians); it falls linearly to 0.
    """
    rest = torch.ones(len(start), dtype=torch.bool, device=start.device)
    rest[fixed] = False
    rows = rest.nonzero().squeeze(1)

    def whole(free: Tensor) -> Tensor:
        return start.index_copy(0, rows, functional.pad(free, (len(fixed), 0)))

    descent = OrthonormalAdam(start[rows, len(fixed) :])
    for step in watchdog.each("training a basis", range(steps)):
        gradient = _gradient(lambda free, step=step: distance.of(step, whole(free)), descent.point)
        descent.step(gradient, rate * (1 - step / steps))
    return ranks.from_first(whole(descent.point))


def _gradient(distance: Callable[[Tensor], tuple[Tensor, int]], point: Tensor) -> Tensor:
    """Of the mean over the rows of all ranks, where `distance` has (sum, number) of this one's; in one exchange."""
    point = point.clone().requires_grad_()
    with torch.enable_grad():
        total, num_rows = distance(point)
        (gradient,) = torch.autograd.grad(total, point)
    sums = ranks.total(torch.cat([gradient.flatten(), gradient.new_tensor([num_rows])]))
    return (sums[:-1] / sums[-1].clamp(min=1)).view_as(point)
