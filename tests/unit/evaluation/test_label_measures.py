"""Measures by ground-truth labels against counting, and when another order of them is believed."""

from __future__ import annotations

import itertools

import pytest
import torch
from sklearn.metrics import f1_score

from homodistil.evaluation.labels import (
    MIN_TEXTS,
    better_order,
    compared_counts,
    compared_to_labels,
    halved_counts,
    label_counts,
)

NONE = float("nan")


def test_measures_by_labels():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0], [5.0, 0.0, 0.0], [0.0, 0.5, 9.0]])
    single = torch.tensor([[1.0], [0.0], [NONE], [2.0]])
    assert compared_to_labels(logits, single, "single_label_classification") == {"label_accuracy": pytest.approx(2 / 3)}
    holds = torch.tensor([[1.0, 0.0, 0.0], [NONE] * 3, [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    # True positives 1 + 1 + 2, false ones 1, missed 1.
    measured = compared_to_labels(logits, holds, "multi_label_classification")
    assert measured == {"label_f1": pytest.approx(2 * 4 / (2 * 4 + 1 + 1))}
    scores, labels = logits[:, :1], torch.tensor([[0.5], [0.0], [4.0], [NONE]])
    measured = compared_to_labels(scores, labels, "regression")
    assert measured["label_mse"] == pytest.approx((0.25 + 0 + 1) / 3) and measured["label_spearman"] == 1
    assert 0.9 < measured["label_pearson"] < 1
    assert compared_to_labels(scores, torch.full((4, 1), NONE), "regression") == {}
    nothing = compared_to_labels(-logits.abs() - 1, torch.zeros(4, 3), "multi_label_classification")
    assert nothing == {"label_f1": 1.0}


def answers(num_labels: int, num_texts: int, right: float, order: tuple[int, ...], seed: int = 0):
    """Logits of a teacher that is right for this share of the texts, and their labels, those of `order` in the data."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(num_labels, (num_texts,), generator=generator)
    is_right = torch.rand(num_texts, generator=generator) < right
    guess = torch.where(is_right, truth, torch.randint(num_labels, (num_texts,), generator=generator))
    logits = torch.nn.functional.one_hot(guess, num_labels).float()
    number = torch.empty(num_labels, dtype=torch.long)
    number[torch.tensor(order)] = torch.arange(num_labels)
    return logits, number[truth][:, None].float()


@pytest.mark.parametrize("num_labels", [2, 3, 4, 9])
def test_a_permuted_teacher_is_caught_with_the_order_that_fits_best(num_labels):
    """The best of all orders, tried one by one where that can be."""
    order = (*range(1, num_labels), 0)
    logits, labels = answers(num_labels, 400, 0.7, order)
    labels[::7] = NONE
    better = better_order(halved_counts(logits, labels))
    assert better.order == order and better.num_texts == int((~labels.isnan()).sum())
    has_label = ~labels[:, 0].isnan()
    predicted, numbers = logits[has_label].argmax(-1), labels[has_label, 0].long()
    assert better.accuracy_as_given == pytest.approx((predicted == numbers).double().mean().item())
    if num_labels < 6:
        tried = [(torch.tensor(one)[numbers] == predicted).double().mean() for one in itertools.permutations(order)]
        assert better.accuracy == pytest.approx(max(tried).item())


@pytest.mark.parametrize("num_labels", [2, 3, 9])
@pytest.mark.parametrize("right", [0.0, 0.3, 0.9])
def test_a_right_order_is_not_refused_nor_a_teacher_that_guesses(num_labels, right):
    for seed in range(20):
        for num_texts in (MIN_TEXTS, 300):
            rows = answers(num_labels, num_texts, right, tuple(range(num_labels)), seed)
            assert better_order(halved_counts(*rows)) is None


def test_tokens_are_measured_by_accuracy_and_macro_f1():
    """Against scikit-learn, on labels most of which are one, of which one never occurs, and of which a few are none."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor([0.9, 0.06, 0.04, 0.0]), 500, True, generator=draw).float()
    logits = torch.randn(500, 4, generator=draw) + 2 * torch.eye(4)[labels.long()] - 9 * torch.tensor([0, 0, 0, 1])
    labels[::7] = NONE
    known = ~labels.isnan()
    expected, predicted = labels[known].long().numpy(), logits[known].argmax(-1).numpy()
    measured = compared_counts(label_counts(logits, labels[:, None]))
    assert measured == {
        "label_accuracy": pytest.approx((expected == predicted).mean()),
        "label_macro_f1": pytest.approx(f1_score(expected, predicted, average="macro")),
    }
    assert compared_counts(label_counts(logits[::7], labels[::7, None])) == {}


def test_an_order_of_labels_that_few_tokens_have_is_judged_by_these():
    """A twentieth of the tokens has one of two labels, which are exchanged."""
    labels = torch.zeros(4100)
    labels[::41], labels[20::41] = 1, 2
    logits = torch.eye(3)[torch.tensor([0, 2, 1])[labels.long()]]
    halves = halved_counts(logits, labels[:, None])
    assert better_order(halves) is None
    better = better_order(halves, of_tokens=True)
    assert (better.order, better.accuracy, better.accuracy_as_given) == ((0, 2, 1), 1, pytest.approx(1 - 200 / 4100))


def test_few_texts_are_not_judged():
    logits, labels = answers(2, 400, 1.0, (1, 0))
    assert better_order(halved_counts(logits[: MIN_TEXTS - 1], labels[: MIN_TEXTS - 1])) is None
    assert better_order(halved_counts(logits[:MIN_TEXTS], labels[:MIN_TEXTS])).accuracy == 1
    labels[MIN_TEXTS - 1 :] = NONE
    assert better_order(halved_counts(logits, labels)) is None
