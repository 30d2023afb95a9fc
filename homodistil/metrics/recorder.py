"""What a run says about itself: progress (progress.py), TensorBoard, metrics.jsonl, events.jsonl; tokens/s and memory.

The trainer on rank 0 owns a `Recorder` and feeds it every `train.log_every_steps`; `report.py` reads the files back.

    metrics.jsonl   {"kind": "train" | "evaluation", "step": 20, "loss/total": 3.1, ...}    one object a logged step
    events.jsonl    {"step": 20, "hash": "...", "widths_before": {...}, "widths_after": {...}, ...}    one a resize

No line holds a wall-clock time, so that a resumed run leaves the same lines as an uninterrupted one (speeds apart).
Non-finite numbers are written as null: the files are valid JSON whatever happens.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
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
from homodistil.metrics.tensorboard_layout import TENSORBOARD_FOLDER, board_folder, board_values


class Recorder:
    """Writes everything that is logged on one rank; with `enabled=False` (the other ranks) it does nothing at all.

    Args:
        run_dir: run folder; made if it is missing.
        total_steps: optimizer steps of the whole run.
        start_step: optimizer steps already done. Lines beyond it (a run that went on after its last checkpoint)
            are dropped, so log a step before saving the checkpoint of that step. 0: the files start empty.
        expected: `num_lines` of then, where the checkpoint knows: lines lost or doubled since are told.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        start_step: int,
        enabled: bool,
        expected: Mapping[str, int] | None = None,
    ) -> None:
        self.enabled = enabled
        self.num_lines = dict.fromkeys((METRICS_FILE, EVENTS_FILE), 0)
        """Lines of each file, the concluding evaluation left out."""
        if not enabled:
            return
        run_dir = self._run_dir = Path(run_dir)
        with writing(run_dir):
            run_dir.mkdir(parents=True, exist_ok=True)
            for name in (METRICS_FILE, EVENTS_FILE):
                self.num_lines[name] = go_on(run_dir / name, start_step, total_steps, (expected or {}).get(name))
            # Append mode: every line lands at the end, wherever another handle may have written.
            self._metrics = open(run_dir / METRICS_FILE, "a", encoding="utf-8")
            self._events = open(run_dir / EVENTS_FILE, "a", encoding="utf-8")
            self._tensorboard = _summary_writer(board_folder(run_dir), start_step)
        self._excepthook_before, threading.excepthook = threading.excepthook, _without_tensorboards_thread
        self._progress = step_progress(total_steps, start_step)

    def log_step(self, step: int, values: Mapping[str, float]) -> None:
        """Values of training after `step` optimizer steps; names carry their group: "loss/mlm", "widths/hidden"."""
        if not self.enabled:
            return
        _write_line(self._metrics, {"kind": "train", "step": step, **values})
        self.num_lines[METRICS_FILE] += 1
        self._add_scalars(values, step)
        self._progress.show(step, values)

    def advance(self, step: int) -> None:
        """After each step, logged or not: the bar moves. Asks nothing of the device."""
        if self.enabled:
            self._progress.advance(step)

    def log_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Held-out values after `step` optimizer steps; in TensorBoard under heldout/ and probe/."""
        if not self.enabled:
            return
        _write_line(self._metrics, {"kind": "evaluation", "step": step, **values})
        self.num_lines[METRICS_FILE] += 1
        self._add_scalars({f"heldout/{name}": value for name, value in values.items()}, step)

    def log_event(self, event: Mapping[str, Any]) -> None:
        """A resize: "step" and whatever else is known (nested mappings are fine); gap and cost under resize/."""
        if not self.enabled:
            return
        _write_line(self._events, event)
        self.num_lines[EVENTS_FILE] += 1
        self._add_scalars(dict(_numbers(event, "events")), event["step"])

    def close(self) -> None:
        if not self.enabled:
            return
        self._progress.close()
        threading.excepthook = self._excepthook_before
        for file in (self._tensorboard, self._metrics, self._events):
            # Every line was flushed when it was written: what fails here has been reported there.
            with contextlib.suppress(OSError):
                file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """One TensorBoard event for all: a call of `add_scalar` each would cost ten times as much."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in board_values(values)]
        with writing(self._run_dir / TENSORBOARD_FOLDER):
            self._tensorboard.file_writer.add_summary(Summary(value=scalars), step)
            self._tensorboard.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects with a step of a .jsonl file. Lines that cannot be read, such as a torn last one, are left out."""
    return _objects(path.read_bytes().split(b"\n"))


def parse_lines(text: str) -> list[dict[str, Any]]:
    """Objects with a step in the text of a .jsonl file, as `read_lines` returns them."""
    return _objects(text.split("\n"))


def _objects(lines: Sequence[str | bytes]) -> list[dict[str, Any]]:
    return [line for line in map(parse_line, lines) if line is not None]


def _write_line(file, value: Mapping[str, Any]) -> None:
    with writing(Path(file.name)):
        file.write(to_json(value) + "\n")
        file.flush()


def _numbers(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """Every number in nested mappings, named by its path; the step is the x axis, not a value."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _numbers(item, f"{prefix}/{key}")
        elif isinstance(item, (int, float)) and not isinstance(item, bool) and key != "step":
            yield f"{prefix}/{key}", item


def _summary_writer(folder: Path, start_step: int):
    # Slow to import, and needed on one rank only.
    from torch.utils.tensorboard import SummaryWriter

    had_events = folder.is_dir() and any(folder.iterdir())
    first_new_step = start_step + 1 if start_step else 0
    return SummaryWriter(str(folder), purge_step=first_new_step if had_events else None)


def _without_tensorboards_thread(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's writing thread dies with a traceback when the disk is full; the next call reports the same."""
    if not (issubclass(failure.exc_type, OSError) and type(failure.thread).__module__.startswith("tensorboard")):
        threading.__excepthook__(failure)


@dataclass(frozen=True)
class Lap:
    """Work done and time spent since the lap before."""

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
        """Time inside (evaluation, checkpoint, resize) does not count. Not to be nested."""
        start = _device_clock()
        try:
            yield
        finally:
            self._paused_s += _device_clock() - start

    def lap(self, tokens: float, flops: float) -> Lap:
        """End the lap, in which `tokens` and `flops` were worked off, both over all ranks; a new one starts."""
        done = Lap(_device_clock() - self._start - self._paused_s, tokens, flops)
        self._restart()
        return done


def _device_clock() -> float:
    """Seconds, read once the work queued on this rank's accelerator is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory_bytes() -> dict[str, int]:
    """Resident memory of this process and, with CUDA, the accelerator's peak since the last call; under memory/."""
    values = {"memory/rss_bytes": _process(os.getpid()).memory_info().rss}
    if torch.cuda.is_initialized():
        values["memory/accelerator_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    return values


@functools.cache
def _process(pid: int) -> psutil.Process:
    return psutil.Process(pid)  # looks up when it was started: not at every logged step
