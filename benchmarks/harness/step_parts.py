"""Where the time of a training step goes, by labels for torch.profiler: the product's loop sets them (`step.backward`).

    with teacher_labelled(trainer):
        parts, profile = profiled_step(trainer.train_step, device)
    parts  # {"teacher": 0.41, ..., "other": 0.003}, seconds

Time is EXCLUSIVE: a label inside another one (the layers of a teacher in lock-step run inside the student's forward
pass) counts once, for the inner one. On a CPU a part's time is the wall time inside its label. On a GPU labels only
enclose launches, so it is the time of the kernels that were launched inside the label, by whichever thread (autograd's
backward pass has one of its own); "other" then holds what the device idles, too.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.harness.workload import synchronize

PREFIX = "step."
"""Of the labels in homodistil's training loop."""
PARTS = ("data", "teacher", "student", "backward", "measure", "update", "log", "resize")
"""In the order of a step. "student": its forward pass with the losses; "measure": importance; "resize": the question
whether an event is due, and all of an event, its forward passes included."""
OTHER = "other"
ON_THE_HOST = ("data", "resize")
"""Parts whose time is the host's on a GPU, too: it waits for data, and for the device in an event."""

# Operators on the CPU, kernels (cuBLAS, CUTLASS, Triton's by their names) on a GPU.
_GEMM = re.compile(r"aten::(addmm|mm|bmm|baddbmm|_addmm.*|linear)|mkldnn.*linear|.*(gemm|cutlass|nvjet|xmma).*", re.I)


def profiled_step(step: Callable[[], object], device: torch.device) -> tuple[dict[str, float], profile]:
    """Runs `step` once under the profiler, which costs a CPU step a few per cent.

    Returns:
        Part -> seconds, whose sum is the step; and the finished profile.

    Raises:
        LookupError: a label is missing, so `PARTS` no longer describes the product.
    """
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device
    synchronize(device)
    with profile(activities=activities) as recorded:
        start = time.perf_counter()
        step()
        synchronize(device)
        total = time.perf_counter() - start
    parts = part_seconds(recorded.events(), on_device)
    parts[OTHER] = max(0.0, total - sum(parts.values()))
    return parts, recorded


def part_seconds(events: Iterable, on_device: bool) -> dict[str, float]:
    """Part -> seconds, from the profiler's events (times in microseconds)."""
    events = list(events)
    labels = [
        _Label(e.time_range.start, e.time_range.end, e.name.removeprefix(PREFIX))
        for e in events
        if e.device_type == torch.autograd.DeviceType.CPU and e.name.startswith(PREFIX)
    ]
    if missing := set(PARTS) - {label.part for label in labels}:
        raise LookupError(
            f"no label {PREFIX}{', '.join(sorted(missing))} in the step: PARTS is not what the product has"
        )
    labels = _without_nested_in_events(sorted(labels, key=lambda label: (label.start, -label.end)))
    parts = dict.fromkeys(PARTS, 0.0)
    for label in labels:
        if not on_device or label.part in ON_THE_HOST:
            parts[label.part] += (label.end - label.start) / 1e6
            if (outer := _innermost(labels, label.start, label)) is not None:
                parts[outer.part] -= (label.end - label.start) / 1e6
    for event in events if on_device else ():
        # The profiler shows a label as a span of the device as well: not a kernel.
        microseconds = sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)
        label = _innermost(labels, event.time_range.start) if microseconds else None
        if label is not None and label.part not in ON_THE_HOST:
            parts[label.part] += microseconds / 1e6
    return parts


class _Label(NamedTuple):
    """Microseconds."""

    start: float
    end: float
    part: str


def _without_nested_in_events(labels: list[_Label]) -> list[_Label]:
    resizes = [label for label in labels if label.part == "resize"]
    return [x for x in labels if x in resizes or not any(r.start <= x.start < r.end for r in resizes)]


def _innermost(labels: list[_Label], moment: float, inside: _Label | None = None) -> _Label | None:
    """The last label to begin of those that include `moment`, or all of the label `inside`."""
    end = inside.end if inside else moment
    around = (label for label in reversed(labels) if label.start <= moment and end <= label.end and label is not inside)
    return next(around, None)


@contextlib.contextmanager
def teacher_labelled(trainer) -> Iterator[None]:
    """Label every call of the teacher's modules, where it runs in lock-step: the loop's own label is over by then."""
    undo, calls = contextlib.ExitStack(), []

    def enter(*_: object) -> None:
        calls.append(None if calls else record_function(f"{PREFIX}teacher").__enter__())

    def leave(*_: object) -> None:
        if (label := calls.pop()) is not None:
            label.__exit__(None, None, None)

    with undo:
        if trainer.teacher is not None and trainer.config.teacher.in_lock_step:
            for module in trainer.teacher.model.modules():
                undo.callback(module.register_forward_pre_hook(enter).remove)
                undo.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def operator_shares(recorded: profile, device: torch.device, count: int = 12) -> dict:
    """Shares in the self time of all operators (device time on a GPU): `gemm`, and the `count` largest `others`."""
    on_device, spent = device.type == "cuda", {}
    for event in recorded.key_averages():
        if on_device == (event.device_type == torch.autograd.DeviceType.CUDA) and not event.key.startswith(PREFIX):
            microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
            spent[event.key] = spent.get(event.key, 0.0) + microseconds
    total = sum(spent.values()) or 1.0
    beside = {name: microseconds / total for name, microseconds in spent.items() if not _GEMM.fullmatch(name)}
    largest = sorted(beside.items(), key=lambda entry: -entry[1])[:count]
    return {"gemm": 1 - sum(beside.values()), "others": largest}


def summed(steps: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in steps) for name in (*PARTS, OTHER)}


def explained(seconds: dict[str, float]) -> float:
    """Share of the step that the named parts account for."""
    total = sum(seconds.values())
    return 1 - seconds[OTHER] / total if total else 1.0
