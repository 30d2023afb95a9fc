"""Logs of a run: metrics.jsonl, events.jsonl, trackers and progress; and the measurement of speed and memory.

The trainer on rank 0 calls its `Recorder` every `train.log_every_steps`; `report/` reads the files.

    metrics.jsonl   {"kind": "train" | "evaluation", "step": 20, "loss/total": 3.1, ...}    one object per logged step
    events.jsonl    {"step": 20, "hash": "...", "widths_before": {...}, "widths_after": {...}, ...}    one per resize

Lines contain no wall-clock times, so that a resumed run writes the same lines as an uninterrupted one, except for the
speeds. Numbers that are not finite are written as null, because JSON has no NaN.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from homodistil.files import to_json, writing
from homodistil.files import write_atomically as write_atomically
from homodistil.metrics.log_files import EVENTS_FILE, METRICS_FILE, go_on, parse_line
from homodistil.metrics.progress import step_progress
from homodistil.metrics.tensorboard_layout import board_values
from homodistil.metrics.trackers.tensorboard_tracker import TensorBoardTracker
from homodistil.metrics.trackers.tracker import Tracker


class Recorder:
    """Writes the logs of a run. It is enabled on rank 0; on all other ranks its methods do nothing.

    Args:
        run_dir: run folder; made if it is missing.
        total_steps: optimizer steps of the whole run.
        start_step: optimizer steps already done; 0: the files start empty. Lines of later steps (logged after the
            checkpoint) are dropped, so log a step before saving the checkpoint of that step.
        enabled: whether anything is written.
        expected: `num_lines` at the checkpoint, if known; a warning reports lines lost or duplicated since then.
        trackers: that take the values besides TensorBoard (trackers/registry.py); `close` ends them.

    Raises:
        UserError: (here and in the `log_` methods) a file cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        start_step: int,
        enabled: bool,
        expected: Mapping[str, int] | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.enabled = enabled
        self._result: dict[str, float] | None = None
        self.num_lines = dict.fromkeys((METRICS_FILE, EVENTS_FILE), 0)
        """File -> number of its lines, without the evaluation at the end of the run."""
        if not enabled:
            return
        run_dir = Path(run_dir)
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, EVENTS_FILE):
                self.num_lines[name] = go_on(run_dir / name, start_step, total_steps, (expected or {}).get(name))
            # In append mode every line is written at the end, even if another handle has written meanwhile.
            self._metrics = open(run_dir / METRICS_FILE, "a", encoding="utf-8")
            self._events = open(run_dir / EVENTS_FILE, "a", encoding="utf-8")
            self._trackers: list[Tracker] = [TensorBoardTracker(run_dir, start_step), *trackers]
        self._progress = step_progress(total_steps, start_step)

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Log training values after `step` optimizer steps. Names begin with a group: "loss/mlm", "widths/hidden"."""
        if not self.enabled:
            return
        _write_line(self._metrics, {"kind": "train", "step": step, **values})
        self.num_lines[METRICS_FILE] += 1
        self._track(values, step)
        self._progress.show(step, values)

    def advance(self, step: int) -> None:
        """Advance the progress bar; call it after each step, logged or not. Does not synchronise with the device."""
        if self.enabled:
            self._progress.advance(step)

    def log_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Log held-out values after `step` optimizer steps; in TensorBoard they are under heldout/ and probe/."""
        if not self.enabled:
            return
        _write_line(self._metrics, {"kind": "evaluation", "step": step, **values})
        self.num_lines[METRICS_FILE] += 1
        self._track({f"heldout/{name}": value for name, value in values.items()}, step)

    def log_event(self, event: Mapping[str, Any]) -> None:
        """Log a resize event; in TensorBoard, gap and cost are under resize/.

        Args:
            event: "step" and any further values, also nested mappings.
        """
        if not self.enabled:
            return
        _write_line(self._events, event)
        self.num_lines[EVENTS_FILE] += 1
        self._track(dict(_numbers(event, "events")), event["step"])

    def log_result(self, row: Mapping[str, Any]) -> None:
        """Keep the run's row of the result table, whose numbers trackers get at the end, under result/."""
        self._result = dict(_numbers(row, "result"))

    def close(self) -> None:
        """Close all files. Without `log_result` before, the run counts as stopped before its end."""
        if not self.enabled:
            return
        self._progress.close()
        for tracker in self._trackers:
            tracker.finish(self._result)
        for file in (self._metrics, self._events):
            # Every line was flushed when it was written, so an error here has been reported before.
            with contextlib.suppress(OSError):
                file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _track(self, values: Mapping[str, float], step: int) -> None:
        tags = dict(board_values(values))
        for tracker in self._trackers:
            tracker.log(step, tags)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects with a step in a .jsonl file. Unreadable lines, such as an incomplete last line, are skipped."""
    return _objects(path.read_bytes().split(b"\n"))


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The objects with a step in the text of a .jsonl file, like `read_lines`."""
    return _objects(text.split("\n"))


def _objects(lines: Sequence[str | bytes]) -> list[dict[str, Any]]:
    return [line for line in map(parse_line, lines) if line is not None]


def _write_line(file, value: Mapping[str, Any]) -> None:
    with writing(Path(file.name)):
        file.write(to_json(value) + "\n")
        file.flush()


def _numbers(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """(path, number) for every number in nested mappings except "step", which is the x axis."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _numbers(item, f"{prefix}/{key}")
        elif isinstance(item, (int, float)) and not isinstance(item, bool) and key != "step":
            yield f"{prefix}/{key}", item


@dataclass(frozen=True)
class Lap:
    """Work done and time spent since the previous lap: tokens and FLOPs over all ranks."""

    seconds: float
    tokens: float
    flops: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else math.nan

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.seconds if self.seconds > 0 else math.nan


class StepTimer:
    """Throughput of the steps since the last lap, without the time inside `paused()`."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._start, self._paused_s = _device_clock(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside this context (evaluation, checkpoint, resize). Must not be nested."""
        start = _device_clock()
        try:
            yield
        finally:
            self._paused_s += _device_clock() - start

    def lap(self, tokens: float, flops: float) -> Lap:
        """End the lap, in which all ranks together processed `tokens` with `flops`, and start a new one."""
        done = Lap(_device_clock() - self._start - self._paused_s, tokens, flops)
        self._restart()
        return done


def _device_clock() -> float:
    """Seconds, read after waiting for the work queued on the GPU of this rank."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_bytes() -> dict[str, int]:
    """Bytes of resident memory of this process and, with CUDA, the peak of allocated GPU memory since the last call."""
    values = {"memory/rss_bytes": _process(os.getpid()).memory_info().rss}
    if torch.cuda.is_initialized():
        values["memory/accelerator_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    return values


@functools.cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)  # cached, because the constructor looks up when the process was started
