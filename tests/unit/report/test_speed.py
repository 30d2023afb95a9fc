"""Sentences on speed and memory: first and last width, busy machines, growing memory."""

from __future__ import annotations

from pathlib import Path

import yaml
from support.html_page import Page

from homodistil.config.schema import RunConfig
from homodistil.metrics.recorder import Recorder
from homodistil.report import write_report
from homodistil.report.run import read_run
from homodistil.report.speed import memory_sentences, speed_sentences


def log_speeds(folder: Path, speeds: dict[int, list[float]], memory: dict[int, float]) -> None:
    """A run of 384 tokens a step: hidden size -> tokens/s of its intervals, and MiB."""
    config = RunConfig()
    config.train.steps, config.train.global_batch_size, config.data.seq_len = 60, 6, 64
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    with Recorder(folder, total_steps=60, start_step=0, enabled=True) as recorder:
        step = 0
        for hidden, rates in speeds.items():
            for rate in rates:
                step += 1
                size = {"widths/hidden": hidden, "model/parameters": hidden * 100}
                recorder.log_step(
                    step, {"speed/tokens_per_s": rate, "memory/rss_bytes": memory[hidden] * 2**20, **size}
                )


def test_speed_is_told_at_the_first_and_the_last_width(tmp_path):
    log_speeds(
        tmp_path, {64: [1.0, 768, 384, 1536], 48: [7.0] * 5, 32: [9.0, *[1536] * 9]}, {64: 100, 48: 100, 32: 100}
    )
    run = read_run(tmp_path)
    assert speed_sentences(run) == [
        "Training speed: 2 steps/s (768 tokens/s) at hidden size 64 (median of 3 logged intervals), and 4 steps/s "
        "(1,536 tokens/s) at hidden size 32 (median of 9 logged intervals)."
    ]
    assert memory_sentences(run) == []
    text = " ".join(Page(write_report(tmp_path).read_text()).text)
    assert "Training speed: 2 steps/s" in text and "slower" not in text and "faster" not in text


def test_a_busy_machine_and_growing_memory_are_said(tmp_path):
    rates = [1000 + 200 * (i % 5) for i in range(21)]
    log_speeds(tmp_path, {64: [2000.0], 32: rates}, {64: 1000, 32: 1400})
    run = read_run(tmp_path)
    assert speed_sentences(run)[1].startswith(
        "The machine was busy with something else as well: at hidden size 32 the middle half of the intervals, all "
        "with the same work, went from 1,"
    )
    assert memory_sentences(run) == [
        "Resident memory of the first rank rose from 1,000 MiB (step 1, hidden size 64) to 1,400 MiB (step 2, hidden "
        "size 32), although the student became narrower."
    ]
    quiet = tmp_path / "quiet"
    log_speeds(quiet, {64: [2000.0], 32: [1000 + i for i in range(21)]}, {64: 1000, 32: 1010})
    assert len(speed_sentences(read_run(quiet))) == 1 and memory_sentences(read_run(quiet)) == []
