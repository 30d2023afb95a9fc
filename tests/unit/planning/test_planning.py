"""The plan: counts against the real model, sums against brute force, fits against a known machine, errors, files."""

import functools
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homodistil.config.command_line import parse
from homodistil.distill.cost import step_flops
from homodistil.engine.build import load_engine_config, resolve_engine_config
from homodistil.errors import UserError
from homodistil.metrics.result_table import write_result
from homodistil.models.memory import state_bytes
from homodistil.models.shapes import student_widths
from homodistil.planning.advice import HEADROOM, advise
from homodistil.planning.cluster import find_cluster
from homodistil.planning.machine_calibration import Sample, fit, read_calibration, write_calibration
from homodistil.planning.options import split_options
from homodistil.planning.plan import make_plan, policy_of
from homodistil.planning.speed import expected_seconds
from homodistil.planning.step_work import NAMES, StepWork
from homodistil.planning.table import format_plan
from homodistil.pruning.pruner import width_schedule
from homodistil.report import write_report
from homodistil.training.resolve import resolve_run

ROOT = Path(__file__).parents[3]
PLAN = ROOT / "launcher" / "plan.py"
ENGINES = {stage: load_engine_config(ROOT / "ds_configs" / f"zero{stage}.json") for stage in range(4)}
A100S = find_cluster("A100-80", 8)


def _quickstart(*overrides: str):
    return parse(["recipe=quickstart", *overrides])


@functools.cache
def _paper():
    """The paper's run, resolved."""
    return resolve_run(parse(["recipe=paper"]))


@functools.cache
def _of_paper(device: str):
    """The plan of the paper's run on eight of these: seconds each, and several tests look at one."""
    return make_plan(_paper(), ENGINES[2], find_cluster(device, 8))


def test_parameters_are_those_of_the_exported_student_and_its_projections(cache_dir):
    plan = make_plan(resolve_run(_quickstart(f"data.cache_dir={cache_dir}")), ENGINES[2], find_cluster("H100", 2))
    projections = 3 * 64 * 128  # embedding and two layers
    assert plan.stretches[-1].parameters == 2_121_210 + projections and plan.stretches[-1].hidden_size == 64
    assert plan.stretches[0].parameters == 4_416_698 + 3 * 128 * 128


def test_stretches_are_the_schedule_step_by_step(cache_dir):
    config = _quickstart(f"data.cache_dir={cache_dir}", "pruning.start_fraction=0.05")
    subject = resolve_run(config)
    initial, target = student_widths(config.student, subject.teacher_widths)
    schedule = width_schedule(config.pruning, config.train.steps, initial, target)
    by_step = [stretch.widths for stretch in subject.phases for _ in range(stretch.num_steps)]
    assert by_step == [initial | schedule.reached(step) for step in range(config.train.steps)]
    assert all(a.first_step + a.num_steps == b.first_step for a, b in itertools.pairwise(subject.phases))


def test_flops_of_a_run_are_those_of_its_steps(cache_dir):
    config = _quickstart(f"data.cache_dir={cache_dir}")
    subject = resolve_run(config)
    plan = make_plan(subject, ENGINES[2], find_cluster("H100", 2))
    data, batch = config.data, config.train.global_batch_size
    whole = 0.0
    for widths, count in ((s.widths, s.num_steps) for s in subject.phases):
        rows = data.mask_probability * batch * (data.seq_len - 2)
        sizes = {"num_sequences": batch, "seq_len": data.seq_len, "target_rows": rows, "vocab_size": 30522}
        whole += count * step_flops(widths, subject.teacher_widths, config.loss, **sizes).total
    assert sum(s.flops * s.num_steps for s in plan.stretches) == pytest.approx(whole, rel=1e-12)
    hours = sum(s.step.low * s.num_steps for s in plan.stretches) / 3600
    assert plan.hours.low == pytest.approx(hours) and plan.hours.low < plan.hours.high


@pytest.mark.parametrize("stage", range(4))
def test_state_is_split_as_zero_splits_it(stage):
    """state_bytes itself is held against live engines in tests/distributed/test_memory.py and test_step_memory.py."""
    config = parse(["recipe=homobert-base-paper", "teacher.name=bert-base-uncased"])
    subject = resolve_run(config)
    plan = make_plan(subject, ENGINES[stage], A100S)
    policy = policy_of(subject, resolve_engine_config(ENGINES[stage], config.train, 8), A100S)
    memory, widths = plan.stretches[0].memory, subject.phases[0].widths
    total = memory["parameters"] + memory["gradients"] + memory["optimizer"]
    assert total == pytest.approx(state_bytes(*policy.parameter_counts(widths), policy.layout))
    assert memory["teacher"] == 2 * subject.teacher_parameters == 2 * 109_514_298
    assert plan.peak_bytes == max(stretch.total_bytes for stretch in plan.stretches) == plan.stretches[0].total_bytes


def test_the_papers_run_takes_hours_on_eight_a100():
    plan = _of_paper("A100-40")
    assert sum(stretch.num_steps for stretch in plan.stretches) == 28_000
    assert 1 < plan.hours.low < 13 < 3 * plan.hours.high and "not measured on GPU" in plan.basis
    assert plan.device_hours[0] == pytest.approx(8 * plan.hours.low)
    cheap = make_plan(_paper(), ENGINES[2], find_cluster("A100-40", 8), price=(1.0, 1.0), watts=500)
    assert cheap.usd == pytest.approx(plan.device_hours) and cheap.kwh[0] == pytest.approx(4 * plan.hours.low)


def test_more_machines_are_faster_and_a_slow_network_is_slower():
    hours = {
        (nodes, link): make_plan(_paper(), ENGINES[2], find_cluster("H100", 8, nodes, link)).hours.high
        for nodes, link in ((1, None), (4, "infiniband-ndr"), (4, "ethernet-10"))
    }
    assert hours[4, "infiniband-ndr"] < hours[1, None] and hours[4, "infiniband-ndr"] < hours[4, "ethernet-10"]


@given(
    stages=st.lists(st.floats(0.1, 3.0), min_size=4, max_size=4),
    sequence=st.floats(0.01, 1.0),
    num_sequences=st.integers(1, 64),
)
def test_advice_is_the_lowest_stage_that_fits(stages, sequence, num_sequences):
    def bytes_at(stage: int, size: int) -> float:
        return stages[stage] + sequence * size

    advice = advise(bytes_at, 1.0, num_sequences)
    sizes = [n for n in range(1, num_sequences + 1) if num_sequences % n == 0]
    fits = {s: max((n for n in sizes if bytes_at(s, n) <= HEADROOM), default=0) for s in range(4)}
    if advice.zero_stage is None:
        assert not any(fits.values()) and advice.micro_batch_size == 0
    else:
        assert advice.micro_batch_size == fits[advice.zero_stage] > 0
        useful = [stage for stage in range(4) if fits[stage] >= min(16, num_sequences)]
        assert not useful or advice.zero_stage == useful[0]


TRUE = dict(zip(NAMES, (2e-11, 3e-9, 4e-10, 5e-10, 6e-4, 7e-5, 3e-3), strict=True))


def _work(scale: float, layers: float, gathers: float = 0.0, sent: float = 1.0) -> StepWork:
    return StepWork(2e9 * scale**2, 3e7 * scale, 4e7 * scale**2, 5e6 * scale**2 * sent, layers, gathers)


def _sample(work: StepWork, slower: float = 1.0) -> Sample:
    seconds = slower * sum(TRUE[name] * getattr(work, name) for name in NAMES)
    return Sample(work, seconds, seconds / 2, 8e8 + 1e8, 1e8)


def test_a_fit_finds_a_machine_again_and_predicts_other_work():
    works = [_work(1, 8), _work(0.5, 8), _work(2, 16), _work(1, 8, 100), _work(0.5, 16, 50), _work(3, 4, 0, 2)]
    found = fit([_sample(work) for work in works], "here", {name: 1.5 * value for name, value in TRUE.items()})
    for work in (_work(1.5, 12), _work(0.7, 30, 80)):
        assert found.wall_s(work) == pytest.approx(_sample(work).wall_s, rel=0.03)
        assert found.cpu_s(work) == pytest.approx(_sample(work).cpu_s, rel=0.03)
    assert found.process_bytes == pytest.approx(8e8) and found.error == pytest.approx(0.05)


def test_what_two_widths_leave_open_stays_near_what_is_plausible():
    """A machine that is three times slower all over: kinds of work that were never seen are three times slower too."""
    found = fit([_sample(_work(s, 8), slower=3.0) for s in (1.0, 0.5)], "here", TRUE)
    unseen = _work(0.7, 8, 300)
    assert found.wall_s(unseen) == pytest.approx(_sample(unseen, slower=3.0).wall_s, rel=0.05)


def test_calibrations_are_kept_and_damaged_ones_are_named(tmp_path):
    found = fit([_sample(_work(s, 8)) for s in (1.0, 0.5)], "here", TRUE)
    write_calibration(tmp_path / "a" / "c.json", found)
    assert read_calibration(tmp_path / "a" / "c.json") == found
    for text in ("", "[]", '{"format": 0}', '{"format": 1, "wall": {}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match="--calibration: cannot use .*bad.json.*--measure"):
            read_calibration(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("A100-8", 8), r"--device: found 'A100-8'.*did you mean 'A100-80'"),
        (("H100", 0), "--devices-per-node: found 0"),
        (("H100", 8, 2, "infiniband"), "--interconnect: found 'infiniband', allowed: none, ethernet-10"),
        (("H100", 8, 2, "none"), "--interconnect: none, but --nodes is 2"),
    ],
)
def test_clusters_that_do_not_exist(arguments, said):
    with pytest.raises(UserError, match=said):
        find_cluster(*arguments)


def test_what_a_run_would_refuse_a_plan_refuses():
    with pytest.raises(UserError, match="train.global_batch_size: 32 is not divisible"):
        make_plan(resolve_run(parse(["recipe=paper", "train.global_batch_size=32"])), ENGINES[2], A100S)
    with pytest.raises(UserError, match="teacher.name: no folder '/nowhere'"):
        resolve_run(_quickstart("teacher.name=/nowhere"))
    with pytest.raises(UserError, match="--price"):
        split_options(["--price", "-1", "2"], "")
    with pytest.raises(UserError, match="--device: found cpu, whose speed only a measurement tells"):
        make_plan(_paper(), ENGINES[2], find_cluster("cpu", 2))


def test_fp16_can_be_planned_where_there_is_no_gpu():
    raw = load_engine_config(ROOT / "ds_configs" / "zero2_fp16.json")
    plan = make_plan(_paper(), raw, A100S)
    bf16 = _of_paper("A100-80")
    assert plan.stretches[0].memory["parameters"] == bf16.stretches[0].memory["parameters"]


@pytest.fixture(scope="module")
def measured(server, tmp_path_factory):
    """(job's fields, output) of --measure on a small real job of one rank."""
    from support.small_job import arguments, make_materials

    folder = tmp_path_factory.mktemp("planned")
    make_materials(folder)
    fields = arguments(folder, folder / "run", "train.eval_every_steps=0", "train.save_every_steps=0")
    return folder, fields, server.run(PLAN, ["--measure", *fields], num_ranks=1, timeout_s=300)


@pytest.mark.process
def test_real_steps_calibrate_plans_of_this_machine(server, measured, tmp_path):
    folder, fields, printed = measured
    assert printed.count(" s per step, ") == 4 and not (folder / "run").exists()
    options = ["--json", str(tmp_path / "plan.json")]
    told = server.run(PLAN, [*options, *fields], num_ranks=1, timeout_s=120)
    assert "calibrated by steps measured on" in told, told
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["stretches"][-1]["hidden_size"] == 12 and plan["peak_bytes"] > 1e8
    assert 0 < plan["hours"]["low"] < plan["hours"]["high"] and set(plan["advice"]) >= {"zero_stage", "reason"}


@pytest.mark.process
def test_the_report_shows_the_plan_beside_the_run(server, measured):
    folder, fields, _ = measured
    server.run(ROOT / "launcher" / "train.py", [*fields, "run.report=true"], num_ranks=1, timeout_s=300)
    assert json.loads((folder / "run" / "plan.json").read_text())["stretches"]
    page = (folder / "run" / "report.html").read_text()
    assert "Planned and measured" in page and "calibrated by steps measured on" in page


def test_a_damaged_plan_leaves_the_report_alone(tmp_path):
    (tmp_path / "plan.json").write_text("{")
    write_result(tmp_path, [])
    assert "Planned and measured" not in write_report(tmp_path).read_text()


def test_the_table_names_what_it_rests_on():
    text = format_plan(_of_paper("A100-40"))
    assert "1 x 8 A100-40, ZeRO-2" in text and "estimate from A100-40's datasheet; not measured on GPU" in text
    assert "advised: ZeRO-0" in text and "device hours" in text
    lines = text.split("\n\n")[1].splitlines()
    assert len(lines) == 7 and len({len(line) for line in lines}) == 1


def test_expected_seconds_name_all_kinds_of_work():
    assert set(expected_seconds(A100S, 1e14)) == set(NAMES)
