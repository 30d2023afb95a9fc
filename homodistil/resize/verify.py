"""Verification after every resize event that the engine on every rank matches the plan.

A wrong shape, padding that is not zero (it would enter gradient norms), a weight that is not finite, or weights that
are not the rounded master weights stop the run on all ranks. The checkpoint before the event is intact.
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
    """Parameter name -> full shape after `plan`, which must be made for the adapter's model."""
    return {name: shape_after(full_shape(p), plan.index.get(name, {})) for name, p in adapter.parameters.items()}


def verify_resize(adapter: Adapter, expected: dict[str, Shape]) -> None:
    """Raise the same `CheckFailed` on every rank unless all checks pass on all ranks. Every rank calls it.

    Args:
        expected: from `shapes_after`, called before the event.
    """
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
    """Whether all elements are finite. The sum needs no temporary; if it overflows, the elements are checked."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _culprit(group, tensor: Tensor) -> str:
    for held in group.held:
        if not torch.isfinite(tensor.view(-1)[held.position : held.position + held.numel]).all():
            return held.name
    return "the padding"
