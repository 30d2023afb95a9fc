"""A run whose layers leave: what is worked out beforehand, and what follows the student's new layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from families.cases import batch_of, make_model, token_ids
from support.small import small_model

from homodistil.config.command_line import parse
from homodistil.config.schema import LossConfig
from homodistil.distill.layer_map import compared_layers, copied_layers, last_of_blocks
from homodistil.distill.snapshot import StudentSnapshots
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.engine.ds_config import student_dtype
from homodistil.errors import UserError
from homodistil.models.axes import num_layers
from homodistil.pruning.importance import Importance
from homodistil.training.micro_batch import MicroBatchPolicy
from homodistil.training.resolve import ResolvedRun, resolve_run
from homodistil.training.run_summary import run_summary
from homodistil.training.shape_checks import check_shape

LINEAR = ("pruning.depth_schedule=linear", "pruning.end_fraction=0.5", "pruning.schedule=linear")
COPY = ("pruning.compensation=none",)
SIZES = ("student.preset=custom", "student.hidden_size=12", "student.intermediate_size=20")
STUDENT = (*SIZES, "student.num_attention_heads=4", "student.num_hidden_layers=3", "train.steps=40", "data.seq_len=16")


def resolved(*overrides: str) -> ResolvedRun:
    return resolve_run(parse([*STUDENT, *overrides]), small_model(num_hidden_layers=6).config)


@pytest.mark.parametrize(("num_teacher_layers", "count"), [(12, 7), (12, 6), (24, 9), (5, 1), (6, 5)])
def test_evenly_spread_layers_are_compared_as_before(num_teacher_layers, count):
    student = dataclasses.replace(parse([]).student, num_hidden_layers=count)
    spread = copied_layers(student, num_teacher_layers)
    assert last_of_blocks(spread, num_teacher_layers) == compared_layers(student, num_teacher_layers)


def test_a_layer_stands_for_those_behind_it_that_have_left():
    assert last_of_blocks((0, 1, 4, 5), 8) == (0, 3, 4, 7)
    assert last_of_blocks(range(4), 4) == (0, 1, 2, 3)


def test_the_run_starts_whole_and_ends_shallow():
    run = resolved(*LINEAR)
    assert (num_layers(run.initial), num_layers(run.target), run.target["hidden"]) == (6, 3, 12)
    assert run.depth.table == {7: 5, 13: 4, 20: 3} and run.layer_map.layers == tuple(range(6))
    assert run.make_schedule().target["layer.5.ffn"] == 20  # layers get narrower as long as they are there
    depths = [(phase.first_step, num_layers(phase.widths)) for phase in run.phases]
    assert {step: depth for step, depth in depths if step in (0, 7, 13, 20)} == {0: 6, 7: 5, 13: 4, 20: 3}
    assert depths[-1][1] == 3 and run.phases[-1].widths == run.target


def test_layers_leave_in_an_event_where_what_they_did_is_refitted():
    event, copy = resolved(), resolved(*COPY)
    assert (event.depth.table, event.depth.final, num_layers(event.initial)) == ({0: 3}, frozenset({0, 2, 4}), 6)
    assert (copy.depth.table, num_layers(copy.initial), copy.layer_map.layers) == ({}, 3, (1, 3, 5))
    assert event.targets.keys() > copy.targets.keys() and event.target == copy.target
    # What enters a layer behind which others leave has to be what it knows: without the first one it is not.
    without_first = resolved("student.init_layers=[1,3,5]")
    assert (without_first.depth.table, num_layers(without_first.initial)) == ({}, 3)
    fresh = resolved("student.init=random", "pruning.schedule=none")
    assert (fresh.depth.table, num_layers(fresh.initial)) == ({}, 3)


@pytest.mark.parametrize(
    ("overrides", "saved", "layers"),
    [
        ((), [0, 1, 2], [0, 2, 4]),  # of a run of before, that was a copy of three layers
        ((), [0, 2, 4], [0, 2, 4]),
        (("student.layer_choice=influence",), [0, 1, 2], [0, 1, 2]),
        (LINEAR, [0, 2, 3, 4], [0, 2, 3, 4]),
        (COPY, [0, 1, 2], [0, 1, 2]),
    ],
)
def test_a_checkpoint_says_which_layers_are_left(overrides, saved, layers):
    assert resolved(*overrides).depth.layers_left(saved) == layers


def test_before_the_first_step_widths_know_the_layers_that_stay_alone():
    run = resolved("student.layer_choice=influence", "pruning.schedule=one_shot")
    assert run.depth.table == {0: 3} and run.depth.final is None
    schedule = run.make_schedule()
    assert num_layers(schedule.target) == 3 and num_layers(run.initial) == 6
    assert [(phase.first_step, phase.widths) for phase in run.phases] == [(0, run.target)]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            LINEAR,
            "of which 0, 2, 4 stay; the others leave in 3 events of steps 7 to 20, and what they did is refitted; ",
        ),
        ((*LINEAR, *COPY), "of which 0, 2, 4 stay; the others leave in 3 events of steps 7 to 20; compared"),
        ((*LINEAR, "student.layer_choice=influence"), "of which 3 by block influence stay; the others leave in 3"),
        (
            ("student.layer_choice=influence",),
            "3 by block influence stay; the others leave before step 1, and what they",
        ),
        ((), "copies of all 6 of the teacher's, of which 0, 2, 4 stay; the others leave before step 1, and what they"),
        (COPY, "copies of the teacher's 0, 2, 4; compared (hidden, attention) with the teacher's 1, 3, 5"),
    ],
)
def test_the_summary_says_which_layers_stay_and_when_the_others_leave(overrides, text):
    told = run_summary(resolved(*overrides))
    assert text in told["layers"] and told["student"].startswith("3 layers, hidden 12")


def test_milestones_and_losses_without_a_last_layer_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"run.export_milestones: found \[0.5\].*depth_schedule=linear") as caught:
        parse([*STUDENT, *LINEAR, "run.export_milestones=[0.5]"])
    assert "\n" not in str(caught.value)
    only = ("loss.mlm=0", "loss.kl=0", "loss.hidden=0", "loss.embedding=0")
    with pytest.raises(UserError, match="pruning.depth_schedule: found linear with losses") as caught:
        check_shape(resolved(*LINEAR, *only))
    assert "\n" not in str(caught.value)
    check_shape(resolved(*only))
    check_shape(resolved("student.layer_choice=influence", *only))
    check_shape(resolved(*LINEAR))


def test_of_a_new_last_layer_nothing_is_trained_that_no_term_reads():
    """Relations alone: what the last layer puts out is nobody's."""
    student = Student(small_model(num_hidden_layers=4), LossConfig().only(relations=1.0))
    student.keep_layers([0, 2])
    fresh = Student(small_model(num_hidden_layers=2), LossConfig().only(relations=1.0))
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert "model.bert.encoder.layer.1.output.dense.weight" not in trained
    assert "model.bert.encoder.layer.0.output.dense.weight" in trained


def test_parameters_are_counted_without_the_layers_that_left():
    run = resolved(*LINEAR)
    engine = {"train_batch_size": 32, "zero_optimization": {"stage": 2}}
    policy = MicroBatchPolicy(run.config, engine, run.student, student_dtype(engine), 2, "cpu")
    student = Student(small_model(num_hidden_layers=6), run.config.loss)
    whole = policy.parameter_counts(student.widths)
    student.keep_layers([0, 1, 4])
    assert policy.parameter_counts(student.widths) == (sum(p.numel() for p in student.parameters()), 0) != whole


def test_parameters_of_layers_are_all_that_leaves():
    student = Student(make_model("bert", layers=4), LossConfig(kl=1.0))
    before = {p: name for name, p in student.named_parameters()}
    leaving = student.layer_parameters([1, 3])
    student.keep_layers([0, 2])
    assert {before[p] for p in student.parameters()} == set(before.values()) - leaving
    assert len([name for name in leaving if name.startswith("projections.")]) == 2


def test_scores_stay_with_their_layers():
    table = Student(make_model("bert", layers=4), LossConfig()).axis_table()
    importance = Importance(table, parse([]).pruning, 0, torch.device("cpu"))
    for axis, score in importance.average.items():
        score.fill_(float(axis.split(".")[1]) if axis.startswith("layer.") else -1.0)
    importance.keep_layers([0, 2, 3])
    kept = {axis: float(score.mean()) for axis, score in importance.average.items()}
    assert [kept[f"layer.{i}.ffn"] for i in range(3)] == [0, 2, 3] and kept["hidden"] == -1
    assert "layer.3.ffn" not in kept and importance.uncertainty.keys() == kept.keys()


@pytest.mark.parametrize("relations", [0.0, 1.0])
def test_a_snapshot_of_a_student_whose_layers_left_is_the_student(relations):
    """The mould was made before: its layers, taps and projections follow, the values of another last layer too."""
    student = Student(make_model("bert", layers=4), LossConfig(kl=1.0, relations=relations))
    snapshots = StudentSnapshots(student)
    student.keep_layers([0, 1, 2])
    student.keep_layers([0, 2])
    weights = {name: parameter.detach() for name, parameter in student.named_parameters()}
    made, batch = snapshots.make(weights, torch.float32), batch_of(token_ids())
    teacher = make_model("bert", layers=4)
    if relations:
        teacher.bert.encoder.layer[-1].attention.self.homodistil_shows_values = True
    ours, theirs = (each(batch, Teacher(teacher)(batch)).terms for each in (made, student))
    assert ours == theirs and "hidden/layer.1" in ours and "hidden/layer.2" not in ours
    assert made.layers == (0, 2) and made.layer_map.layers == (1, 3)
