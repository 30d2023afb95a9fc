"""Compares DeepSpeed's fields at stage 3 with the layout that `Zero3Adapter` computes from shapes alone.

A share is the part of a parameter that this rank keeps. Shares of a sub-group lie end to end in its flat buffer, and
their reduced gradients in the same order in one buffer for all groups.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from homodistil.models.parameter_shape import full_shape
from homodistil.resize.adapters.adapter import MasterSlice
from homodistil.resize.flat import Layout

GRADIENT_OF_ID = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
"""`ds_id` of a parameter -> its share of the reduced gradient, a view of `grad_partitions_flat_buffer`."""


class Stage3Layout(Protocol):
    """The layout as `Zero3Adapter` computes it, with which DeepSpeed's fields are compared."""

    optimizer: Any
    """DeepSpeedZeroOptimizer_Stage3."""
    name_of: dict[nn.Parameter, str]

    def masters(self) -> list[Tensor]: ...
    def params(self, i: int) -> list[nn.Parameter]: ...
    def frozen(self) -> list[nn.Parameter]: ...
    def layout(self, param: nn.Parameter) -> Layout: ...
    def padding_size(self, param: nn.Parameter) -> int: ...
    def held(self, params: list[nn.Parameter]) -> list[MasterSlice]: ...
    def torch_optimizer(self) -> torch.optim.Optimizer: ...


def check_books(adapter: Stage3Layout) -> None:
    """Raise ValueError that names the first private field that differs from the layout of `adapter`."""
    optimizer, before = adapter.optimizer, 0
    for i in range(len(adapter.masters())):
        _check_group(adapter, i)
        _check_shares(adapter, i, before)
        _check_content(adapter, i)
        before += adapter.masters()[i].numel()
    for field in ("lp_param_buffer", "grad_partitions_flat_buffer"):
        _expect(field, tuple(getattr(optimizer, field).shape), (before,))
    for param in adapter.frozen():
        _check_sizes(adapter.name_of[param], param, adapter.layout(param))


def _check_group(adapter: Stage3Layout, i: int) -> None:
    optimizer, master, params = adapter.optimizer, adapter.masters()[i], adapter.params(i)
    numel = sum(adapter.layout(param).partition_numel for param in params)
    shares = optimizer.fp16_partitioned_groups[i]
    same = [share is param.ds_tensor for share, param in zip(shares, params, strict=True)]
    _expect(f"fp16_partitioned_groups[{i}]: shares of its parameters", same, [True] * len(params))
    _expect(f"fp16_partitioned_groups_flat_numel[{i}]", optimizer.fp16_partitioned_groups_flat_numel[i], numel)
    _expect(f"fp16_partitioned_groups_flat[{i}]", tuple(optimizer.fp16_partitioned_groups_flat[i].shape), (numel,))
    _expect(f"fp32_partitioned_groups_flat[{i}]", tuple(master.shape), (numel,))
    _expect(f"groups_padding[{i}]", list(optimizer.groups_padding[i]), [adapter.padding_size(p) for p in params])
    if optimizer.offload_optimizer:
        actual = None if master.grad is None else tuple(master.grad.shape)
        _expect(f"fp32_partitioned_groups_flat[{i}].grad", actual, (numel,))
    for key, value in adapter.torch_optimizer().state.get(master, {}).items():
        if torch.is_tensor(value) and value.ndim > 0:
            _expect(f"optimizer state {key!r} of group {i}", tuple(value.shape), (numel,))


def _check_shares(adapter: Stage3Layout, i: int, before: int) -> None:
    """Check the shares of group `i`. `before`: number of elements on this rank in all groups before it."""
    optimizer, position = adapter.optimizer, 0
    flat, gradients = optimizer.fp16_partitioned_groups_flat[i], optimizer.grad_partitions_flat_buffer
    gradient_of_id = getattr(optimizer, GRADIENT_OF_ID)
    for param in adapter.params(i):
        name, layout = adapter.name_of[param], adapter.layout(param)
        _check_sizes(name, param, layout)
        numel = layout.partition_numel
        _expect_view(f"ds_tensor of {name} in fp16_partitioned_groups_flat[{i}]", param.ds_tensor, flat, position)
        actual = optimizer.grad_position.get(optimizer.get_param_id(param))
        _expect(f"grad_position of {name}", actual, [i, position, numel])
        gradient = gradient_of_id.get(param.ds_id)
        _expect(f"{GRADIENT_OF_ID} of {name}", None if gradient is None else tuple(gradient.shape), (numel,))
        _expect_view(f"{GRADIENT_OF_ID} of {name}", gradient, gradients, before + position)
        position += numel


def _check_sizes(name: str, param: nn.Parameter, layout: Layout) -> None:
    _expect(f"ds_shape of {name}", tuple(param.ds_shape), full_shape(param))
    _expect(f"ds_numel of {name}", param.ds_numel, layout.end)
    _expect(f"ds_numel_aligned of {name}", param.ds_numel_aligned, layout.numel)
    _expect(f"ds_tensor.ds_numel of {name}", param.ds_tensor.ds_numel, layout.partition_numel)
    _expect(f"ds_tensor of {name}", tuple(param.ds_tensor.shape), (layout.partition_numel,))


def _check_content(adapter: Stage3Layout, i: int) -> None:
    """Check that weights are the rounded masters, except for the padding, which DeepSpeed leaves uninitialised."""
    flat, master = adapter.optimizer.fp16_partitioned_groups_flat[i].detach(), adapter.masters()[i].detach()
    if flat.data_ptr() == master.data_ptr():
        return
    for held in adapter.held(adapter.params(i)):
        stretch = slice(held.position, held.position + held.numel)
        if not torch.equal(flat[stretch], master[stretch].to(device=flat.device, dtype=flat.dtype)):
            raise ValueError(f"fp32_partitioned_groups_flat[{i}]: the model's {held.name} is not this, rounded")


def _expect(field: str, actual: object, expected: object) -> None:
    if actual != expected:
        raise ValueError(f"{field}: found {actual}, expected {expected}")


def _expect_view(field: str, view: Tensor, flat: Tensor, position: int) -> None:
    if view.data_ptr() != flat.data_ptr() + position * flat.element_size():
        raise ValueError(f"{field}: not a view of its buffer at element {position}")
