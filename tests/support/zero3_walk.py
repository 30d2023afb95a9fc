"""What a ZeRO-3 engine holds, by a walk along DeepSpeed's own flat buffers and shares. No homodistil in here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_zero3(engine) -> bool:
    return hasattr(engine.optimizer, "fp16_partitioned_groups_flat")


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's own weights, frozen ones too, put together from every rank's share."""
    return {name: _whole(p.ds_tensor, p) for name, p in model.named_parameters()}


def full_state(engine, model: nn.Module, key: str) -> dict[str, Tensor]:
    """Optimizer state by parameter name."""
    name_of, state = {p: name for name, p in model.named_parameters()}, engine.optimizer.optimizer.state
    return {name_of[p]: _whole(state[master][key][at : at + n], p) for p, master, _, at, n in _shares(engine)}


def check_padding(engine, model: nn.Module, keys: tuple[str, ...]) -> None:
    """Behind the last element of every parameter: zeros, in weights, masters and moments."""
    state, rank = engine.optimizer.optimizer.state, dist.get_rank()
    for p, master, flat, at, n in _shares(engine):
        used = min(n, max(0, p.ds_shape.numel() - rank * n))
        assert flat.data_ptr() + at * flat.element_size() == p.ds_tensor.data_ptr()
        for tensor in (flat, master, *(state[master][key] for key in keys)):
            assert not tensor.detach()[at + used : at + n].any()
    for p in model.parameters():
        if not p.requires_grad:
            used = min(p.ds_tensor.numel(), max(0, p.ds_shape.numel() - rank * p.ds_tensor.numel()))
            assert not p.ds_tensor[used:].any()


def _shares(engine) -> Iterator[tuple[nn.Parameter, Tensor, Tensor, int, int]]:
    """(parameter, master, flat weights, where in both its share begins, its length)."""
    optimizer = engine.optimizer
    groups = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
    for params, master, flat in zip(*groups, strict=True):
        position = 0
        for p in params:
            numel = -(-p.ds_shape.numel() // dist.get_world_size())
            yield p, master, flat, position, numel
            position += numel
        assert position == master.numel() == flat.numel()


def _whole(share: Tensor, p: nn.Parameter) -> Tensor:
    shares = [torch.empty_like(share) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, share.detach().contiguous())
    return torch.cat(shares)[: p.ds_shape.numel()].view(p.ds_shape).clone()
