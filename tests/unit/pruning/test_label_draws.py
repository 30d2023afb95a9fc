"""Labels drawn from probabilities: how often, from which numbers, and that rounding does not turn them."""

from __future__ import annotations

import pytest
import torch
from support.small import small_batch
from torch import Tensor

from homodistil.pruning.compensation.label_draws import FANOUT, NUMBERS, draw_labels, label_direction, uniform_numbers


def drawn_numbers(num_rows: int) -> Tensor:
    return torch.rand(num_rows, NUMBERS, generator=torch.Generator().manual_seed(1))


def test_draws_do_not_depend_on_how_sequences_are_dealt_out():
    batch = small_batch(7, (16, 11, 5, 9))
    parts = [split_batch(batch, rows) for rows in (slice(0, 1), slice(1, 4))]
    numbers = [uniform_numbers(part, first, seed=2**31) for part, first in zip(parts, (0, 1), strict=True)]
    assert torch.equal(torch.cat(numbers), uniform_numbers(batch, 0, seed=2**31))
    assert len(numbers[0].unique()) == numbers[0].numel() and 0 <= numbers[0].min() and numbers[0].max() < 1


def split_batch(batch, rows: slice):
    """Some sequences of a batch, as far as draws look at it."""
    length = batch.input_ids.shape[1]
    index = batch.target_index
    here = index[(index >= rows.start * length) & (index < rows.stop * length)]
    return batch._replace(input_ids=batch.input_ids[rows], target_index=here - rows.start * length)


@pytest.mark.parametrize("num_labels", [2, 4, FANOUT, FANOUT + 1, 100, FANOUT**2, 3000])
def test_labels_are_drawn_by_their_probability(num_labels):
    """Of which one in four has none."""
    draw = torch.Generator().manual_seed(num_labels)
    probabilities = torch.rand(num_labels, generator=draw) ** 4 * (torch.arange(num_labels) % 4 != 1)
    probabilities /= probabilities.sum()
    counts = torch.zeros(num_labels)
    for numbers in drawn_numbers(40_000).split(4000):
        counts += draw_labels(probabilities.expand(len(numbers), -1), numbers).bincount(minlength=num_labels)
    assert counts[1::4].sum() == 0
    deviations = (probabilities * (1 - probabilities) / 40_000).sqrt()
    assert ((counts / 40_000 - probabilities).abs() <= 5 * deviations + 2 / 40_000).all()


def test_rounding_does_not_turn_draws():
    """Cumulative sums over this vocabulary turn one in a few hundred."""
    draw = torch.Generator().manual_seed(0)
    numbers = drawn_numbers(600)
    logits = 3 * torch.randn(600, 30522, generator=draw)
    rounded = logits + 1e-5 * torch.randn(600, 30522, generator=draw)
    turned = [(labels != other).sum() for labels, other in draws(logits, rounded, numbers)]
    assert turned[0] == 0 < turned[1]


def draws(logits: Tensor, rounded: Tensor, numbers: Tensor):
    """Labels of both, by the tree and by cumulative sums."""
    yield tuple(draw_labels(one.softmax(-1), numbers) for one in (logits, rounded))
    yield tuple(
        torch.searchsorted(one.softmax(-1).cumsum(-1), numbers[:, :1].contiguous()) for one in (logits, rounded)
    )


def test_the_direction_is_the_gradient_of_the_drawn_label():
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    numbers = drawn_numbers(7)
    labels = draw_labels(logits.softmax(-1), numbers)
    (-logits.log_softmax(-1)[torch.arange(7), labels].sum()).backward()
    torch.testing.assert_close(label_direction(logits.detach(), numbers), logits.grad)
