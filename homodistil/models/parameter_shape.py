"""The whole shape of a parameter, wherever its elements are.

Under ZeRO-3 a parameter is an empty tensor between uses; DeepSpeed leaves its shape as `ds_shape`.
"""

from __future__ import annotations

from torch import nn


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))


def full_numel(param: nn.Parameter) -> int:
    return int(getattr(param, "ds_numel", param.numel()))
