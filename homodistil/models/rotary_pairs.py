"""Pairs of dims that rotary positions turn together (Su et al. 2021), and which of them a stock class can express.

Dims i and i + H/2 of a head of H dims are pair i, turned by position x theta^(-2i/H). A pair goes from the queries and
keys of all heads of all layers at once, since these share one table of angles. What stays computes exactly what it did,
and has the angles of a stock class where it is an arithmetic progression: of L pairs a, a + s, a + 2s, ... pair j turns
by theta^(-2a/H) x (theta^(2 s L / H))^(-2j / (2 L)): those of heads of 2 L dims with another theta, divided by a
factor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from homodistil.models.axes import Keep, Widths, kind_of, outer_axis


def runs_over_pairs(axis: str, widths: Widths) -> bool:
    """Whether entries of `axis` are the dims of rotary heads: of grouped queries and keys, or of their norms."""
    if kind_of(axis) == "qk_dim":
        return kind_of(outer_axis(axis, widths) or "") == "kv_heads"
    return axis == "head_norm"


def width_multiple(axis: str, widths: Widths) -> int:
    """What a narrower width of `axis` has to be a multiple of: 2 for the dims of rotary heads, of whose values there
    are as many."""
    is_value = kind_of(axis) == "vo_dim" and kind_of(outer_axis(axis, widths) or "") == "kv_heads"
    return 2 if is_value or runs_over_pairs(axis, widths) else 1


def pairs_of(dims: Tensor) -> Tensor:
    """The pairs of the dims of a head, int64 (H,) -> (H / 2,)."""
    return dims[: len(dims) // 2]


def dims_of(pairs: Tensor, num_pairs: int) -> Tensor:
    """The dims, ascending, that pairs of heads of `num_pairs` pairs are made of, int64 (k,) -> (2 k,)."""
    return torch.cat([pairs, pairs + num_pairs])


def kept_pairs(origins: Keep) -> Tensor | None:
    """Where each pair that is left came from, int64 (pairs,); None where heads are not rotary ones that get narrower.

    Args:
        origins: axis -> indices of the current entries in the model at its start.
    """
    axis = "layer.0.qk_dim"
    is_grouped = axis in origins and "layer.0.kv_heads" in origins
    return pairs_of(origins[axis][0]) if is_grouped else None


def progressions(num_pairs: int, length: int) -> Iterator[range]:
    """Every arithmetic progression of `length` of the pairs 0 .. num_pairs - 1."""
    for start in range(num_pairs - length + 1):
        largest = (num_pairs - 1 - start) // (length - 1) if length > 1 else 1
        for stride in range(1, largest + 1):
            yield range(start, start + stride * length, stride)


def progression_of(pairs: Tensor) -> range:
    """`pairs`, ascending, as a progression. Raises ValueError when they are none."""
    values = pairs.tolist()
    stride = values[1] - values[0] if len(values) > 1 else 1
    progression = range(values[0], values[0] + stride * len(values), stride)
    if [*progression] != values:
        raise ValueError(f"the rotary pairs {values} are no progression, and no stock class has their angles")
    return progression


def stock_rotary(pairs: range, num_pairs: int, theta: float) -> dict[str, float | str]:
    """`rope_parameters` of heads of these pairs alone.

    Args:
        num_pairs, theta: of the heads that they are pairs of.
    """
    parameters = {"rope_type": "default", "rope_theta": theta ** (pairs.step * len(pairs) / num_pairs)}
    if pairs.start:
        parameters |= {"rope_type": "linear", "factor": theta ** (pairs.start / num_pairs)}
    return parameters
