"""Which operators a step spends its time in beside matrix products, by torch.profiler."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

# Operators on the CPU, kernels (cuBLAS, CUTLASS, Triton's by their names) on a GPU.
_GEMM = re.compile(r"aten::(addmm|mm|bmm|baddbmm|_addmm.*|linear)|mkldnn.*linear|.*(gemm|cutlass|nvjet|xmma).*", re.I)


def profile_step(step: Callable[[], None], device: torch.device, count: int = 12) -> dict:
    """Runs `step` once. Shares of its self time (device time on a GPU): `gemm`, and the `count` largest others."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as recorded:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    spent: dict[str, float] = {}
    for event in recorded.key_averages():
        on_device = device.type == "cuda"
        if on_device == (event.device_type == torch.autograd.DeviceType.CUDA):
            time = event.self_device_time_total if on_device else event.self_cpu_time_total
            spent[event.key] = spent.get(event.key, 0.0) + time
    return _shares(spent, count)


def _shares(spent: dict[str, float], count: int) -> dict:
    total = sum(spent.values()) or 1.0
    others = {name: time / total for name, time in spent.items() if not _GEMM.fullmatch(name)}
    largest = sorted(others.items(), key=lambda entry: -entry[1])[:count]
    return {"gemm": 1 - sum(others.values()), "others": largest}
