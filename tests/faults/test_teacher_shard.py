"""teacher.shard: the layers' numbers are those of a whole teacher, and nothing whole is left between two runs."""

import pytest
import torch
from support.small_job import TRAIN, arguments, differences, result

from homodistil.config.command_line import parse
from homodistil.distill.runtime import check_teacher_runtime
from homodistil.errors import UserError
from homodistil.planning.cluster import find_cluster
from homodistil.planning.plan import make_plan
from homodistil.training.resolve import resolve_run


def _trained(server, run_inputs, folder, *overrides, engine=None) -> dict:
    job = server.start(TRAIN, arguments(run_inputs, folder, *overrides, engine=engine))
    assert job.wait(timeout_s=180) == [0, 0], job.output()
    return result(folder)


def test_outputs_are_bitwise_those_of_a_whole_teacher(server):
    job = server.start("teacher_jobs:compare_with_a_whole_teacher", [], num_ranks=3)
    assert job.wait(timeout_s=180) == [0, 0, 0], job.output()
    assert job.output().count("all is equal") == 3


def test_a_run_is_bitwise_the_same(server, run_inputs, reference, tmp_path):
    ours = _trained(server, run_inputs, tmp_path / "run", "teacher.shard=true")
    assert differences(ours, result(reference)) == []


def test_a_run_with_a_student_under_zero3_is_bitwise_the_same(server, run_inputs, tmp_path):
    """Both gather, each for itself."""
    engine = tmp_path / "zero3.json"
    engine.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    ours, theirs = (
        _trained(server, run_inputs, tmp_path / name, f"teacher.shard={name}", engine=engine)
        for name in ("true", "false")
    )
    assert differences(ours, theirs) == []


@pytest.mark.parametrize("other", ["runtime=compile", "runtime=deepspeed", "own_stream=true"])
def test_what_cannot_be_sharded_is_refused(other):
    config = parse(["recipe=quickstart", "teacher.shard=true", f"teacher.{other}"])
    with pytest.raises(UserError, match=r"teacher\.shard: true gathers layers .* set these, or teacher\.shard=false"):
        check_teacher_runtime(config.teacher, torch.device("cuda" if "stream" in other else "cpu"))


def test_the_plan_counts_a_ranks_part():
    plans = []
    for shard in (False, True):
        config = parse(["recipe=homobert-base-paper", f"teacher.shard={str(shard).lower()}"])
        plans.append(make_plan(resolve_run(config), {"zero_optimization": {"stage": 2}}, find_cluster("A100-80", 8)))
    whole, parts = (plan.stretches[0].memory["teacher"] for plan in plans)
    layers = 12 * (4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768)
    assert whole - parts == pytest.approx(2 * layers * (1 - 1 / 8 - 1 / 12))  # fp16: all but a part of it and one layer
    assert plans[1].stretches[0].step.high > plans[0].stretches[0].step.high
