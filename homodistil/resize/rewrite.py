"""Changes values of a live engine in place, whatever its layout: an event's linear maps, refitted weights, moments.

What depends on old values is done one parameter at a time: gathered over the ranks, weight and optimizer state together
in fp32, changed as a whole by every rank alike, and each rank's own share written back. Shapes stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from homodistil.models.parameter_shape import full_shape
from homodistil.models.resize_plan import ResizePlan, transform
from homodistil.resize.adapters.adapter import Adapter, MasterSlice, StateGroup, held_part

Values = dict[str, Tensor]
"""Kind ("weight", "exp_avg", "exp_avg_sq") -> whole fp32 tensor; states are absent before the first step, and for
frozen parameters."""

Change = Callable[[str, Values], Values]
"""(parameter name, its values) -> those to write, of the same shapes, alike on all ranks; absent kinds stay."""

Share = tuple[StateGroup, MasterSlice]


def rewrite(adapter: Adapter, names: Iterable[str], change: Change) -> None:
    """Change weight and optimizer state of `names`, the same on every rank; the model's weights follow. Collective."""
    shares, kinds = _shares_by_name(adapter), _state_kinds(adapter)
    for name in names:
        param = adapter.parameters[name]
        own_kinds = ["weight", *kinds] if param.requires_grad else ["weight"]
        values = _gather(adapter, name, shares.get(name, []), own_kinds)
        for kind, value in change(name, values).items():
            _write(shares.get(name, []), kind, value.flatten())
    adapter.weights_from_masters()


def apply_maps(adapter: Adapter, plan: ResizePlan) -> None:
    """Contract what `plan.maps` names, second moments with the squared maps; results lie in the leading entries."""

    def change(name: str, values: Values) -> Values:
        maps = plan.maps[name]
        return {k: _as_leading(transform(v, {}, maps, k.endswith("_sq")), v.shape) for k, v in values.items()}

    rewrite(adapter, plan.maps, change)


def overwrite_weights(adapter: Adapter, weights: Mapping[str, Tensor]) -> None:
    """See `homodistil.resize.write_weights`. Nothing is gathered: every rank has all the new values."""
    for name, weight in weights.items():
        shape = full_shape(adapter.parameters[name]) if name in adapter.parameters else None
        if shape != tuple(weight.shape):
            raise ValueError(f"new values of shape {tuple(weight.shape)} for {name}, which has {shape}")
    shares = _shares_by_name(adapter)
    for name, weight in weights.items():
        _write(shares.get(name, []), "weight", weight.flatten())
    adapter.weights_from_masters()


def reset_states(adapter: Adapter) -> None:
    """Optimizer states as before the first step: values and counts (Adam's bias correction starts anew as well)."""
    for group in adapter.groups():
        for key, value in group.state.items():
            if torch.is_tensor(value):
                value.zero_()
            else:
                group.state[key] = type(value)()
    for settings in adapter.torch_optimizer().param_groups:
        if "step" in settings:  # apex and DeepSpeed's FusedAdam count a group
            settings["step"] = type(settings["step"])()


def _shares_by_name(adapter: Adapter) -> dict[str, list[Share]]:
    shares: dict[str, list[Share]] = {}
    for group in adapter.groups() + adapter.frozen_groups():
        for held in group.held:
            shares.setdefault(held.name, []).append((group, held))
    return shares


def _state_kinds(adapter: Adapter) -> list[str]:
    """Names of the optimizer states: equal on every rank, also where a rank holds nothing of a parameter: every rank
    has every group."""
    return sorted({kind for group in adapter.groups() for kind in group.per_element()})


def _gather(adapter: Adapter, name: str, shares: list[Share], kinds: list[str]) -> Values:
    shape = full_shape(adapter.parameters[name])
    device = next(iter(adapter.parameters.values())).device
    whole = torch.zeros(len(kinds), math.prod(shape), device=device)
    for group, held in shares:
        tensors = {"weight": group.master, **group.per_element()}
        for row, kind in zip(whole, kinds, strict=True):
            if kind in tensors:
                row[held.start : held.start + held.numel] = held_part(tensors[kind], held)
    if not any(group.replicated for group, _ in shares):
        dist.all_reduce(whole)  # every element is on one rank, the others add zero
    return {kind: row.view(shape) for kind, row in zip(kinds, whole, strict=True)}


def _write(shares: list[Share], kind: str, flat: Tensor) -> None:
    for group, held in shares:
        target = group.master if kind == "weight" else group.per_element().get(kind)
        if target is not None:
            held_part(target, held).copy_(flat[held.start : held.start + held.numel])


def _as_leading(small: Tensor, shape: torch.Size) -> Tensor:
    """`small` in the leading entries of a tensor of `shape`, zero behind it."""
    large = small.new_zeros(shape)
    large[tuple(slice(size) for size in small.shape)] = small
    return large
