"""Labels drawn from a model's own probabilities: gradients for these have the Fisher information as second moment.

The numbers that decide on a label are those of its sequence, and rounding hardly ever turns a draw: runs on other
numbers of ranks, with other micro-batches and other stages of ZeRO draw alike.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from homodistil.data.batch import Batch

FANOUT = 32
"""Of the tree that a draw descends."""
NUMBERS = 4
"""For each draw, one for each level of the tree: up to 32^4 labels, a million."""


def uniform_numbers(batch: Batch, first_sequence: int, seed: int) -> Tensor:
    """Random numbers in [0, 1), fp32 (rows to predict of `batch`, NUMBERS): the same however sequences are dealt out to
    micro-batches.

    Args:
        first_sequence: place of the batch's first sequence among those of all ranks.
    """
    num_sequences, seq_len = batch.input_ids.shape
    seeds = ((seed * 1_000_003 + first_sequence + b) % 2**63 for b in range(num_sequences))
    numbers = [torch.rand(seq_len, NUMBERS, generator=torch.Generator().manual_seed(one)) for one in seeds]
    return torch.cat(numbers).to(batch.target_index.device)[batch.target_index]


def label_direction(logits: Tensor, numbers: Tensor) -> Tensor:
    """p - onehot of a label drawn from the logits (R, L), of their shape.

    Args:
        numbers: in [0, 1), (R, NUMBERS).
    """
    shares = logits.softmax(-1)
    return shares - functional.one_hot(draw_labels(shares, numbers), shares.shape[1]).to(shares)


def draw_labels(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """A label for each row, down a tree of sums: which of 32 groups, which of its 32, and so on. int64 (R,).

    Cumulative sums over all labels would need one number. But rounding shifts each of their tens of thousands of
    bounds, and in one of 400 to 2,000 rows a bound passes the number: another label, and a gradient that has nothing to
    do with the other. A race of exponential variables (torch.multinomial) needs a number for each label.

    Args:
        probabilities: (R, V).
        numbers: in [0, 1), (R, NUMBERS), of which each level of the tree uses one.
    """
    levels = [probabilities]
    while levels[-1].shape[1] > FANOUT:
        levels.append(_groups(levels[-1]).sum(-1))
    rows = torch.arange(len(probabilities), device=probabilities.device)
    place = torch.zeros_like(rows)
    for number, sums in zip(numbers.unbind(1), reversed(levels), strict=False):
        bounds = _groups(sums)[rows, place].cumsum(-1)
        chosen = torch.searchsorted(bounds, number.to(bounds).unsqueeze(1) * bounds[:, -1:], right=True)
        place = place * FANOUT + chosen.squeeze(1).clamp(max=FANOUT - 1)
    return place.clamp(max=probabilities.shape[1] - 1)


def _groups(sums: Tensor) -> Tensor:
    """(R, n) -> (R, groups, FANOUT), with zeros behind."""
    return functional.pad(sums, (0, -sums.shape[1] % FANOUT)).unflatten(1, (-1, FANOUT))
