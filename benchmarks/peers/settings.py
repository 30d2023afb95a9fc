"""Precision settings that a user of a peer can choose between; the faster one is compared with."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

SETTINGS = {"fp32": ["fp32"], "bf16": ["autocast", "bf16 weights"]}
"""Precision of the run -> settings to try. autocast: fp32 weights, products in bf16; bf16 weights: no fp32 copy of
them anywhere, which a long training would not survive, but which is what `.bfloat16()` gives."""


def student_in(setting: str, *modules: nn.Module) -> None:
    if setting == "bf16 weights":
        for module in modules:
            module.bfloat16()


def teacher_in(setting: str, teacher: nn.Module) -> nn.Module:
    """Frozen; its weights in bf16 wherever the run is: nothing updates them."""
    teacher = teacher.eval().requires_grad_(False)
    return teacher if setting == "fp32" else teacher.bfloat16()


def computing_in(setting: str) -> contextlib.AbstractContextManager:
    """Around forward passes and losses."""
    return torch.autocast("cpu", torch.bfloat16) if setting == "autocast" else contextlib.nullcontext()
