"""The teacher's layers shared out over the ranks (ZeRO-3 inference): each is whole only while it runs.

Embeddings and MLM head stay whole everywhere: losses read the decoder's weights outside of any forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn


def shard_layers(layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Every rank calls it, and from then on runs the layers as often as all others. Each run gathers one layer.

    Storage and gathering are DeepSpeed's, the hooks are not: those of its engine expect whole passes in one order, and
    here layers run one by one, in lock-step with the student's.

    Args:
        layers: frozen, equal on all ranks, on any device; their parameters move to the rank's own one by one.
        dtype: of their parameters.
    """
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    for layer in layers:
        deepspeed.zero.Init(module=layer, config_dict_or_path=config, dtype=dtype)
        gathering = _Gathering(layer)
        layer.register_forward_pre_hook(gathering.begin)
        layer.register_forward_hook(gathering.end, always_call=True)


def num_parameters(model: nn.Module) -> int:
    """Parameters of the whole model, whether or not this rank has it all."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


class _Gathering:
    """The hooks of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        self._parameters = list(layer.parameters())
        self._open: AbstractContextManager | None = None

    def begin(self, _layer: nn.Module, _args: tuple) -> None:
        import deepspeed

        self._open = deepspeed.zero.GatheredParameters(self._parameters)
        self._open.__enter__()

    def end(self, _layer: nn.Module, _args: tuple, _output) -> None:
        is_open, self._open = self._open, None
        if is_open is not None:
            is_open.__exit__(None, None, None)
