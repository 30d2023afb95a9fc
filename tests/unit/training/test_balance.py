"""Shares of the loss: what is told when, and which weight would balance a term."""

from __future__ import annotations

import re

import pytest

from homodistil.training.loss_balance import Balance

LOSSES = {"loss/mlm": 2.0, "loss/kl": 0.5, "loss/attention": 9.0, "loss/total": 2 + 4 * 0.5 + 3 * 9}
WEIGHTS = {"mlm": 1.0, "kl": 4.0, "attention": 3.0}


def test_shares_are_of_the_weighted_sum():
    assert Balance("x", WEIGHTS).shares(LOSSES) == pytest.approx({"mlm": 2 / 31, "kl": 2 / 31, "attention": 27 / 31})
    assert Balance("x", {"mlm": 1.0}).shares(LOSSES) == {}  # the correction of a teacher: nothing to compare


def test_told_before_and_after_the_first_cut_and_no_more():
    balance = Balance("mine", WEIGHTS)
    told = [balance.lines(step, LOSSES, 128 if step < 3 else 64, is_cut=step >= 3) for step in range(1, 6)]
    assert [len(lines) for lines in told] == [2, 0, 2, 0, 0]
    assert told[0][0] == "mine: at step 1, hidden 128, the loss is 31: mlm 6%, kl 6%, attention 87%"
    assert told[2][0].startswith("mine: at step 3, hidden 64,")


def test_a_decoders_term_is_called_lm_where_people_read_it():
    (line, _) = Balance("mine", WEIGHTS, task="causal").lines(1, LOSSES, 128, is_cut=False)
    assert line == "mine: at step 1, hidden 128, the loss is 31: lm 6%, kl 6%, attention 87%"
    assert "mlm" in Balance("x", WEIGHTS, task="causal").shares(LOSSES)  # as metrics.jsonl has it


def test_the_proposed_weight_makes_a_term_half_of_all():
    (_, warning) = Balance("x", WEIGHTS).lines(1, LOSSES, 64, is_cut=True)
    assert warning.startswith("warning: the attention term is 87% of the loss (27 of 31); loss.attention=0.44 would")
    proposed = float(re.search(r"loss.attention=([0-9.]+)", warning)[1])
    assert Balance("x", WEIGHTS | {"attention": proposed}).shares(LOSSES)["attention"] == pytest.approx(0.5, abs=0.01)


def test_a_copy_that_has_only_its_mlm_loss_is_no_mistake():
    losses = {"loss/mlm": 2.0, "loss/kl": 1e-9, "loss/attention": 0.0}
    assert len(Balance("x", WEIGHTS).lines(1, losses, 128, is_cut=False)) == 1


def test_the_weight_of_a_term_from_outside_is_proposed_where_it_stands():
    balance = Balance("run", {"mlm": 1.0, "similarity": 2.0}, extra=["similarity"])
    lines = balance.lines(10, {"loss/mlm": 1.0, "loss/similarity": 9.5}, 24, is_cut=True)
    assert "loss.extra={similarity: 0.11} would make it" in lines[-1]
