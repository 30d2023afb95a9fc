"""Compensated events of the whole student: the model's part is the compensated model, W follows the residual stream."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from support.small import random_keep, small_batch, small_model, small_pair

from homodistil.config.rules import check
from homodistil.config.schema import LossConfig, RunConfig
from homodistil.data.batch import Batch
from homodistil.distill.snapshot import duplicate
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.errors import UserError
from homodistil.evaluation.gap_probe import GapProbe
from homodistil.pruning.compensation import Options, compensate
from homodistil.pruning.compensation.depth import compensate_layers
from homodistil.pruning.compensation.student import propose, propose_layers, residual_map
from homodistil.pruning.schedule import stage_widths
from homodistil.training import compensated_events
from homodistil.training.compensated_events import Compensation, calibration_config
from homodistil.training.shrinkable import PlainStudent

WIDTHS = {"hidden": 17, "layer.0.ffn": 31, "layer.1.heads": 3, "layer.1.qk_dim": 5, "layer.1.vo_dim": 5}
BATCHES = [small_batch(seed, (11, 9, 16)) for seed in range(3)]
NONE = torch.empty(0, dtype=torch.int64)


def student_of(side: str) -> Student:
    student, _ = small_pair(projection=side)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for projection in student.projections.values():  # trained by now
            projection.weight.add_(torch.randn(projection.weight.shape, generator=generator), alpha=0.1)
    return student.eval()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("fixed", [NONE, torch.tensor([3, 20])])
def test_full_event(side, fixed):
    student, options = student_of(side), Options(mode="full")
    before, keep = copy.deepcopy(student.state_dict()), random_keep(student.axis_table(), WIDTHS)
    proposal = propose(student, keep, BATCHES, options, fixed)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())  # nothing applied yet

    after = PlainStudent(duplicate(student)).after(proposal)
    assert {axis: after.widths[axis] for axis in WIDTHS} == WIDTHS
    table = student.family.axis_table(student.model)
    alone = compensate(student.model, student.family, table, keep, BATCHES, options, fixed)
    expected = Student(alone.model, student.objective.config, distil=False).predict(BATCHES[0])
    torch.testing.assert_close(after.predict(BATCHES[0]), expected, rtol=0, atol=1e-6)  # the same fp32 weights

    p = residual_map(student, alone.plan)
    for name, projection in student.projections.items():
        weight = projection.weight.detach().double().numpy()
        expected = weight @ p.numpy() if side == "student" else p.numpy().T @ weight
        # fp32 roundings of 24 products of entries up to 1.4
        torch.testing.assert_close(
            after.projections[name].weight.detach().double().numpy(), expected, rtol=0, atol=3e-6
        )
    if len(fixed):
        assert p[:, :2].nonzero().tolist() == [[3, 0], [20, 1]]


def test_refit_event_selects_and_refits():
    student = student_of("student")
    keep = random_keep(student.axis_table(), WIDTHS)
    proposal = propose(student, keep, BATCHES, Options(mode="refit"), NONE)
    assert not proposal.plan.maps
    assert all(torch.equal(index, proposal.plan.keep[axis]) for axis, index in keep.items())
    after = PlainStudent(duplicate(student)).after(proposal)
    projection = student.projections["layer_2"].weight
    assert torch.equal(after.projections["layer_2"].weight, projection[:, keep["hidden"]])


def test_an_event_in_which_layers_leave():
    """Names are those of the shallower student; what its W compare does not change; nothing is applied yet."""
    teacher = small_model(num_hidden_layers=5)
    student = Student(teacher, LossConfig(kl=1.0, hidden=1.0)).eval()
    before, kept = copy.deepcopy(student.state_dict()), [0, 1, 4]
    proposal = propose_layers(student, kept, BATCHES, Options())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())

    plain, target = duplicate(student), PlainStudent(duplicate(student))
    plain.keep_layers(kept)
    target.keep_layers(kept)
    after = target.after(proposal)
    alone = compensate_layers(student.model, student.family, kept, BATCHES, Options()).model
    expected = Student(alone, student.objective.config, distil=False).predict(BATCHES[0])
    torch.testing.assert_close(after.predict(BATCHES[0]), expected, rtol=0, atol=1e-6)  # the same fp32 weights
    assert after.layer_map.layers == (0, 3, 4) and after.widths == plain.widths
    assert all(torch.equal(w.weight, plain.projections[name].weight) for name, w in after.projections.items())
    # Layer 1 takes over what 2 and 3 did: the model comes nearer, and so does what layer 1 is compared with.
    gaps = [GapProbe(each, Teacher(teacher), BATCHES, torch.device("cpu")).measure() for each in (plain, after)]
    assert gaps[1]["kl"] < 0.5 * gaps[0]["kl"] and gaps[1]["hidden/layer.1"] < 0.5 * gaps[0]["hidden/layer.1"]


def test_stages_have_equal_ratios_and_end_on_the_target():
    initial, target = {"hidden": 128, "layer.0.ffn": 512, "layer.0.heads": 2}, {"hidden": 32, "layer.0.ffn": 128}
    assert stage_widths(initial, target, 1) == [target]
    assert stage_widths(initial, target, 2) == [{"hidden": 64, "layer.0.ffn": 256}, target]
    assert stage_widths(initial, {}, 3) == []
    narrow = stage_widths({"layer.0.heads": 3}, {"layer.0.heads": 2}, 5)
    assert narrow == [{"layer.0.heads": 2}]  # 2.77, 2.55, 2.35, ...: one head goes, in the stage that is nearest


@pytest.mark.parametrize(
    ("wanted", "ranks", "micro_batch", "found"), [(128, 1, 32, 128), (128, 3, 32, 192), (5, 4, 8, 8)]
)
def test_calibration_is_shared_evenly(wanted, ranks, micro_batch, found):
    config = RunConfig()
    config.pruning.compensation_sequences, config.train.micro_batch_size = wanted, micro_batch
    calibration, num_sequences = calibration_config(config, ranks)
    assert num_sequences == calibration.train.global_batch_size == found
    assert num_sequences % (calibration.train.micro_batch_size * ranks) == 0
    assert config.train == dataclasses.replace(RunConfig().train, micro_batch_size=micro_batch)


@pytest.mark.parametrize(
    ("pruning", "loss", "text"),
    [
        ({"one_shot_stages": 2, "compensation": "full", "schedule": "cubic"}, {}, "pruning.one_shot_stages: found 2"),
        ({"one_shot_stages": 2, "schedule": "one_shot", "compensation": "none"}, {}, "one_shot_stages: found 2"),
        ({"compensation": "full"}, {"projection_learned": False}, "loss.projection_learned: found false"),
        ({"compensation": "project"}, {"projection_learned": False}, "loss.projection_learned: found false"),
        ({"compensation": "refit", "basis": "learned"}, {}, "pruning.basis: found learned, allowed with .*=refit is"),
        ({"compensation": "none", "basis": "pca"}, {}, "pruning.basis: found pca, allowed with .*=none is auto"),
    ],
)
def test_settings_that_do_not_go_together(pruning, loss, text):
    config = RunConfig()
    config.pruning = dataclasses.replace(config.pruning, **pruning)
    config.loss = dataclasses.replace(config.loss, **loss)
    with pytest.raises(UserError, match=text):
        check(config)


def test_compensation_is_without_effect_where_nothing_is_cut():
    """Our default must not be in the way of a student that has its size from the start."""
    config = RunConfig()
    config.student.init, config.pruning.schedule, config.loss.projection_learned = "random", "none", False
    assert config.pruning.compensation == "auto"
    check(config)


@pytest.mark.parametrize(
    ("basis", "with_head", "chosen"),
    [
        ("auto", True, "fisher"),
        ("auto", False, "pca"),
        ("pca", True, "pca"),
        ("fisher", True, "fisher"),
        ("learned", True, "learned"),
        ("learned", False, "learned"),
    ],
)
def test_the_basis_that_a_config_asks_for(basis, with_head, chosen):
    compensation = FixedBatches(0.25)
    compensation.run_inputs.with_head, pruning = with_head, compensation.config.pruning
    pruning.compensation, pruning.basis, pruning.basis_steps, pruning.basis_lr = "project", basis, 7, 0.3
    options = compensation.options(consumed_samples=64)
    assert (options.mode, options.basis, options.basis_steps, options.basis_lr) == ("project", chosen, 7, 0.3)


class FixedBatches(Compensation):
    """On batches of the small model's."""

    def __init__(self, limit: float) -> None:
        self.config = RunConfig()
        self.config.pruning.compensation, self.config.pruning.compensation_limit = "full", limit
        self.run_inputs = SimpleNamespace(with_head=True, sentence_modules=None, pooling=None, logits=None)

    def batches(self, consumed_samples: int) -> list[Batch]:
        return BATCHES


@pytest.mark.parametrize(
    ("losses", "fixed"),
    [
        ([4.0, 4.2], []),
        ([4.0, 3.9], []),
        ([4.0, 4.4, 4.2], [5]),
        ([4.0, 4.4, 4.3], None),
        ([4.0, float("nan"), 4.1], [5]),
    ],
)
def test_dims_that_cost_too_much_to_rotate_stay(losses, fixed, capsys):
    """Losses: before, rotated, rotated but for the protected dim; the limit is 0.25."""
    student, _ = small_pair()
    given, expected, weights = iter(losses), losses[-1], copy.deepcopy(student.state_dict())

    def loss(rotated: Student) -> float:
        assert rotated.widths == student.widths
        return next(given)

    compensation = FixedBatches(0.25)
    if fixed is None:
        assert compensation.allowed_fixed_dims(student, torch.tensor([5]), loss) is None
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1 and "+0.400, then +0.300 (limit 0.25); too much" in printed
        assert "as with pruning.compensation=refit" in printed
    else:
        assert compensation.allowed_fixed_dims(student, torch.tensor([5]), loss).tolist() == fixed
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1 and f"{expected - losses[0]:+.3f} (limit 0.25)" in printed
        assert ("dims 5 kept" in printed) == bool(fixed)
    assert next(given, None) is None
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(("most", "num_batches"), [(1, 1), (3, 1), (4, 2), (100, 3)])
def test_a_rotation_is_checked_with_the_first_sequences(most, num_batches, monkeypatch):
    seen, rotation_only = [], compensated_events.rotation_only

    def seeing(model, family, table, batches, *rest):
        seen.append(batches)
        return rotation_only(model, family, table, batches, *rest)

    monkeypatch.setattr(compensated_events, "rotation_only", seeing)
    monkeypatch.setattr(compensated_events, "CHECK_SEQUENCES", most)
    FixedBatches(0.25).allowed_fixed_dims(small_pair()[0], NONE, lambda _: 4.0)
    assert seen == [BATCHES[:num_batches]]
