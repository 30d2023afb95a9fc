"""An orthonormal basis in which the residual stream loses least, and in which a LayerNorm works on what is left.

One matrix P (D, d) serves all places of the residual stream. Coordinates that must stay what they are come first.
Source: compensation study, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from homodistil.pruning.compensation.moments import TINY
from homodistil.pruning.compensation.statistics import Statistics

IDENTITY_SHARE = 0.5
"""Share of the identity in the weights, added to the gradients' and the decoder rows' (0.1 to 2 give the same)."""


def residual_projection(statistics: Statistics, width: int, fixed: Tensor, seed: int) -> Tensor:
    """P, fp64 (D, width) with orthonormal columns: first unit vectors of `fixed`, then a basis of the best rest.

    Args:
        statistics: with gradients, directions are weighed by these; without, all count alike.
        width: of the new residual stream, above the number of `fixed`.
        fixed: int64, dims that stay coordinate axes; on the device of the statistics.
        seed: of the mixing.
    """
    spread, weights = _spread(statistics), _weights(statistics)
    if statistics.hides_mean:
        spread, weights = _without_mean(spread), _without_mean(weights)
    size = len(spread)
    if not len(fixed) < width <= size:
        raise ValueError(f"{width} residual dims of {size}, of which {len(fixed)} are fixed")
    rest = torch.ones(size, dtype=torch.bool, device=fixed.device)
    rest[fixed] = False
    leading = _leading(spread[rest][:, rest], weights[rest][:, rest], width - len(fixed))
    best = _mix(leading, seed, statistics.is_centred)
    projection = best.new_zeros(size, width)
    projection[fixed, torch.arange(len(fixed), device=fixed.device)] = 1
    projection[rest, len(fixed) :] = best
    return projection


def _spread(statistics: Statistics) -> Tensor:
    """What there is to keep: mean over places of covariance / trace, plus the decoder rows' by predicted token, or that
    of the vectors of texts.

    Where no mean is taken out of rows (RMSNorm, linears without biases), second moments instead of covariances.
    """
    is_centred = statistics.is_centred
    moments = [part.covariance if is_centred else part.second for part in statistics.residual]
    spread = torch.stack([_per_trace(matrix) for matrix in moments]).mean(0)
    if statistics.vectors is not None:
        spread = spread + _per_trace(statistics.vectors.covariance)
    return spread if statistics.decoder is None else spread + _per_trace(statistics.decoder)


def _weights(statistics: Statistics) -> Tensor:
    """How much an error in each direction matters, (D, D)."""
    sums = statistics.residual[0].sums
    size = len(sums) - 1
    weights = torch.eye(size, dtype=torch.float64, device=sums.device)
    if statistics.gradient is None:
        return weights
    if statistics.head_rows is None:
        return _per_trace(statistics.gradient) * size + IDENTITY_SHARE * weights
    of_gradient, of_head = (_per_trace(m) * size for m in (statistics.gradient, statistics.head_rows.second))
    return of_gradient + of_head + IDENTITY_SHARE * weights


def _without_mean(matrix: Tensor) -> Tensor:
    """Without the direction in which all dims are equal: no other one of an eigenbasis has a part of it then."""
    return matrix - matrix.mean(0, keepdim=True) - matrix.mean(1, keepdim=True) + matrix.mean()


def _per_trace(matrix: Tensor) -> Tensor:
    return matrix / matrix.trace().clamp(min=TINY)


def _leading(spread: Tensor, weights: Tensor, width: int) -> Tensor:
    """Orthonormal (D, width): the directions of most weighted spread, in falling order."""
    values, vectors = torch.linalg.eigh(weights)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    _, directions = torch.linalg.eigh(root @ spread @ root)
    return torch.linalg.qr(root @ directions[:, -width:].flip(1)).Q


def _mix(basis: Tensor, seed: int, is_centred: bool = True) -> Tensor:
    """The subspace in coordinates that suit its norms.

    LayerNorm removes the mean over dims: the least important direction is put there (a Householder reflection swaps it
    with the mean direction). The others are mixed at random, so that no coordinate dominates: random vectors projected
    onto their subspace, made orthonormal. That depends on the subspace alone, not on the signs that an eigensolver
    gives its vectors, which rounding can turn: runs on other numbers of ranks go the same way.

    Args:
        is_centred: whether norms take out the mean; otherwise all directions are mixed.
    """
    size, width = basis.shape
    num_mixed = width - 1 if is_centred else width
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(size, num_mixed, generator=generator, dtype=torch.float64).to(basis.device)
    mixing, triangle = torch.linalg.qr(basis[:, :num_mixed].T @ random)
    mixed = basis[:, :num_mixed] @ (mixing * triangle.diagonal().sign())
    if not is_centred:
        return mixed
    mixed = torch.cat([mixed, _pointed(basis[:, -1:])], 1)
    normal = torch.full((width,), width**-0.5, dtype=basis.dtype, device=basis.device)
    normal[-1] -= 1
    length = normal.norm()
    return mixed if length < 1e-12 else mixed - 2 * torch.outer(mixed @ normal, normal) / length.square()


def _pointed(direction: Tensor) -> Tensor:
    """The sign with which its largest entry is positive."""
    return direction * direction.flatten()[direction.abs().argmax()].sign()
