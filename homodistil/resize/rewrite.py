"""Changes values of a live engine in place, for any layout: linear maps of an event, refitted weights, moments.

Changes that depend on old values are made one parameter at a time: weight and optimizer state are gathered in fp32,
every rank computes the same change of the whole, and writes back the part that it holds. Shapes do not change.
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
"""Kind ("weight", "exp_avg", "exp_avg_sq") -> whole fp32 tensor. Optimizer states are absent before the first step and
for frozen parameters."""

Change = Callable[[str, Values], Values]
"""(parameter name, its values) -> new values of the same shapes, the same on all ranks. Absent kinds do not change."""

Share = tuple[StateGroup, MasterSlice]


def rewrite(adapter: Adapter, names: Iterable[str], change: Change) -> None:
    """Apply `change` to weight and optimizer state of the parameters `names`, and update the model. Collective.

    Args:
        names: the same on every rank, in the same order.
    """
    shares, kinds = _shares_by_name(adapter), _state_kinds(adapter)
    for name in names:
        param = adapter.parameters[name]
        own_kinds = ["weight", *kinds] if param.requires_grad else ["weight"]
        values = _gather(adapter, name, shares.get(name, []), own_kinds)
        for kind, value in change(name, values).items():
            _write(shares.get(name, []), kind, value.flatten())
    adapter.weights_from_masters()


def apply_maps(adapter: Adapter, plan: ResizePlan) -> None:
    """Multiply the parameters in `plan.maps` and their optimizer states by the maps (second moments: squared maps).

    The results are in the leading entries of the unchanged shapes, the rest is zero. Collective.
    """

    def change(name: str, values: Values) -> Values:
        maps = plan.maps[name]
        return {k: _as_leading(transform(v, {}, maps, k.endswith("_sq")), v.shape) for k, v in values.items()}

    rewrite(adapter, plan.maps, change)


def overwrite_weights(adapter: Adapter, weights: Mapping[str, Tensor]) -> None:
    """See `homodistil.resize.write_weights`. Needs no gathering, because every rank has all new values."""
    for name, weight in weights.items():
        shape = full_shape(adapter.parameters[name]) if name in adapter.parameters else None
        if shape != tuple(weight.shape):
            raise ValueError(f"new values of shape {tuple(weight.shape)} for {name}, which has {shape}")
    shares = _shares_by_name(adapter)
    for name, weight in weights.items():
        _write(shares.get(name, []), "weight", weight.flatten())
    adapter.weights_from_masters()


def reset_states(adapter: Adapter) -> None:
    """Reset optimizer states and step counts to their values before the first step; bias correction restarts, too."""
    for group in adapter.groups():
        for key, value in group.state.items():
            if torch.is_tensor(value):
                value.zero_()
            else:
                group.state[key] = type(value)()
    for settings in adapter.torch_optimizer().param_groups:
        if "step" in settings:  # apex and DeepSpeed's FusedAdam count per group
            settings["step"] = type(settings["step"])()


def _shares_by_name(adapter: Adapter) -> dict[str, list[Share]]:
    shares: dict[str, list[Share]] = {}
    for group in adapter.groups() + adapter.frozen_groups():
        for held in group.held:
            shares.setdefault(held.name, []).append((group, held))
    return shares


def _state_kinds(adapter: Adapter) -> list[str]:
    """Names of the optimizer states. The same on every rank, because every rank has every group, even if it holds no
    elements of some parameters."""
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
        dist.all_reduce(whole)  # every element is on one rank; all other ranks add zero
    return {kind: row.view(shape) for kind, row in zip(kinds, whole, strict=True)}


def _write(shares: list[Share], kind: str, flat: Tensor) -> None:
    for group, held in shares:
        target = group.master if kind == "weight" else group.per_element().get(kind)
        if target is not None:
            held_part(target, held).copy_(flat[held.start : held.start + held.numel])


def _as_leading(small: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of `shape` with `small` in its leading entries and zeros elsewhere."""
    large = small.new_zeros(shape)
    large[tuple(slice(size) for size in small.shape)] = small
    return large
