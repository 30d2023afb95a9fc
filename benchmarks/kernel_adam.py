"""AdamW with importance in one pass, beside torch's fused AdamW and scores as separate operations: for kernels.py."""

from __future__ import annotations

import torch
from kernel_problems import Inputs, Problem, Variant, implementations
from torch import Tensor

from homodistil.kernels.adam_importance import AdamSettings, Segment, SegmentTable, adamw_with_sums_, fused_adamw_

SETTINGS = AdamSettings(lr=0.0, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.01)
"""A learning rate of 0 costs the same and leaves the weights alone, so that every run has the same scores."""
_SIZES = {("cuda", "standard"): (30522, 768), ("cuda", "quick"): (30522, 768), ("cpu", "standard"): (8192, 768)}


def adam_problems(device: torch.device, size: str) -> list[Problem]:
    """One matrix as an optimizer holds it: flat, fp32, with both moments."""
    rows, columns = _SIZES.get((device.type, size), (3072, 768))
    table = SegmentTable([Segment(0, rows * columns, 0, columns, 0, rows)], rows * columns)

    def make(device: torch.device, _dtype: torch.dtype) -> Inputs:
        found = {name: torch.randn(rows * columns, device=device) for name in ("weight", "gradient")}
        found |= {name: torch.zeros(rows * columns, device=device) for name in ("exp_avg", "exp_avg_sq")}
        return found | {"step": torch.ones((), device=device)}

    def eager(x: Inputs) -> Tensor:
        scores = (x["weight"] * x["gradient"]).abs().view(rows, columns)
        sums = torch.cat([scores.sum(1), scores.sum(0)])
        fused_adamw_([x["weight"]], [x["gradient"]], [x["exp_avg"]], [x["exp_avg_sq"]], [x["step"]], SETTINGS)
        return sums

    def ours(implementation: str) -> Variant:
        def run(x: Inputs) -> Tensor:
            sums = torch.zeros(rows + columns, device=x["weight"].device)
            tensors = (x["weight"], x["gradient"], x["exp_avg"], x["exp_avg_sq"], x["step"])
            adamw_with_sums_(*tensors, SETTINGS, table, sums, implementation)
            return sums

        return run

    return [
        Problem(
            operation="AdamW + importance",
            shape=f"{rows} x {columns}",
            make=make,
            leaves=(),
            variants={"eager": eager} | {f"homodistil {name}": ours(name) for name in implementations(device)},
            flops=14.0 * rows * columns,
            elements=7.0 * rows * columns,
            itemsize=4,
        )
    ]
