"""Benchmarks of the step: time is attributed right, FLOPs add up, communication follows the formula; one real run."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks.harness import launch
from benchmarks.harness.part_flops import part_flops
from benchmarks.harness.step_parts import part_seconds, teacher_labelled
from benchmarks.speed import throughput
from benchmarks.speed.communication import Job, Network, fit_line, predict
from benchmarks.speed.scaling_report import calibrated_network
from benchmarks.speed.throughput_report import interpolated_ms
from homodistil.config.schema import LossConfig
from homodistil.distill.cost import step_flops

ROW_FIELDS = {"name", "variant", "metric", "unit", "x", "value", "p20", "p80", "config"}


def _event(name: str, start: float, end: float, kernels: dict[str, float] | None = None):
    """As the profiler has them, in seconds instead of microseconds."""
    return types.SimpleNamespace(
        name=name,
        device_type=torch.autograd.DeviceType.CPU,
        time_range=types.SimpleNamespace(start=start * 1e6, end=end * 1e6),
        kernels=[types.SimpleNamespace(name=name, duration=s * 1e6) for name, s in (kernels or {}).items()],
    )


STEP = [
    _event("step.data", 0, 1),
    _event("step.student", 1, 41),
    _event("step.teacher", 3, 7),  # a layer in lock-step
    _event("step.teacher", 10, 18),
    _event("step.backward", 41, 61),
    _event("step.log", 61, 62),
    _event("step.measure", 62, 64),
    _event("step.update", 64, 80),
    _event("step.resize", 80, 180),
    _event("step.teacher", 90, 130),  # of the probe: part of the event, not of the step
]


def test_time_of_a_part_excludes_the_parts_inside_it():
    assert part_seconds(STEP, on_device=False) == pytest.approx(
        {"data": 1, "teacher": 12, "student": 28, "backward": 20, "log": 1, "measure": 2, "update": 16, "resize": 100}
    )
    with pytest.raises(LookupError, match=r"step\.update"):
        part_seconds([event for event in STEP if event.name != "step.update"], on_device=False)


def test_on_a_gpu_a_part_has_the_kernels_that_were_launched_inside_it():
    launched = [
        _event("aten::mm", 4, 5, {"gemm": 30.0}),
        _event("aten::mm", 20, 21, {"gemm": 40.0, "copy": 2.0}),
        _event("AddmmBackward0", 50, 51, {"gemm": 80.0}),  # in autograd's thread, while the label is open in ours
        _event("aten::mm", 100, 101, {"gemm": 7.0}),
        _event("aten::mm", 190, 191, {"gemm": 9.0}),
    ]
    label = _event("step.update", 64, 80, {"step.update": 500.0, "adam": 3.0})  # its span, and a kernel of Triton's
    steps = [label if event.name == label.name else event for event in STEP]
    assert part_seconds([*steps, *launched], on_device=True) == pytest.approx(
        {"data": 1, "teacher": 30, "student": 42, "backward": 80, "log": 0, "measure": 0, "update": 3, "resize": 100}
    )


def test_a_teacher_in_lock_step_is_labelled_from_outside():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.nn.Linear(2, 2))
    config = types.SimpleNamespace(teacher=types.SimpleNamespace(in_lock_step=True))
    trainer = types.SimpleNamespace(teacher=types.SimpleNamespace(model=model), config=config)
    with torch.profiler.profile() as recorded, teacher_labelled(trainer):
        for layer in model:
            layer(torch.ones(2))
    assert sum(event.name == "step.teacher" for event in recorded.events()) == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_flops_of_the_parts_add_up_to_those_of_the_step():

    def widths(hidden: int, ffn: int, heads: int, dim: int) -> dict[str, int]:
        layer = {"ffn": ffn, "heads": heads, "qk_dim": dim, "vo_dim": dim}
        return {"hidden": hidden} | {f"layer.{i}.{name}": size for i in range(2) for name, size in layer.items()}

    batch = {"num_sequences": 3, "seq_len": 16, "target_rows": 7.0, "vocab_size": 101}
    student, teacher = widths(10, 20, 2, 4), widths(24, 48, 4, 6)
    for loss in (LossConfig(), LossConfig(projection="teacher", projection_learned=False), LossConfig(attention=0.0)):
        found = part_flops(student, teacher, loss, **batch)
        assert sum(found.values()) == pytest.approx(step_flops(student, teacher, loss, **batch).total, rel=1e-12)
    # By hand, for the first: 3 projections of 48 tokens; scores of 2 layers, of the student and of the teacher's heads.
    projections, scores = 3 * 2 * 48 * 10 * 24, 2 * 2 * 48 * 16 * 2 * (4 + 6)
    assert part_flops(student, teacher, LossConfig(), **batch)["student"] == pytest.approx(
        step_flops(student, teacher, LossConfig(), **batch).student / 3 + projections + scores
    )


def test_communication_by_hand():

    network = Network(4, inside_bytes_per_s=100.0, outside_bytes_per_s=10.0, inside_latency_s=0.5, outside_latency_s=2)
    # 8 GPUs in 2 machines, 400 bytes: 3 hops and 3/4 of 400 at 100 B/s; then 100 bytes, 1 hop, half of them at 10 B/s.
    assert network.scatter_s(400, 8) == pytest.approx(3 * 0.5 + 300 / 100 + 1 * 2 + 50 / 10)
    assert network.scatter_s(400, 4) == pytest.approx(3 * 0.5 + 300 / 100)
    assert network.all_reduce_s(400, 1) == 0
    job = Job(200, 2, 30.0, 8.0, 2, bucket_bytes=1e9, overlap=0.5, backward_share=0.4, small_collectives=3)
    found = predict(job, network, 8)
    small = 3 * 2 * (3 * 0.5 + 2)
    assert found.reduction_s == pytest.approx(2 * 2 * 11.5)  # two micro-batches, an all-reduce each
    assert found.hidden_s == pytest.approx(0.4 * 30)  # a half of 46 would not fit behind the backward
    assert found.step_s == pytest.approx(30 + 8 / 8 + 46 - 12 + 11.5 + small)
    of_stage = {stage: predict(Job(200, stage, 30.0, 8.0, 2), network, 8) for stage in (0, 1, 3)}
    assert [found.reduction_s for found in of_stage.values()] == pytest.approx([23, 23, 23])  # 3: half of it, twice
    assert [found.gather_s for found in of_stage.values()] == pytest.approx([0, 11.5, 46])
    assert of_stage[0].compute_s == 38
    # Four buckets pay the latency four times.
    many = predict(Job(200, 1, 30.0, bucket_bytes=100), network, 8)
    assert many.gather_s == pytest.approx(11.5 + 3 * (3 * 0.5 + 2))


def test_calibration_finds_the_ring_that_was_measured():

    true = Network(4, inside_bytes_per_s=2e9, inside_latency_s=3e-5)
    points = [(float(2**power), true.all_reduce_s(2**power, 4)) for power in range(10, 26, 3)]
    latency, per_byte = fit_line(points)
    found = calibrated_network({"latency_s": latency, "seconds_per_byte": per_byte}, 4)
    assert found.inside_bytes_per_s == pytest.approx(2e9) and found.inside_latency_s == pytest.approx(3e-5)


def test_interpolation_between_widths():

    stages = [{"hidden": 100, "step_ms": [9.0, 10.0, 30.0]}, {"hidden": 50, "step_ms": [4.0]}]
    assert [interpolated_ms(stages, hidden) for hidden in (120, 100, 75, 50, 40)] == [10, 10, 7, 4, 4]


def on_forks(server, folder: Path):
    """`run_ranks` without torchrun, whose own way is taken in tests/distributed/test_memory.py."""

    def run_ranks(module: str, arguments: list[str], num_ranks: int, environment: dict[str, str]) -> dict:
        result = folder / "result.json"
        env = environment | {launch.RESULT_FILE: str(result)}
        job = server.start(f"-m {module}", arguments, num_ranks, env)
        assert job.wait(timeout_s=300) == [0] * num_ranks, job.output()
        return json.loads(result.read_text())

    return run_ranks


def test_tiny_run_from_the_command_line(server, tmp_path, monkeypatch, capsys):
    options = ["--shapes", "tiny", "--quick", "--threads", "1", "--steps-per-width", "2"]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *options, "--json", str(tmp_path / "rows.json")])
    monkeypatch.setattr(throughput, "run_ranks", on_forks(server, tmp_path))
    throughput.main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(set(row) == ROW_FIELDS for row in rows)
    value = {(row["metric"], row["x"]): row["value"] for row in rows}
    assert value["explained", "schedule"] >= 0.95  # the acceptance of the project
    widths = [x for metric, x in value if metric == "tokens_per_s" and isinstance(x, int)]
    assert max(widths) == 96 and min(widths) == 48 and len(widths) >= 5
    for width in set(widths) - {48}:  # one step each: the sum of the parts is the whole
        parts = sum(number for (metric, x), number in value.items() if metric.startswith("part/") and x == width)
        assert parts == pytest.approx(value["step_ms", width], rel=1e-6)
        assert value["part/teacher", width] > 0 and value["part/student", width] > 0
        assert value["peak_memory", width] > 0
    assert value["part/measure", 96] > 0 and value["mfu", "schedule"] > 0
    assert "share over the run" in capsys.readouterr().out
