"""Held-out evaluation, the gap probe, outlier dims and one-shot calibration against naive computations."""

import pytest
import torch
from support.small import small_batch, small_model, small_pair

from homodistil.config.schema import LossConfig, PruningConfig
from homodistil.data.prefetch import mean_counts
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.evaluation.gap_probe import GapProbe
from homodistil.evaluation.heldout import evaluate
from homodistil.models.encoders.bert import BERT as bert
from homodistil.pruning.calibration import calibrate
from homodistil.pruning.importance import Importance
from homodistil.pruning.protected_dims import protected_dims, variance_shares

CPU = torch.device("cpu")
# fp32 sums in another order.
CLOSE = {"rel": 1e-4}


def test_heldout_means_are_over_all_masked_rows_of_uneven_batches():
    student, teacher = Student(small_model(seed=1), LossConfig(kl=1.0)), Teacher(small_model())
    batches = [small_batch(0, (7, 11, 4)), small_batch(1, (3,)), small_batch(2, (9, 9))]
    found = evaluate(student.predict, teacher.predict, batches, CPU)
    ours = torch.cat([student.predict(b) for b in batches]).double().log_softmax(-1)
    theirs = torch.cat([teacher.predict(b) for b in batches]).double().log_softmax(-1)
    labels = torch.cat([b.target_ids for b in batches])
    assert found["masked_rows"] == len(labels)
    assert found["mlm_loss"] == pytest.approx(-ours.gather(1, labels[:, None]).mean().item(), **CLOSE)
    assert found["masked_top1"] == (ours.argmax(-1) == labels).double().mean().item()
    assert found["kl_to_teacher"] == pytest.approx((theirs.exp() * (theirs - ours)).sum(-1).mean().item(), **CLOSE)


def test_the_teacher_is_its_own_perfect_student():
    teacher = Teacher(small_model())
    found = evaluate(teacher.predict, teacher.predict, [small_batch()], CPU)
    assert found["kl_to_teacher"] == 0.0


def test_gap_is_zero_for_a_copy_and_measures_what_the_run_gives_no_weight():
    student, teacher = small_pair(kl=0.0, attention=0.0)
    gap = GapProbe(student, teacher, [small_batch()], CPU)
    assert {"kl", "attention", "attention/layer.2", "hidden", "mlm"} <= set(gap.measure())
    assert gap.measure()["kl"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        student.model.bert.encoder.layer[0].output.dense.weight.zero_()
    assert gap.measure()["kl"] > 0.01


def test_mean_counts_are_per_micro_batch_and_never_zero_rows():
    first, second = small_batch(0, (7, 4)), small_batch(1, (3, 3))
    counts = mean_counts([first, second], CPU)
    assert counts.tokens == (11 + 6) / 2 and counts.pairs == (49 + 16 + 9 + 9) / 2
    empty = first._replace(counts=first.counts._replace(target_rows=0.0))
    assert mean_counts([empty], CPU).target_rows > 0


def test_variance_shares_find_a_dim_that_dominates_a_layer_norm():
    model = small_model()
    with torch.no_grad():  # every token gets a large value in dim 5 in front of the second layer's output LayerNorm
        model.bert.encoder.layer[1].output.dense.bias[5] = 50.0
    batch = small_batch()
    shares = variance_shares(model, bert, [batch])
    assert shares.argmax() == 5 and shares[5] > 0.8
    inputs = []
    norm = model.bert.encoder.layer[1].output.LayerNorm
    handle = norm.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach()))
    Teacher(model).run(batch)
    handle.remove()
    x = inputs[0][batch.attention_mask.bool()].double()
    squared = (x - x.mean(-1, keepdim=True)).square().sum(0)
    assert shares[5] == pytest.approx((squared[5] / squared.sum()).item(), **CLOSE)


def test_protected_dims_are_above_the_threshold_and_at_most_half_the_target():
    shares = torch.tensor([0.02, 0.5, 0.2, 0.11, 0.09])
    assert protected_dims(shares, 0.1, target_width=20).tolist() == [1, 2, 3]
    assert protected_dims(shares, 0.1, target_width=4).tolist() == [1, 2]
    assert protected_dims(shares, 0.0, target_width=20).tolist() == []


def test_calibration_averages_gradients_of_micro_batches_before_the_product():
    student, teacher = small_pair()
    config = PruningConfig(ema_beta=0.0)
    table = student.axis_table()
    importance = Importance(table, config, seed=0, device=CPU)
    batches = [small_batch(0, (7, 4, 9)), small_batch(1, (5, 5, 5))]
    calibrate(importance, student, table, iter([batches]), lambda b: student(b, teacher(b)).total)
    assert all(p.grad is None for p in student.parameters())
    total = sum(student(b, teacher(b)).total for b in batches) / 2
    parameters = dict(student.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
    product = {name: (p * gradients[name]).detach().abs() for name, p in parameters.items()}
    ffn = product["model.bert.encoder.layer.0.intermediate.dense.weight"].sum(1)
    ffn = ffn + product["model.bert.encoder.layer.0.intermediate.dense.bias"]
    ffn = ffn + product["model.bert.encoder.layer.0.output.dense.weight"].sum(0)
    # Two summation orders of fp32 gradients.
    torch.testing.assert_close(importance.scores()["layer.0.ffn"], ffn, rtol=1e-3, atol=1e-6)
