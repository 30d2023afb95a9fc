"""How well logits answer ground-truth labels, and whether the numbers of the labels are in the teacher's order.

N texts or tokens, L labels of the head, W numbers of a label (data/prepare/labels.py), NaN where a text has none.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from homodistil.evaluation.scores import correlations
from homodistil.models.classifier import ProblemType

MIN_TEXTS = 50
"""Labelled texts (or tokens), below which no order is judged."""
_MIN_GAIN = 0.1
"""Share of the texts that another order must answer more of than the teacher's; of tokens, most of which have one label
("O"), share of those that have another one."""
_MIN_DEVIATIONS = 3.0
"""How many standard deviations of chance that must be (McNemar: of the texts that only one of both orders answers)."""


def compared_to_labels(logits: Tensor, labels: Tensor, kind: ProblemType) -> dict[str, float]:
    """label_accuracy, where one label holds; label_f1 (micro-averaged, of logits above 0), where each holds or not;
    label_mse, label_pearson and label_spearman (means over labels) of scores, the last two as of `correlations`.

    Args:
        logits: (N, L).
        labels: (N, W).

    Returns:
        Nothing where no text has a label.
    """
    logits, labels = _labelled(logits, labels)
    if not len(labels):
        return {}
    if kind == "single_label_classification":
        return {"label_accuracy": (logits.argmax(-1) == labels[:, 0]).double().mean().item()}
    if kind == "multi_label_classification":
        says, holds = logits > 0, labels > 0.5
        errors = (says != holds).sum().item()
        hits = (says & holds).sum().item()
        return {"label_f1": 2 * hits / (2 * hits + errors) if hits + errors else 1.0}
    known = {f"label_{name}": value for name, value in correlations(logits, labels).items()}
    return {"label_mse": (logits - labels).square().mean().item()} | known


def compared_counts(counts: Tensor) -> dict[str, float]:
    """label_accuracy and label_macro_f1, the mean F1 of the labels that occur. Of tokens, most of which have one label.

    Args:
        counts: float64 (L, L) as of `label_counts`.

    Returns:
        Nothing where no token has a label.
    """
    if not (total := counts.sum()):
        return {}
    labelled, predicted, hits = counts.sum(1), counts.sum(0), counts.diagonal()
    f1 = (2 * hits / (labelled + predicted).clamp(min=1))[labelled > 0].mean()
    return {"label_accuracy": (hits.sum() / total).item(), "label_macro_f1": f1.item()}


def label_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows of each label (row) to which the logits give each label (column), float64 (L, L), on their device.

    Args:
        logits: (N, L).
        labels: (N, 1).
    """
    num, has_label = logits.shape[1], ~labels[:, 0].isnan()
    pairs = labels[has_label, 0].long() * num + logits[has_label].argmax(-1)
    return pairs.bincount(minlength=num * num).reshape(num, num).double()


class BetterOrder(NamedTuple):
    """Another order of labels, which fits a teacher clearly better than its own."""

    order: tuple[int, ...]
    """Number in the data -> label of the teacher."""
    accuracy: float
    """With this order."""
    accuracy_as_given: float
    num_texts: int


def halved_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """`label_counts` of every other row that has a label, and of the rest, float64 (2, L, L)."""
    has_label = ~labels[:, 0].isnan()
    logits, labels = logits[has_label], labels[has_label]
    return torch.stack([label_counts(logits[half::2], labels[half::2]) for half in (0, 1)])


def better_order(halves: Tensor, of_tokens: bool = False) -> BetterOrder | None:
    """The one-to-one order of labels that fits best, where it answers clearly more texts than that of the logits; None:
    there is none, or too few texts have a label.

    What an order gains is counted on one half of the texts while it is chosen on the other: of many labels, some order
    always fits a teacher that guesses.

    Args:
        halves: `halved_counts` of the teacher's logits, of which one label holds.
        of_tokens: whether these are tokens: what is gained must be a share of those with other labels than most have.
    """
    halves = halves.cpu().numpy()
    whole = halves.sum(0)
    num_texts = int(whole.sum())
    if num_texts < MIN_TEXTS:
        return None
    gains, differing = 0.0, 0.0
    for chosen_on, counted_on in (halves, halves[::-1]):
        order = _best_order(chosen_on)
        differs = order != np.arange(len(order))
        better, worse = _hits(counted_on, order)[differs].sum(), counted_on.diagonal()[differs].sum()
        gains, differing = gains + better - worse, differing + better + worse
    judged = num_texts - whole.sum(1).max() * of_tokens
    if gains <= max(_MIN_GAIN * judged, _MIN_DEVIATIONS * differing**0.5):
        return None
    order = _best_order(whole)
    shares = float(_hits(whole, order).sum()) / num_texts, float(whole.trace()) / num_texts
    return BetterOrder(tuple(order.tolist()), *shares, num_texts)


def _best_order(counts: np.ndarray) -> np.ndarray:
    """Row -> column such that most texts are counted, int64 (L,)."""
    from scipy.optimize import linear_sum_assignment  # as in evaluation/scores.py

    return linear_sum_assignment(counts, maximize=True)[1]


def _hits(counts: np.ndarray, order: np.ndarray) -> np.ndarray:
    return counts[np.arange(len(order)), order]


def _labelled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Those texts that have a label, float64 on the CPU."""
    logits, labels = logits.double().cpu(), labels.double().cpu()
    has_label = ~labels[:, 0].isnan()
    return logits[has_label], labels[has_label]
