"""Milestones: which stock shape a fraction means, and schedules that pass these shapes exactly and end on target."""

import functools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from homodistil.config.command_line import parse
from homodistil.config.schema import PruningConfig, RunConfig, RunFolderConfig, StudentConfig, TrainConfig
from homodistil.errors import UserError
from homodistil.models.encoders.bert import BERT
from homodistil.models.shapes import student_widths
from homodistil.models.stock_shape import Shape
from homodistil.pruning.gap_schedule import GapSchedule
from homodistil.pruning.milestones import Route, plan_route
from homodistil.pruning.pruner import width_schedule
from homodistil.pruning.schedule import WidthSchedule

BASE, TINY = Shape(768, 3072, 12), Shape(128, 512, 2)


def _widths(shape: Shape, layers: int = 2) -> dict[str, int]:
    head_dim = shape.hidden_size // shape.num_attention_heads
    of_layer = {"ffn": shape.intermediate_size, "heads": shape.num_attention_heads}
    of_layer |= {"qk_dim": head_dim, "vo_dim": head_dim}
    own = {f"layer.{i}.{kind}": width for i in range(layers) for kind, width in of_layer.items()}
    return {"hidden": shape.hidden_size, **own}


HALF = Shape(64, 256, 2)


def _config(fractions, steps=400, settle=0, final=HALF, **pruning) -> RunConfig:
    values = {"interval_steps": 5, "end_fraction": 0.5, "max_event_fraction": 0.5, "ffn_multiple": 1} | pruning
    return RunConfig(
        student=StudentConfig(preset="custom", **final._asdict()),
        train=TrainConfig(steps=steps),
        pruning=PruningConfig(**{"schedule": "cubic"} | values),
        run=RunFolderConfig(export_milestones=list(fractions), settle_steps=settle),
    )


def _route(config: RunConfig, teacher: Shape) -> Route:
    widths = _widths(teacher)
    return plan_route(config.run, config.pruning, widths, *student_widths(config.student, widths))


def schedule_of(config, teacher, initial, target):
    route = plan_route(config.run, config.pruning, teacher, initial, target)
    return width_schedule(config.pruning, config.train.steps, initial, target, route)


def _shapes(config: RunConfig, teacher: Shape) -> list[Shape]:
    found = [m.widths for m in _route(config, teacher).milestones]
    return [Shape(w["hidden"], w["layer.0.ffn"], w["layer.0.heads"]) for w in found]


def test_fractions_of_the_embedded_teacher_become_stock_shapes_in_proportion():
    config = _config([0.5, 0.333, 0.75], final=Shape(42, 168, 2))
    # Sorted; heads of 48, 32 and 21; feed-forward: the share of 512 .. 168 that 128 .. 42 has left, by hand.
    assert _shapes(config, TINY) == [Shape(96, 384, 2), Shape(64, 256, 2), Shape(42, 168, 2)]


def test_heads_and_multiples_of_a_large_teacher_fit_together():
    config = _config([0.75, 0.5, 0.333], final=Shape(256, 1024, 8), width_multiple=64, ffn_multiple=64)
    shapes = _shapes(config, BASE)
    assert [shape.hidden_size for shape in shapes] == [576, 384, 256] and shapes[-1] == Shape(256, 1024, 8)
    head_dims = [shape.hidden_size / shape.num_attention_heads for shape in (BASE, *shapes)]
    assert head_dims == sorted(head_dims, reverse=True) and all(dim.is_integer() for dim in head_dims)
    heads = [shape.num_attention_heads for shape in (BASE, *shapes)]
    assert heads == sorted(heads, reverse=True)


@pytest.mark.parametrize(
    "fractions, changes, message",
    [
        ([0.3], {}, r"0.3 of the teacher's hidden size 128 is 38, .* from 128 to 64; allowed: .* 0.5 .* and 1"),
        ([0.75, 0.752], {}, "0.752 and 0.75 of the teacher's 128 both mean hidden size 96"),
        ([0.9], {"width_multiple": 64}, "no hidden size between 64 and 128 near 115 .*width_multiple .64"),
    ],
)
def test_milestones_off_the_way_are_refused(fractions, changes, message):
    with pytest.raises(UserError, match="run.export_milestones: .*" + message):
        _route(_config(fractions, **changes), TINY)


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["cubic", "linear"]),
    fractions=st.lists(st.floats(0.3, 0.95), min_size=1, max_size=4, unique=True),
    final=st.sampled_from([Shape(42, 168, 2), Shape(32, 100, 2), Shape(36, 511, 4), Shape(64, 256, 8)]),
    settle=st.integers(0, 25),
    interval=st.integers(1, 12),
    fraction=st.sampled_from([0.25, 0.5, 1.0]),
    start=st.sampled_from([0.0, 0.1]),
    multiples=st.sampled_from([(1, 1), (4, 8)]),
)
def test_every_milestone_is_passed_exactly_and_held(
    kind, fractions, final, settle, interval, fraction, start, multiples
):
    teacher = Shape(128, 512, 8 if final.num_attention_heads > 2 else 2)
    pruning = {"schedule": kind, "interval_steps": interval, "max_event_fraction": fraction, "start_fraction": start}
    pruning |= {"width_multiple": multiples[0], "ffn_multiple": multiples[1]}
    config, widths = _config(fractions, settle=settle, final=final, **pruning), _widths(teacher)
    initial, target = student_widths(config.student, widths)
    try:
        schedule = schedule_of(config, widths, initial, target)
    except UserError as error:
        assume("both mean" not in str(error) and "allowed: fractions" not in str(error))
        # Only what cannot be: too few events for cuts of this size, multiples without a shape.
        assert "events of at most" in str(error) or "no hidden size" in str(error), error
        return
    on_the_way, held_until, exported = list(schedule.route.on_the_way(target)), 0, []
    now = dict(initial)
    for step in range(401):
        due = schedule.table.get(step, {})
        assert not due or step >= held_until, "an event while a milestone is held"
        for axis, width in due.items():
            assert width < now[axis]
            multiple = {"hidden": multiples[0], "ffn": multiples[1]}.get(axis.rsplit(".", 1)[-1], 1)
            assert now[axis] - width <= max(fraction * now[axis] + 1e-6, multiple)
        now |= due
        assert schedule.reached(step) | {} == {axis: w for axis, w in now.items() if w != initial[axis]}
        if milestone := schedule.milestone_due(step, now):
            exported += [] if milestone in exported else [milestone]
        if due and on_the_way and now == on_the_way[0].widths:
            assert BERT.stock_head_dim(now) == now["layer.0.qk_dim"], "padded"
            on_the_way.pop(0)
            held_until = step + settle + 1
    assert not on_the_way and now == target and tuple(exported) == schedule.route.milestones
    assert schedule.end_step <= max(round(400 * 0.5), 1) and max(schedule.table) <= schedule.end_step


def test_the_shipped_recipe_passes_its_three_widths():
    config, widths = parse(["recipe=family"]), _widths(TINY)
    schedule = schedule_of(config, widths, *student_widths(config.student, widths))
    assert [milestone.widths["hidden"] for milestone in schedule.route.milestones] == [96, 64, 42]
    assert schedule.table[max(schedule.table)]["hidden"] == 42 and max(schedule.table) <= 0.6 * config.train.steps


def test_without_milestones_nothing_moves():
    config, widths = _config([], end_fraction=0.3, max_event_fraction=0.25), _widths(TINY)
    ends = student_widths(config.student, widths)
    ours, plain = schedule_of(config, widths, *ends), WidthSchedule(*ends, config.pruning, 400)
    assert ours.table == plain.table and ours.end_step == plain.end_step == 120
    assert not any(ours.milestone_due(step, ends[1]) for step in range(401))


def test_a_milestone_that_skipped_updates_have_made_late_is_not_passed_by():
    config, widths = _config([0.75]), _widths(TINY)
    initial, target = student_widths(config.student, widths)
    schedule = schedule_of(config, widths, initial, target)
    (arrival,) = schedule.arrivals
    late = arrival + 40
    assert schedule.reached(late)["hidden"] < 96
    assert schedule.reached(late, initial)["hidden"] == 96
    at_milestone = initial | schedule.reached(late, initial)
    assert schedule.milestone_due(late, at_milestone).fraction == 0.75
    assert schedule.reached(late + 1, at_milestone)["hidden"] < 96


def test_holding_longer_than_pruning_lasts_is_refused():
    with pytest.raises(UserError, match=r"run.settle_steps: 100 for each of 2 milestones is 200 steps.* has 200"):
        config, widths = _config([0.9, 0.75], settle=100), _widths(TINY)
        schedule_of(config, widths, *student_widths(config.student, widths))


def test_too_few_events_for_the_milestones_are_refused():
    with pytest.raises(UserError, match="run.export_milestones: passing all of them takes . events .* there are 2"):
        config, widths = _config([0.9, 0.75], interval_steps=100), _widths(TINY)
        schedule_of(config, widths, *student_widths(config.student, widths))


@settings(max_examples=60)
@given(
    fractions=st.lists(st.sampled_from([0.9, 0.75, 0.6, 0.5]), min_size=1, max_size=3, unique=True),
    settle=st.integers(0, 20),
    cost=st.floats(0.0, 20.0),
    recovery=st.floats(0.0, 0.5),
    skipped=st.sets(st.integers(1, 200), max_size=30),
)
def test_the_closed_loop_stops_at_milestones_too(fractions, settle, cost, recovery, skipped):
    config = _config(fractions, settle=settle, schedule="gap", max_event_fraction=0.25)
    widths = _widths(TINY)
    initial, target = student_widths(config.student, widths)
    schedule = schedule_of(config, widths, initial, target)
    assert isinstance(schedule, GapSchedule)
    now, kl, seen, held_until, exported, last = dict(initial), 0.0, [], 0, [], 0

    def after(due: dict[str, int], now: dict[str, int], kl: float) -> float:
        return kl + cost * sum((now[axis] - width) / initial[axis] for axis, width in due.items())

    for step in range(1, 401):
        kl *= 1 - recovery
        if step not in skipped and schedule.is_due(step, now):
            assert step > held_until, "an event while a milestone is held"
            if decision := schedule.decide(step, now, kl, functools.partial(after, now=now, kl=kl)):
                before, kl, now, last = kl, after(decision.widths, now, kl), now | decision.widths, step
                schedule.after_event(step, before, kl, decision.forced)
                if any(now == m.widths for m in schedule.milestones):
                    seen.append(dict(now))
                    held_until = step + settle
        if (found := schedule.milestone_due(step, now)) and found not in exported:
            exported.append(found)
    assert now == target and seen == [m.widths for m in schedule.milestones]
    assert tuple(exported) == schedule.route.milestones
    assert last <= schedule.end_step == 200 or skipped
