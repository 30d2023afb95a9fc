"""Exact change of basis inside each attention head after which the leading dims matter most.

Queries and keys meet in scores only, values and the output projection in their product only: both pairs stay what they
are under (P_q, P_k) with P_q P_k' = I. The basis is that of the SVD of what the pair computes, weighted by activations.
Source: compensation study, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from homodistil.pruning.compensation.moments import TINY
from homodistil.pruning.compensation.statistics import HeadMoments

_JITTER = 1e-6
"""Share of a moment matrix's mean diagonal that is added: keeps directions without activations invertible."""
_FLOOR = 1e-6
"""Smallest singular value, as a share of the largest."""


def query_key_maps(heads: HeadMoments) -> tuple[Tensor, Tensor]:
    """(P_q, P_k), each (N, H, H): q <- q P_q and k <- k P_k leave q.k as it is, the largest terms first.

    Keys are centred: what is added to all keys alike shifts every score of a query, which the softmax ignores.
    """
    of_query, of_key = _cholesky(heads.query.second), _cholesky(heads.key.covariance)
    return _balanced(of_query, of_query.mT @ of_key)


def value_output_maps(heads: HeadMoments, output_weight: Tensor) -> tuple[Tensor, Tensor]:
    """(P_v, P_o), each (N, H, H): v <- v P_v and W_O <- W_O P_o a head, the largest terms of their product first.

    Args:
        output_weight: of the output projection, (D, N * H).
    """
    num_heads, head_dim = heads.context.mean.shape
    per_head = output_weight.double().view(-1, num_heads, head_dim).permute(1, 2, 0)  # (N, H, D)
    per_head = functional.pad(per_head, (0, max(0, head_dim - per_head.shape[-1])))  # at least H singular values
    of_context = _cholesky(heads.context.covariance)
    return _balanced(of_context, of_context.mT @ per_head)


def _balanced(lower: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """(L^-T U S^.5, L U S^-.5) for product = U S V': one's transpose is the other's inverse, of like scale."""
    left, values, _ = torch.linalg.svd(product, full_matrices=False)
    # A floor changes the scale of what hardly matters, and keeps it in fp32's reach.
    root = values.clamp(min=values[..., :1] * _FLOOR + TINY).sqrt().unsqueeze(-2)
    return torch.linalg.solve_triangular(lower.mT, left, upper=True) * root, lower @ left / root


def _cholesky(moments: Tensor) -> Tensor:
    """Lower factors of (N, H, H) moment matrices; of a head that is always zero, the identity."""
    size, mean = moments.shape[-1], moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    identity = torch.eye(size, dtype=moments.dtype, device=moments.device)
    return torch.linalg.cholesky(torch.where(mean > 1e-30, moments + _JITTER * mean * identity, identity))


def head_map(per_head: Tensor, kept_heads: Tensor | None, width: int) -> Tensor:
    """One block-diagonal matrix, (N * H, new heads * width): the heads that stay, the leading dims of each.

    Args:
        per_head: (N, H, H).
        kept_heads: int64, None: all.
    """
    num_heads, head_dim, _ = per_head.shape
    kept = range(num_heads) if kept_heads is None else kept_heads.tolist()
    matrix = per_head.new_zeros(num_heads * head_dim, len(kept) * width)
    for new, old in enumerate(kept):
        matrix[old * head_dim : (old + 1) * head_dim, new * width : (new + 1) * width] = per_head[old, :, :width]
    return matrix
