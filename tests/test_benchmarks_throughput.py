"""Benchmarks of the step: time is attributed right, FLOPs add up, communication follows the formula; one real run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
ROW_FIELDS = {"name", "variant", "metric", "unit", "x", "value", "p20", "p80", "config"}


@pytest.fixture(autouse=True, scope="module")
def benchmarks_importable():
    # Last: a benchmark must not hide a package of the same name.
    sys.path.append(str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


class _Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_of_a_part_excludes_the_parts_inside_it():
    from step_parts import PartClock

    time = _Clock()
    clock = PartClock(torch.device("cpu"), time)

    def spend(seconds: float) -> None:
        time.now += seconds

    with clock.part("teacher"):
        spend(100)  # outside of a step
    with clock.step():
        spend(1)
        with clock.part("student forward"):
            spend(2)
            with clock.part("teacher"):
                spend(4)
                with clock.part("teacher"):  # a layer inside of the whole
                    spend(8)
            with clock.part("losses"):
                spend(16)
            spend(32)
        with clock.part("resize"):
            spend(64)
            with clock.part("gap"):
                spend(128)
                with clock.part("teacher"):  # of the probe: part of the event, not of the step
                    spend(256)
    found = {name: seconds for name, seconds in clock.take().items() if seconds}
    assert found == {"other": 1, "student forward": 34, "teacher": 12, "losses": 16, "resize": 64, "gap": 384}
    assert not any(clock.take().values())


def test_points_are_wrapped_and_restored(monkeypatch):
    import step_parts
    from step_parts import PartClock, Point, measured

    class Teacher:
        def forward(self) -> str:
            time.now += 3
            return finish

    def finish() -> str:
        time.now += 4
        return "output"

    time = _Clock()
    clock = PartClock(torch.device("cpu"), time)
    trainer = types.SimpleNamespace(teacher=Teacher())
    points = (Point("teacher", "trainer", "teacher.forward"), Point("teacher", "trainer", "teacher.not_there"))
    monkeypatch.setattr(step_parts, "POINTS", points)
    monkeypatch.setattr(step_parts, "PARTS", ("teacher",))
    with measured(trainer, clock), clock.step():
        finish_later = trainer.teacher.forward()
        time.now += 5
        assert finish_later() == "output"
    assert clock.take() == {"teacher": 7, "other": 5}
    assert "forward" not in vars(trainer.teacher)
    monkeypatch.setattr(step_parts, "PARTS", ("teacher", "losses"))
    with pytest.raises(LookupError, match="losses"), measured(trainer, clock):
        pass


def test_flops_of_the_parts_add_up_to_those_of_the_step():
    from part_flops import part_flops

    from homodistil.config.schema import LossConfig
    from homodistil.distill.cost import step_flops

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
    assert part_flops(student, teacher, LossConfig(), **batch)["losses"] == pytest.approx(projections + scores)


def test_communication_by_hand():
    from communication import Job, Network, predict

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
    from communication import Network, fit_line
    from scaling_tables import calibrated_network

    true = Network(4, inside_bytes_per_s=2e9, inside_latency_s=3e-5)
    points = [(float(2**power), true.all_reduce_s(2**power, 4)) for power in range(10, 26, 3)]
    latency, per_byte = fit_line(points)
    found = calibrated_network({"latency_s": latency, "seconds_per_byte": per_byte}, 4)
    assert found.inside_bytes_per_s == pytest.approx(2e9) and found.inside_latency_s == pytest.approx(3e-5)


def test_interpolation_between_widths():
    from throughput_tables import interpolated_ms

    stages = [{"hidden": 100, "step_ms": [9.0, 10.0, 30.0]}, {"hidden": 50, "step_ms": [4.0]}]
    assert [interpolated_ms(stages, hidden) for hidden in (120, 100, 75, 50, 40)] == [10, 10, 7, 4, 4]


def test_tiny_run_from_the_command_line(tmp_path):
    command = [sys.executable, BENCHMARKS / "throughput.py", "--shapes", "tiny", "--quick", "--threads", "1"]
    command += ["--steps-per-width", "2", "--json", tmp_path / "rows.json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(set(row) == ROW_FIELDS for row in rows)
    value = {(row["metric"], row["x"]): row["value"] for row in rows}
    assert value["explained", "schedule"] >= 0.95  # the acceptance of the project
    widths = [x for metric, x in value if metric == "tokens_per_s" and isinstance(x, int)]
    assert max(widths) == 96 and min(widths) == 48 and len(widths) >= 5
    for width in set(widths) - {48}:  # one step each: the sum of the parts is the whole
        parts = sum(number for (metric, x), number in value.items() if metric.startswith("part/") and x == width)
        assert parts == pytest.approx(value["step_ms", width], rel=1e-6)
        assert value["part/teacher", width] > 0 and value["part/losses", width] > 0
        assert value["peak_memory", width] > 0
    assert value["part/importance", 96] > 0 and value["mfu", "schedule"] > 0
    assert "share over the run" in done.stdout
