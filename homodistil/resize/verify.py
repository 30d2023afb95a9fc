"""The gate behind every resize event: on any rank, does the engine now hold exactly what the plan said?

A wrong shape, padding that is not zero (it would leak into gradient norms), a weight that is not finite or weights that
are not the rounded masters stop the run on all ranks, with the checkpoint before the event intact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from homodistil.distributed import ranks
from homodistil.errors import CheckFailed
from homodistil.models.parameter_shape import full_shape
from homodistil.models.resize_plan import ResizePlan
from homodistil.resize.adapters.adapter import Adapter
from homodistil.resize.flat import Shape, shape_after


def shapes_after(adapter: Adapter, plan: ResizePlan) -> dict[str, Shape]:
    """Parameter name -> shape that it must have once `plan` (which fits the adapter's model) is applied."""
    return {name: shape_after(full_shape(p), plan.index.get(name, {})) for name, p in adapter.parameters.items()}


def verify_resize(adapter: Adapter, expected: dict[str, Shape]) -> None:
    """Raise `CheckFailed`, the same on every rank, unless everything is as it must be. Every rank calls it."""
    failed = ranks.failures(_first_failure(adapter, expected))
    if failed:
        raise CheckFailed(f"resize: after the event {'; '.join(failed)}; training stops, the last checkpoint is intact")


def _first_failure(adapter: Adapter, expected: dict[str, Shape]) -> str | None:
    for name, param in adapter.parameters.items():
        if full_shape(param) != expected[name]:
            return f"{name} has shape {full_shape(param)}, the plan says {expected[name]}"
    try:
        adapter.check_layout()
    except ValueError as error:
        return str(error)
    if any(bool(stretch.any()) for stretch in adapter.padding()):
        return "padding of a flat buffer is not zero"
    for group in adapter.groups():
        for kind, tensor in {"weights": group.master.detach(), **group.per_element()}.items():
            if not _all_finite(tensor):
                return f"{kind} of {_culprit(group, tensor)} are not finite"
    return None


def _all_finite(tensor: Tensor) -> bool:
    """One pass without a temporary: a sum is finite unless an element is not (or thousands are near the limit)."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _culprit(group, tensor: Tensor) -> str:
    for held in group.held:
        if not torch.isfinite(tensor.view(-1)[held.position : held.position + held.numel]).all():
            return held.name
    return "the padding"
