"""Ridge regression, solved in fp64, from sums over all ranks' rows: linears and norms, drawn to what they are already.

Every rank calls these functions with its own rows; all end with the same bits.
Source: compensation study, section 4 (sequential refit).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from homodistil.distributed import ranks
from homodistil.models.linears import matrix_of
from homodistil.models.norms import Norm
from homodistil.pruning.compensation.moments import TINY, sums_of_products


class Rows(NamedTuple):
    """This rank's rows of one micro-batch."""

    inputs: Tensor
    """(rows, K)."""
    targets: Tensor
    """(rows, M)."""
    weights: Tensor | None = None
    """(rows, 1): what a row's error is multiplied with; None: all count alike."""


@torch.no_grad()
def fit_linear(linears: Sequence[nn.Module], rows: Iterable[Rows], ridge: float) -> None:
    """Fit weights, and biases where there are, of `linears`, which share their inputs, to the targets (in place).

    With X and Y centred, where there are biases, and R = Y - X W0^T:
    W = W0 + ((X'X + p I)^-1 X'R)^T = ((X'X + p I)^-1 (X'Y + p W0^T))^T for p = ridge mean(diag X'X). What the inputs
    say nothing about (a dead neuron, fewer rows than inputs) stays as in W0.

    Args:
        linears: the targets are those of the first, then those of the second, ...; all have a bias or none.
        ridge: as a share of the mean variance of the inputs.
    """
    weight = torch.cat([matrix_of(linear) for linear in linears]).double()
    num_inputs = weight.shape[1]
    sums = sum_over_rows(_products(part) for part in rows)
    means = sums[-1] / sums[-1, -1].clamp(min=TINY)
    if linears[0].bias is None:
        means = torch.zeros_like(means)
    mean_x, mean_y = means[:num_inputs], means[num_inputs:-1]
    covariance = sums[:-1, :-1] / sums[-1, -1].clamp(min=TINY) - torch.outer(mean_x, means[:-1])
    among_inputs, with_targets = covariance[:, :num_inputs], covariance[:, num_inputs:]
    penalty = (ridge * among_inputs.diagonal().mean()).clamp(min=TINY)
    regular = among_inputs + penalty * torch.eye(num_inputs, dtype=weight.dtype, device=weight.device)
    weight = torch.linalg.solve(regular, with_targets + penalty * weight.T).T
    _write_linears(linears, weight, mean_y - weight @ mean_x)


def _products(rows: Rows) -> Tensor:
    """Sums over rows of w^2 [X 1]' [X Y 1], fp64, (K + 1, K + M + 1)."""
    inputs, targets = rows.inputs, rows.targets.to(rows.inputs.dtype)
    return sums_of_products(inputs, torch.cat([inputs, targets], 1), rows.weights)


def _write_linears(linears: Sequence[nn.Module], weight: Tensor, bias: Tensor) -> None:
    """Write (outputs of all, inputs) and (outputs of all,) into `linears`: rank 0's values on every rank."""
    weight, bias = ranks.from_first(weight.contiguous()), ranks.from_first(bias.contiguous())
    sizes = [len(matrix_of(linear)) for linear in linears]
    for linear, matrix, offsets in zip(linears, weight.split(sizes), bias.split(sizes), strict=True):
        matrix_of(linear).copy_(matrix)
        if linear.bias is not None:
            linear.bias.copy_(offsets)


@torch.no_grad()
def fit_norm(norm: Norm, rows: Iterable[Rows], ridge: float) -> None:
    """Fit gain, and shift where it has one, of `norm`, one dim at a time, so that it puts out the targets (in place).

    Inputs are those of the norm; each dim is a ridge regression of the target on the standardised input, drawn to the
    present gain.
    """
    gain = norm.gain
    sums = sum_over_rows(_norm_sums(norm.standardise(part.inputs), part) for part in rows)
    mean_z, mean_y, square_z, product = sums[:-1] / sums[-1].clamp(min=TINY)
    if norm.shift is None:
        mean_z, mean_y = torch.zeros_like(mean_z), torch.zeros_like(mean_y)
    variance, covariance = square_z - mean_z.square(), product - mean_z * mean_y
    penalty = (ridge * variance.mean()).clamp(min=TINY)
    gain = gain + (covariance - variance * gain) / (variance.clamp(min=0) + penalty)
    norm.write(ranks.from_first(gain), ranks.from_first(mean_y - gain * mean_z))


def _norm_sums(z: Tensor, rows: Rows) -> Tensor:
    """(5, D): sums over rows of z, y, z z, z y and 1."""
    y, ones = rows.targets.double(), torch.ones_like(z)
    if rows.weights is not None:
        z, y, ones = (part * rows.weights for part in (z, y, ones))
    return torch.stack([(z * ones).sum(0), (y * ones).sum(0), z.square().sum(0), (z * y).sum(0), ones.square().sum(0)])


def sum_over_rows(sums: Iterable[Tensor]) -> Tensor:
    """Sum of equal-shaped tensors (one at least), and over ranks."""
    total = None
    for part in sums:
        total = part if total is None else total.add_(part)
    return ranks.total(total)
