"""What every field says of itself, and that the runs derived from one read it there."""

import copy
import dataclasses
import typing
from dataclasses import dataclass

import pytest

from homodistil.config import derive
from homodistil.config.command_line import parse
from homodistil.config.option import (
    COMPUTED,
    COMPUTED_KEY,
    CORRECTION,
    DERIVED_RUNS,
    KEY,
    MEASUREMENT,
    SAME,
    missing_facts,
    option,
    option_of,
)
from homodistil.config.rules import check
from homodistil.config.schema import OPTIONS, SECTIONS, RunConfig, value_of
from homodistil.errors import UserError

FACTS = {"resume": "fixed", "students": "own", "derived": SAME}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_says_all_of_itself(section):
    assert missing_facts(SECTIONS[section]) == []
    assert {f"{section}.{field.name}" for field in dataclasses.fields(SECTIONS[section])} <= OPTIONS.keys()


@pytest.mark.parametrize("missing", FACTS)
def test_a_field_that_says_too_little_cannot_be_declared(missing):
    with pytest.raises(TypeError, match=missing):
        option(1, low=0, high=2, **{name: value for name, value in FACTS.items() if name != missing})


def test_a_field_without_range_or_outside_of_option_is_noticed():
    @dataclass
    class Section:
        plain: int = 3
        open_ended: int = option(3, low=0, **FACTS)
        text: str = option("a", **FACTS)
        both: bool = option(True, low=0, high=1, **FACTS)
        unknown: bool = option(True, resume="fixed", students="own", derived={"holiday": 1})
        choice: typing.Literal["a", "b"] = option("a", **FACTS)
        number: float | None = option(None, low=0, high=1, **FACTS)

    assert missing_facts(Section) == [
        "plain: is not declared by option(...)",
        "open_ended: needs one of: choices, low and high, limited_by",
        "text: needs one of: choices, low and high, limited_by",
        "both: needs one of: choices, low and high, limited_by",
        "unknown: knows no derived run holiday",
    ]
    with pytest.raises(TypeError, match="plain"):
        option_of(dataclasses.fields(Section)[0])


def test_defaults_are_within_their_limits_and_lists_are_not_shared():
    check(RunConfig())
    RunConfig().data.sources.append("x")
    assert RunConfig().data.sources == ["embedded"]


@pytest.mark.parametrize("name", [name for name, facts in OPTIONS.items() if facts.limits])
def test_limits_are_enforced(name):
    config, limits = RunConfig(), OPTIONS[name].limits
    section, field = name.split(".")
    outside = limits.low if limits.exclude in ("low", "both") else limits.low - 1
    wrong = {list: [outside], dict: {"x": outside}}.get(type(value_of(config, name)), outside)
    setattr(getattr(config, section), field, wrong)
    with pytest.raises(UserError, match=rf"{name}(\.x)?: found {outside}, allowed [\[(]"):
        check(config)


def test_the_facts_that_runs_in_old_folders_depend_on():
    """A change here refuses old folders, lets them go on with something else, or trains their teachers again."""
    free = {name for name, facts in OPTIONS.items() if facts.resume == "free" and not name.startswith("run.")}
    assert free == {
        "teacher.dtype",
        "teacher.allow_pickle",
        "teacher.plugins",
        "teacher.shard",
        "teacher.outputs",  # the same numbers, out of files
        "data.task",  # auto, which follows from the teacher, is written down as what it follows to
        "data.check_label_order",  # before the first step alone
        "data.cache_dir",
        "data.workers",
        "data.shard_bytes",
        "train.micro_batch_size",
        "train.save_every_steps",
        "train.eval_every_steps",
        "train.eval_batch_size",
        "train.log_every_steps",
        "loss.plugins",
        "optimizer.implementation",
    }
    fixed_of_run = {name for name, facts in OPTIONS.items() if facts.resume == "fixed" and name.startswith("run.")}
    assert fixed_of_run == {"run.export_milestones", "run.settle_steps", "run.settle_cooldown"}
    assert {n for n, facts in OPTIONS.items() if facts.resume == "content"} == {"teacher.name", "data.sources"}
    config = parse(["teacher.correction_steps=7", "teacher.correction_lr=0.5", "train.seed=3", "train.lr_steps=2000"])
    assert derive.correction_key(config) == {
        "steps": 7,
        "global_batch_size": config.train.global_batch_size,
        "lr": 0.5,
        "warmup_fraction": config.train.warmup_fraction,
        "weight_decay": config.train.weight_decay,
        "gradient_clipping": config.train.gradient_clipping,
        "seed": derive.SEED_OFFSET,
        "optimizer": dataclasses.asdict(config.optimizer),
        "mask_probability": config.data.mask_probability,
    }


def test_all_that_moves_the_corrected_weights_is_decided():
    """Rates and batches: part of the key, or the same in every correction. The rest neither moves nor is rounding."""
    decided = {name for name, facts in OPTIONS.items() if CORRECTION in facts.derived}
    without_effect = {"train.micro_batch_size", "train.eval_batch_size", "train.log_every_steps"}
    without_effect |= {"train.cool_steps", "train.rewarm_steps"}  # no cool_from; nothing is resized
    assert {name for name in OPTIONS if name.startswith(("train.", "optimizer."))} - decided == without_effect


@pytest.mark.parametrize("run", DERIVED_RUNS)
def test_derived_runs_have_what_fields_declare(run):
    config = parse([])
    before, declared = copy.deepcopy(config), {n: o.derived[run] for n, o in OPTIONS.items() if run in o.derived}
    assert declared, "no field knows it"
    computed = {name: f"new {name}" for name, value in declared.items() if value in (COMPUTED, COMPUTED_KEY)}
    derived = derive.derive(config, run, computed)
    assert config == before
    for name in OPTIONS:
        wanted = computed.get(name, declared.get(name, KEY))
        assert value_of(derived, name) == (value_of(config, name) if wanted is KEY else wanted)
    with pytest.raises(ValueError, match=run):
        derive.derive(config, run, computed | {"train.nothing": 1})


def test_a_measurement_does_nothing_that_costs_time_beside_its_steps():
    """A new field that makes a run save, evaluate, export or train more belongs here; its `derived` says 0 for it."""
    config = parse(["recipe=quickstart", "train.save_every_steps=1", "train.eval_every_steps=1"])
    config.run.export_milestones, config.run.settle_steps, config.run.compare = [0.75], 5, ["one_shot"]
    short = derive.compressed_schedule(config)
    assert short.train.steps == derive.STEPS_A_WIDTH * (derive.NUM_EVENTS + 1)
    assert (short.train.save_every_steps, short.train.eval_every_steps, short.teacher.correction_steps) == (0, 0, 0)
    assert (short.run.export_milestones, short.run.settle_steps, short.run.compare) == ([], 0, [])
    assert {
        name for name, o in OPTIONS.items() if name.endswith("_every_steps") and MEASUREMENT not in o.derived
    } == set()
    assert derive.measurement_inputs(short).teacher.correction_steps == 1


def test_a_trial_step_is_one_micro_batch_per_rank():
    small = derive.small_config(parse(["train.micro_batch_size=4", "run.resume=auto"]), num_ranks=3)
    assert small.train.global_batch_size == small.pruning.compensation_sequences == 12
    assert (small.run.resume, small.pruning.calibration_batches, small.train.log_every_steps) == ("never", 1, 1)


def test_the_learning_rates_of_a_correction_are_its_own():
    """They are in no key: as the run's they would make the cached teacher depend on who made it first."""
    config = parse(["teacher.correction_steps=9", "train.lr_steps=4000", "train.cool_from=[3]", "train.cool_steps=5"])
    correction = derive.correction_config(config)
    assert (correction.train.lr_steps, correction.train.cool_from, correction.train.steps) == (0, [], 9)
