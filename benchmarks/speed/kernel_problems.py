"""The operations that kernels.py compares: shapes, inputs, and each variant as a function from inputs to a loss.

`eager` is the formula in plain torch, with all its matrices. FLOPs are those of the eager formula and bytes the least
any way has to move (inputs read once, gradients written once): both are the same for every variant of a problem.
"""

from __future__ import annotations

import torch

from benchmarks.speed.kernel_problem import Problem
from benchmarks.speed.layer_problems import TARGETS, attention_problem, hidden_problem
from benchmarks.speed.vocabulary_problems import decoder_problem, logits_problem, mlm_head_problem


def problems(device: torch.device, size: str) -> list[Problem]:
    """What a `size` of "quick" or "standard" compares on this device."""
    shapes = _SHAPES[device.type, size]
    made = [attention_problem(*shape, target, device) for shape in shapes["attention"] for target in TARGETS]
    made += [logits_problem(num_rows, device) for num_rows in shapes["rows"]]
    made += [decoder_problem(*shape, device) for shape in shapes["linear"]]
    made += [mlm_head_problem(sequences, device) for sequences in shapes["head"]]
    return made + [
        hidden_problem(*shape, device, space) for shape in shapes["hidden"] for space in ("raw", "normalised")
    ]


_SHAPES = {
    ("cuda", "quick"): {
        "attention": [(64, 12, 128, 64, 64), (16, 12, 512, 64, 64)],
        "rows": [1229],
        "linear": [(1229, 768, 768)],
        "head": [64],
        "hidden": [(64, 128, 576, 768)],
    },
    ("cuda", "standard"): {
        "attention": [(64, 12, 128, 64, 64), (64, 12, 128, 20, 64), (16, 12, 512, 64, 64), (16, 12, 512, 48, 64)],
        "rows": [1229, 8192],
        "linear": [(1229, 768, 768), (1229, 256, 768), (8192, 576, 768)],
        "head": [64],
        "hidden": [(64, 128, 576, 768), (256, 128, 576, 768)],
    },
    ("cpu", "quick"): {
        "attention": [(4, 12, 128, 64, 64), (1, 12, 512, 28, 64)],
        "rows": [128],
        "linear": [(128, 256, 768)],
        "head": [2],
        "hidden": [(8, 128, 256, 768)],
    },
    ("cpu", "standard"): {
        "attention": [(8, 12, 128, 64, 64), (8, 12, 128, 20, 64), (2, 12, 512, 64, 64), (2, 12, 512, 28, 64)],
        "rows": [154, 1024],
        "linear": [(154, 768, 768), (154, 256, 768), (1024, 256, 768)],
        "head": [8],
        "hidden": [(8, 128, 256, 768), (8, 128, 576, 768)],
    },
}
"""attention: B, heads, T, dims of a student head, of a teacher head. linear: rows, hidden of student, of teacher.
head: sequences. hidden: B, T, hidden of student, of teacher."""
