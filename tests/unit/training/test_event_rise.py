"""How much events raise the terms of a loss: what is logged, what is warned of, and what is proposed."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from homodistil.checkpoint.files import split_tensors
from homodistil.config.schema import LossConfig
from homodistil.training.event_rise import EventRises
from homodistil.training.loss_balance import Balance

LOSS = dataclasses.replace(
    LossConfig().only(mlm=1.0, kl=4.0, hidden=1.0, attention=1.0),
    hidden_space="raw",
    attention_target="scores",
)


def losses(mlm: float = 3.0, kl: float = 0.5, hidden: float = 2.0, attention: float = 2.0) -> dict[str, float]:
    values = {"mlm": mlm, "kl": kl, "hidden": hidden, "attention": attention}
    return {f"loss/{name}": value for name, value in values.items()}


def rises(loss: LossConfig = LOSS, task: str = "mlm", **before: float) -> EventRises:
    """Behind one logged step, of a student that had been cut before."""
    made = EventRises(loss, Balance("run", loss.weights, loss.extra, task), task)
    made.end(10, losses(**before), is_cut=True)
    return made


def behind(made: EventRises, step: int = 16, **after: float) -> EventRises:
    """`made` with the values of one more step behind an event, as a logged step brings them."""
    values = torch.tensor([losses(**after)[f"loss/{name}"] for name in made.names], dtype=torch.float64)
    made.hold(step, values)
    made.receive(torch.cat(made.held).tolist())
    return made


def lines(made: EventRises, step: int = 16, **after: float) -> list[str]:
    """What the logged step behind one event says; its base stays."""
    state = made.state_dict()
    said = behind(made, step, **after).lines()
    made.load_state_dict(state)
    return said


def test_ratios_are_of_the_logged_step_before_and_the_largest_of_several_events():
    made = behind(behind(rises(hidden=0.0), 11, kl=1.0, hidden=5.0), 16, kl=0.75, mlm=6.0)
    assert made.ratios() == {"mlm": 2.0, "kl": 2.0, "attention": 1.0}  # what was 0 has no ratio
    made.end(20, losses(kl=2.0), is_cut=True)
    assert made.ratios() == {} and made.lines() == []  # each event is told of once
    assert behind(made, 21, kl=3.0).ratios()["kl"] == 1.5
    assert behind(EventRises(LOSS, Balance("run", LOSS.weights))).ratios() == {}  # nothing was logged before
    assert "kl" not in behind(rises(), kl=float("inf")).ratios()


def test_several_events_are_brought_in_one_transfer():
    made = rises()
    for step, kl in ((11, 1.0), (16, 2.0)):
        made.hold(step, torch.tensor([3.0, kl, 2.0, 2.0]))
    assert len(made.held) == 2
    made.receive(torch.cat(made.held).tolist())
    assert made.held == [] and made.ratios()["kl"] == 4.0


def test_a_resumed_run_goes_on_with_the_same():
    made, again = behind(rises(), kl=4.0), EventRises(LOSS, Balance("run", LOSS.weights, LOSS.extra))
    plain, tensors = split_tensors(made.state_dict())  # as a checkpoint takes it apart
    assert not tensors
    again.load_state_dict(json.loads(json.dumps(plain)))
    assert again.ratios() == made.ratios() and again.lines() == made.lines()


@pytest.mark.parametrize(
    ("name", "change", "remedy"),
    [
        ("hidden", {}, "loss.hidden_space=normalised"),
        ("hidden", {"hidden_space": "normalised"}, "loss.hidden=0.05"),
        ("attention", {}, "loss.attention_target=centred_scores or probabilities_kl"),
        ("attention", {"attention_target": "centred_scores"}, "loss.attention=0.05"),
        ("kl", {}, "loss.kl=0.2"),
    ],
)
def test_a_term_that_rises_more_than_tenfold_is_warned_of_once(name, change, remedy):
    made = rises(dataclasses.replace(LOSS, **change))
    assert lines(made, **{name: 9.9 * losses()[f"loss/{name}"]}) == []
    after = 20 * losses()[f"loss/{name}"]
    (line,) = lines(made, **{name: after})
    assert line == (
        f"warning: the event at step 15 raised the {name} term 20-fold ({losses()[f'loss/{name}']:.3g} at step 10, "
        f"{after:.3g} at step 16); set {remedy}"
    )
    assert lines(made, **{name: 2 * after}) == []


def test_a_term_from_outside_and_a_decoders_loss_by_their_names():
    loss = dataclasses.replace(LOSS.only(mlm=1.0), extra={"similarity": 2.0})
    made = EventRises(loss, Balance("run", loss.weights, loss.extra, "causal"), "causal")
    made.end(10, {"loss/mlm": 3.0, "loss/similarity": 0.1}, is_cut=True)
    made.hold(12, torch.tensor([60.0, 2.0]))
    made.receive([60.0, 2.0])
    lm, similarity = made.lines()
    assert "raised the lm term 20-fold" in lm and lm.endswith("set loss.mlm=0.05")
    assert similarity.endswith("set loss.extra={similarity: 0.1}")


def test_a_copy_is_no_base_but_of_what_text_costs():
    """At the first event of a copy every term of the imitation rises from next to nothing, as it must."""
    made = rises()
    made.end(10, losses(kl=1e-3, hidden=1e-4, attention=0.0), is_cut=False)
    assert lines(made, kl=1.0, hidden=2.0, attention=2.0) == []
    (line,) = lines(made, mlm=40.0, kl=9.0)
    assert "raised the mlm term 13.3-fold" in line
    assert behind(made, kl=1.0).ratios()["kl"] == pytest.approx(1000)  # logged all the same


def test_a_term_that_leaves_nothing_to_the_others_is_warned_of():
    """What a decoder's first event was measured to do: hidden 66,099, attention 280, lm 8.7, kl 5.4."""
    made = rises(task="causal")
    made.end(10, losses(kl=0.0, hidden=0.0, attention=0.0), is_cut=False)
    (line,) = lines(made, 11, mlm=8.7, kl=5.4, hidden=66_099.0, attention=280.0)
    assert line == (
        "warning: behind the event at step 10 the hidden term is 99.5% of the loss and 7,598 times the lm term; set "
        "loss.hidden_space=normalised"
    )
    assert lines(made, 16, hidden=66_099.0) == []


def test_a_term_next_to_nothing_is_no_reason_to_warn():
    """Embeddings that an event leaves alone: no term has more than its part of the rest."""
    assert lines(rises(hidden=1e-7), hidden=1e-7) == []


def test_dominance_is_not_said_twice():
    balance = Balance("run", LOSS.weights)
    made = EventRises(LOSS, balance)
    made.end(1, losses(kl=0.0, hidden=0.0, attention=0.0), is_cut=False)
    after = losses(hidden=66_099.0)
    assert len(balance.lines(11, after, 24, is_cut=True)) == 2  # shares, and a warning of the hidden term
    assert lines(made, 11, hidden=66_099.0) == []
