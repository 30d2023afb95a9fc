"""Recorder files and TensorBoard read back, resume, non-finite values; throughput and memory; the result table."""

from __future__ import annotations

import collections
import gc
import json
import math
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from homodistil.metrics.recorder import Recorder, StepTimer, memory_bytes
from homodistil.metrics.result_table import format_table, read_result, write_result
from homodistil.metrics.tensorboard_layout import board_folder

EVENT = {
    "step": 20,
    "hash": "0123456789abcdef",
    "widths_before": {"hidden": 31, "layer.0.ffn": 17},
    "widths_after": {"hidden": 29, "layer.0.ffn": 13},
    "changed": ["hidden", "layer.0.ffn"],
    "gap_before": {"kl": 0.5},
    "gap_after": {"kl": 0.75, "hidden/layer.0": 0.25},
    "milliseconds": 7.5,
    "bytes_moved": 123,
}


def strict_lines(path) -> list[dict]:
    """JSON lines; NaN and Infinity, which json.loads accepts by default, are refused."""

    def refuse(word):
        raise ValueError(word)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def scalars(run_dir) -> dict[str, list[tuple[int, float]]]:
    reader = EventAccumulator(str(board_folder(run_dir)), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def record(run_dir, first: int, last: int, start_step: int = 0, total: int = 60) -> None:
    """What the trainer does: a line every 10 steps, an evaluation and a resize every 20."""
    with Recorder(run_dir, total_steps=total, start_step=start_step, enabled=True) as recorder:
        for step in range(first, last + 1, 10):
            recorder.log_step(step, {"loss/total": 8.0 - step / 16, "widths/hidden": 64 - step // 10})
            if step % 20 == 0:
                recorder.log_evaluation(step, {"mlm_loss": step / 8})
                recorder.log_event({**EVENT, "step": step})


def test_files_and_tensorboard_hold_what_was_logged(tmp_path):
    record(tmp_path, 10, 40)
    lines = strict_lines(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 10),
        ("train", 20),
        ("evaluation", 20),
        ("train", 30),
        ("train", 40),
        ("evaluation", 40),
    ]
    assert lines[1] == {"kind": "train", "step": 20, "loss/total": 6.75, "widths/hidden": 62}
    assert lines[2] == {"kind": "evaluation", "step": 20, "mlm_loss": 2.5}
    assert strict_lines(tmp_path / "events.jsonl") == [EVENT, {**EVENT, "step": 40}]

    found = scalars(tmp_path)
    # Every value above is a dyadic fraction: exact in TensorBoard's fp32.
    assert found["loss/total"] == [(10, 7.375), (20, 6.75), (30, 6.125), (40, 5.5)]
    assert found["heldout/mlm_loss"] == [(20, 2.5), (40, 5.0)]
    assert found["model/width_hidden"] == [(10, 63.0), (20, 62.0), (30, 61.0), (40, 60.0)]
    assert found["resize/after_kl"] == [(20, 0.75), (40, 0.75)]
    assert found["resize/milliseconds"] == [(20, 7.5), (40, 7.5)]
    assert {tag for tag in found if tag.startswith(("resize", "events"))} == {
        "resize/before_kl",
        "resize/after_kl",
        "resize/milliseconds",
        "resize/bytes_moved",
    }


def test_tensorboard_names_the_run_and_opens_on_what_matters(tmp_path):
    """A model of 12 layers: few cards in the groups that come first, everything else behind them."""
    layers = range(12)
    values = {"loss/total": 5.0, "loss/kl": 1.0, "optim/lr": 1e-3, "speed/mfu": 0.5, "memory/rss_bytes": 7.0}
    values |= {"widths/hidden": 64, "model/parameters": 9, "train/micro_batch_size": 2}
    values |= {f"loss/hidden/layer.{i}": 1.0 for i in layers} | {f"widths/layer.{i}.ffn": 10 + 2 * i for i in layers}
    gap = {"kl": 0.5, "hidden": 0.25} | {f"hidden/layer.{i}": 0.1 for i in layers}
    widths = {"hidden": 64} | {f"layer.{i}.ffn": 256 for i in layers}
    run = tmp_path / "mine"
    for folder in (run, run / "compare" / "one_shot"):
        with Recorder(folder, total_steps=60, start_step=0, enabled=True) as recorder:
            recorder.log_step(20, values)
            recorder.log_evaluation(
                20, {"mlm_loss": 2.0, "masked_rows": 99.0} | {f"gap/{name}": value for name, value in gap.items()}
            )
            recorder.log_event({**EVENT, "gap_before": gap, "gap_after": gap, "widths_after": widths})
    written = sorted(path.parent for path in (run / "tensorboard").rglob("events.out.*"))
    assert written == [run / "tensorboard" / "compare" / "one_shot", run / "tensorboard" / "mine"]
    assert not (run / "compare" / "one_shot" / "tensorboard").exists()
    found = scalars(run)
    assert found["model/width_ffn"] == [(20, 21.0)] and found["per_layer/widths/layer.11.ffn"] == [(20, 32.0)]
    groups = dict(collections.Counter(tag.split("/")[0] for tag in sorted(found)))
    assert list(groups) == ["heldout", "loss", "model", "optim", "per_layer", "probe", "resize", "speed", "train"]
    assert (groups["heldout"], groups["loss"], groups["model"], groups["resize"]) == (1, 2, 3, 6)


def test_a_run_of_an_earlier_version_goes_on_in_its_own_board(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1.vm.2.3").write_bytes(b"")
    assert board_folder(tmp_path) == tmp_path / "tensorboard"


def test_lines_are_on_disk_before_close(tmp_path):
    recorder = Recorder(tmp_path, total_steps=60, start_step=0, enabled=True)
    recorder.log_step(10, {"loss/total": 1.5})
    recorder.log_event(EVENT)
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == len(strict_lines(tmp_path / "events.jsonl")) == 1
    assert scalars(tmp_path)["loss/total"] == [(10, 1.5)]
    recorder.close()


def next_second() -> None:
    """TensorBoard orders the files of a folder by the second they were made in, then by a number without zeros."""
    time.sleep(1.01 - time.time() % 1)


def test_resume_leaves_the_files_of_an_uninterrupted_run(tmp_path):
    record(tmp_path / "straight", 10, 60)
    record(tmp_path / "resumed", 10, 40)  # killed at 40; the last checkpoint is that of step 20
    with open(tmp_path / "resumed" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 5')  # killed while writing
    next_second()
    record(tmp_path / "resumed", 30, 60, start_step=20)
    for name in ("metrics.jsonl", "events.jsonl"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert scalars(tmp_path / "resumed") == scalars(tmp_path / "straight")
    assert sorted(p.name for p in (tmp_path / "resumed").iterdir()) == ["events.jsonl", "metrics.jsonl", "tensorboard"]


def test_start_at_zero_forgets_a_run_that_died_before_its_first_checkpoint(tmp_path):
    record(tmp_path / "straight", 10, 30)
    with Recorder(tmp_path / "again", total_steps=60, start_step=0, enabled=True) as recorder:
        recorder.log_evaluation(0, {"mlm_loss": 9.0})
        recorder.log_step(10, {"loss/total": 99.0})
    next_second()
    record(tmp_path / "again", 10, 30)
    for name in ("metrics.jsonl", "events.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert scalars(tmp_path / "again")["loss/total"] == scalars(tmp_path / "straight")["loss/total"]


def test_non_finite_values_become_null(tmp_path):
    with Recorder(tmp_path, total_steps=60, start_step=0, enabled=True) as recorder:
        recorder.log_step(10, {"loss/total": math.nan, "loss/mlm": torch.tensor(math.inf), "loss/kl": 0.5})
        recorder.log_evaluation(10, {"mlm_loss": -math.inf})
        recorder.log_event({**EVENT, "gap_after": {"kl": math.nan}, "widths_after": {"hidden": math.inf}})
    train, evaluation = strict_lines(tmp_path / "metrics.jsonl")
    assert train == {"kind": "train", "step": 10, "loss/total": None, "loss/mlm": None, "loss/kl": 0.5}
    assert evaluation["mlm_loss"] is None
    (event,) = strict_lines(tmp_path / "events.jsonl")
    assert event == {**EVENT, "gap_after": {"kl": None}, "widths_after": {"hidden": None}}


def test_the_concluding_evaluation_is_logged_once_however_often_the_run_is_concluded(tmp_path):
    record(tmp_path, 10, 60)
    for _ in range(2):  # killed behind the last checkpoint, after this line
        with Recorder(tmp_path, total_steps=60, start_step=60, enabled=True) as recorder:
            recorder.log_evaluation(60, {"mlm_loss": 4.0})
    lines = strict_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [10, 20, 30, 40, 50, 60]
    assert [line for line in lines if line["step"] == 60 and line["kind"] == "evaluation"] == [
        {"kind": "evaluation", "step": 60, "mlm_loss": 4.0}
    ]


def test_scalar_tensors_are_written_as_numbers(tmp_path):
    with Recorder(tmp_path, total_steps=60, start_step=0, enabled=True) as recorder:
        recorder.log_step(10, {"loss/total": torch.tensor(1.25), "widths/hidden": torch.tensor(7)})
    (line,) = strict_lines(tmp_path / "metrics.jsonl")
    assert line["loss/total"] == 1.25 and line["widths/hidden"] == 7


def test_disabled_recorder_writes_nothing(tmp_path, capsys):
    with Recorder(tmp_path / "run", total_steps=60, start_step=20, enabled=False) as recorder:
        recorder.log_step(10, {"loss/total": 1.0})
        recorder.log_evaluation(10, {"mlm_loss": 1.0})
        recorder.log_event(EVENT)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_progress_in_a_log_is_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    """Four seconds a step; the hundred before the first one, which an event may take, are not counted in."""
    clock = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    with Recorder(tmp_path, total_steps=60, start_step=0, enabled=True) as recorder:
        clock += 96
        for step in range(1, 61):
            clock += 4
            if step == 1 or step % 10 == 0:
                values = {"loss/total": 3.14159, "widths/hidden": 96 - step, "speed/tokens_per_s": 12345.6}
                recorder.log_step(step, values)
            recorder.advance(step)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0] == "step 1/60, loss 3.142, hidden 95, 12,346 tokens/s"
    assert lines[1] == "step 10/60, loss 3.142, hidden 86, 12,346 tokens/s, 03:20 left"
    assert len(lines) == 7 and lines[-1] == "step 60/60, loss 3.142, hidden 36, 12,346 tokens/s"


def test_progress_on_a_terminal_is_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Recorder(tmp_path, total_steps=60, start_step=20, enabled=True) as recorder:
        recorder.log_step(60, {"loss/total": 3.14159, "widths/hidden": 96})
    assert "100%" in (err := capsys.readouterr().err) and "60/60" in err and "loss 3.142, hidden 96" in err


def test_throughput_leaves_pauses_out():
    timer = StepTimer()
    for _ in range(3):
        time.sleep(0.05)
        with timer.paused():
            time.sleep(0.4)
    lap = timer.lap(tokens=300, flops=3000)
    # Sleeping overshoots on a busy machine, but one whole pause counted would already break the upper bound.
    assert 0.15 <= lap.seconds < 0.5
    assert lap.tokens_per_s == 300 / lap.seconds and lap.flops_per_s == 3000 / lap.seconds
    time.sleep(0.02)
    lap = timer.lap(tokens=7, flops=0)
    assert (lap.tokens, lap.flops) == (7, 0) and 0.02 <= lap.seconds < 0.15


def test_a_pause_ends_with_an_exception_too():
    timer = StepTimer()
    with pytest.raises(KeyError), timer.paused():
        time.sleep(0.1)
        raise KeyError
    assert timer.lap(0, 0).seconds < 0.05


def test_memory_grows_with_what_is_held():
    gc.collect()  # what other tests have left shall not go in between
    before = memory_bytes()["memory/rss_bytes"]
    held = torch.ones(64 * 2**20)  # 256 MiB, touched
    grown = memory_bytes()["memory/rss_bytes"] - before
    # The allocator may serve a part from pages it already holds.
    assert 192 * 2**20 < grown < 320 * 2**20
    assert held.sum() > 0
    assert ("memory/accelerator_bytes" in memory_bytes()) == torch.cuda.is_initialized()


def test_result_file_round_trip(tmp_path):
    rows = [{"name": "student", "parameters": 123, "masked_top1": 0.25, "kl_to_teacher": math.nan}]
    assert write_result(tmp_path, rows) == tmp_path / "result.json"
    assert read_result(tmp_path) == [{**rows[0], "kl_to_teacher": None}]
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_table_aligns_and_marks_what_is_missing():
    rows = [
        {"name": "teacher", "parameters": 4416698, "hidden_size": 128, "heldout_mlm_loss": 2.34567},
        {"name": "student, homotopic", "parameters": 2000000, "masked_top1": 0.4567, "kl_to_teacher": None},
    ]
    head, rule, teacher, student = format_table(rows).splitlines()
    assert set(rule) == {"-", " "} and len({len(line) for line in (head, rule, teacher, student)}) == 1
    assert teacher.split() == ["teacher", "4,416,698", "128", "2.346", "-", "-", "-", "-"]
    assert student.split() == ["student,", "homotopic", "2,000,000", "-", "-", "45.7%", "-", "-", "-"]
    assert head.index("parameters") + len("parameters") == teacher.index("4,416,698") + len("4,416,698")
