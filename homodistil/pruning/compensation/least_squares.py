"""Ridge regression in fp64 from sums over all ranks' rows: linears and LayerNorms, drawn to what they are already.

Every rank calls these functions with its own rows; all end with the same bits.
Source: compensation study, section 4 (sequential refit).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from homodistil.distributed import ranks

Pairs = Iterable[tuple[Tensor, Tensor]]
"""This rank's (inputs (rows, K), targets (rows, M)), one pair a micro-batch."""

TINY = 1e-30
"""Keeps quotients of sums that are all zero (a dead layer, no rows) finite."""


@torch.no_grad()
def fit_linear(linears: Sequence[nn.Linear], pairs: Pairs, ridge: float) -> None:
    """Fit weights and biases of `linears`, which share their inputs, to the targets (in place).

    With X and Y centred and R = Y - X W0^T: W = W0 + ((X'X + ridge mean(diag X'X) I)^-1 X'R)^T. What the inputs say
    nothing about (a dead neuron, fewer rows than inputs) stays as in W0.

    Args:
        linears: the targets are those of the first, then those of the second, ...
        ridge: as a share of the mean variance of the inputs.
    """
    weight = torch.cat([linear.weight for linear in linears]).double()
    num_inputs = weight.shape[1]
    sums = sum_over_rows(_products(x, y) for x, y in pairs)
    means = sums[-1] / sums[-1, -1].clamp(min=TINY)
    mean_x, mean_y = means[:num_inputs], means[num_inputs:-1]
    covariance = sums[:-1, :-1] / sums[-1, -1].clamp(min=TINY) - torch.outer(mean_x, means[:-1])
    among_inputs, with_targets = covariance[:, :num_inputs], covariance[:, num_inputs:]
    penalty = (ridge * among_inputs.diagonal().mean()).clamp(min=TINY)
    regular = among_inputs + penalty * torch.eye(num_inputs, dtype=weight.dtype, device=weight.device)
    weight = weight + torch.linalg.solve(regular, with_targets - among_inputs @ weight.T).T
    write_linears(linears, weight, mean_y - weight @ mean_x)


def _products(inputs: Tensor, targets: Tensor) -> Tensor:
    """Sums over rows of [X 1]' [X Y 1], fp64, (K + 1, K + M + 1)."""
    x, y = inputs.double(), targets.double()
    ones = x.new_ones(len(x), 1)
    return torch.cat([x, ones], 1).T @ torch.cat([x, y, ones], 1)


def write_linears(linears: Sequence[nn.Linear], weight: Tensor, bias: Tensor) -> None:
    """Write (outputs of all, inputs) and (outputs of all,) into `linears`: rank 0's values on every rank."""
    weight, bias = ranks.from_first(weight.contiguous()), ranks.from_first(bias.contiguous())
    sizes = [len(linear.weight) for linear in linears]
    for linear, rows, offsets in zip(linears, weight.split(sizes), bias.split(sizes), strict=True):
        linear.weight.copy_(rows)
        linear.bias.copy_(offsets)


@torch.no_grad()
def fit_norm(norm: nn.LayerNorm, pairs: Pairs, ridge: float) -> None:
    """Fit gamma and beta of `norm`, one dim at a time, so that it puts out the targets (in place).

    Inputs are those of the LayerNorm; each dim is a ridge regression of the target on the standardised input, drawn to
    the present gamma.
    """
    gamma = norm.weight.double()
    sums = sum_over_rows(_norm_sums(standardise(z, norm.eps), y.double()) for z, y in pairs)
    mean_z, mean_y, square_z, product = sums[:-1] / sums[-1].clamp(min=TINY)
    variance, covariance = square_z - mean_z.square(), product - mean_z * mean_y
    penalty = (ridge * variance.mean()).clamp(min=TINY)
    gamma = gamma + (covariance - variance * gamma) / (variance.clamp(min=0) + penalty)
    norm.weight.copy_(ranks.from_first(gamma))
    norm.bias.copy_(ranks.from_first(mean_y - gamma * mean_z))


def _norm_sums(z: Tensor, y: Tensor) -> Tensor:
    """(5, D): sums over rows of z, y, z z, z y and 1."""
    return torch.stack([z.sum(0), y.sum(0), z.square().sum(0), (z * y).sum(0), torch.full_like(z[:1].sum(0), len(z))])


def standardise(rows: Tensor, eps: float) -> Tensor:
    """What a LayerNorm does before gamma and beta, in fp64."""
    return functional.layer_norm(rows.double(), rows.shape[-1:], eps=eps)


def sum_over_rows(sums: Iterable[Tensor]) -> Tensor:
    """Sum of equal-shaped tensors (one at least), and over ranks."""
    total = None
    for part in sums:
        total = part if total is None else total.add_(part)
    return ranks.total(total)
