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

RIDGES = (1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""What a ridge that is left open is chosen from."""
_SKETCH = 64
"""Outputs that the choice of a ridge looks at: random sums of all outputs, where these are more."""
_OF_NORMS = 1e-2
"""The ridge of a norm where it is left open: every dim has two numbers to fit, and all rows for it."""


class Rows(NamedTuple):
    """This rank's rows of one micro-batch."""

    inputs: Tensor
    """(rows, K)."""
    targets: Tensor
    """(rows, M)."""
    weights: Tensor | None = None
    """(rows, 1): what a row's error is multiplied with; None: all count alike."""


@torch.no_grad()
def fit_linear(linears: Sequence[nn.Module], rows: Iterable[Rows], ridge: float | None) -> None:
    """Fit weights, and biases where there are, of `linears`, which share their inputs, to the targets (in place).

    With X and Y centred, where there are biases, and R = Y - X W0^T:
    W = W0 + ((X'X + p I)^-1 X'R)^T = ((X'X + p I)^-1 (X'Y + p W0^T))^T for p = ridge mean(diag X'X). What the inputs
    say nothing about (a dead neuron, fewer rows than inputs) stays as in W0.

    Args:
        linears: the targets are those of the first, then those of the second, ...; all have a bias or none.
        ridge: as a share of the mean variance of the inputs; None: that of `RIDGES` whose fit to three quarters of the
            rows does best on the others.
    """
    weight = torch.cat([matrix_of(linear) for linear in linears]).double()
    has_bias = linears[0].bias is not None
    if ridge is None:
        sums, ridge = _sums_and_ridge(weight, rows, has_bias)
    else:
        sums = sum_over_rows(_products(part) for part in rows)
    _write_linears(linears, *_solved(weight, sums, ridge, has_bias))


def _solved(weight: Tensor, sums: Tensor, ridge: float, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Weight (M, K) and bias (M,) of the ridge regression, fp64.

    Args:
        weight: W0.
        sums: from `_products`.
    """
    num_inputs = weight.shape[1]
    means = sums[-1] / sums[-1, -1].clamp(min=TINY)
    if not has_bias:
        means = torch.zeros_like(means)
    mean_x, mean_y = means[:num_inputs], means[num_inputs:-1]
    covariance = sums[:-1, :-1] / sums[-1, -1].clamp(min=TINY) - torch.outer(mean_x, means[:-1])
    among_inputs, with_targets = covariance[:, :num_inputs], covariance[:, num_inputs:]
    penalty = (ridge * among_inputs.diagonal().mean()).clamp(min=TINY)
    regular = among_inputs + penalty * torch.eye(num_inputs, dtype=weight.dtype, device=weight.device)
    weight = torch.linalg.solve(regular, with_targets + penalty * weight.T).T
    return weight, mean_y - weight @ mean_x


def _sums_and_ridge(weight: Tensor, rows: Iterable[Rows], has_bias: bool) -> tuple[Tensor, float]:
    """`_products` of all rows, over all ranks, and the one of `RIDGES` with the least squared error on held-out rows.

    Held out is the last quarter of every micro-batch's rows. Rows come sequence by sequence, so these are of other
    sequences than what is fitted, but for one. Errors are those of `_sketch` of the outputs: the expectation of a sum
    of squares is the same, and one solution has `_SKETCH` right-hand sides instead of thousands.
    """
    sketch, total, held_out = _sketch(weight), None, None
    for part in rows:
        sums, left_out = _products(part), _products(_left_out(part, sketch))
        total = sums if total is None else total.add_(sums)
        held_out = left_out if held_out is None else held_out.add_(left_out)
    total, held_out = ranks.total(total), ranks.total(held_out)
    fitted = _sketched(total, sketch, weight.shape[1]) - held_out
    start = sketch.T @ weight
    errors = [_error(held_out, *_solved(start, fitted, ridge, has_bias)) for ridge in RIDGES]
    return total, RIDGES[int(ranks.from_first(torch.stack(errors)).argmin())]


def _left_out(rows: Rows, sketch: Tensor) -> Rows:
    at = len(rows.inputs) * 3 // 4
    weights = None if rows.weights is None else rows.weights[at:]
    return Rows(rows.inputs[at:], rows.targets[at:] @ sketch.to(rows.targets.dtype), weights)


def _sketch(weight: Tensor) -> Tensor:
    """(M, at most `_SKETCH`) signs, the same on every rank and every time; the identity where outputs are few."""
    num_outputs = len(weight)
    if num_outputs <= _SKETCH:
        return torch.eye(num_outputs, dtype=weight.dtype, device=weight.device)
    drawn = torch.randint(2, (num_outputs, _SKETCH), generator=torch.Generator().manual_seed(0))
    return (2 * drawn - 1).to(weight) / _SKETCH**0.5


def _sketched(sums: Tensor, sketch: Tensor, num_inputs: int) -> Tensor:
    """`_products` of the same rows with the sketch of their targets."""
    return torch.cat([sums[:, :num_inputs], sums[:, num_inputs:-1] @ sketch, sums[:, -1:]], 1)


def _error(sums: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Sum over rows of |w (W x + b - y)|^2, less that of |w y|^2."""
    whole = torch.cat([weight, bias.unsqueeze(1)], 1)
    among_inputs = torch.cat([sums[:, : weight.shape[1]], sums[:, -1:]], 1)
    with_targets = sums[:, weight.shape[1] : -1]
    return ((whole @ among_inputs) * whole).sum() - 2 * (whole.T * with_targets).sum()


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
def fit_norm(norm: Norm, rows: Iterable[Rows], ridge: float | None) -> None:
    """Fit gain, and shift where it has one, of `norm`, one dim at a time, so that it puts out the targets (in place).

    Inputs are those of the norm; each dim is a ridge regression of the target on the standardised input, drawn to the
    present gain.
    """
    gain, ridge = norm.gain, _OF_NORMS if ridge is None else ridge
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
