"""Residual dims that must not go: those that carry much of the variance at some LayerNorm's input.

Every BERT has one or two. Sensitivity ranks them low, and without them LayerNorm rescales all others
(design decision 5).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from homodistil.data.batch import Batch
from homodistil.models.backbone import run_backbone
from homodistil.models.family import ModelFamily


@torch.no_grad()
def variance_shares(model: nn.Module, family: ModelFamily, batches: Iterable[Batch]) -> Tensor:
    """Largest share of the variance that each residual dim carries at any LayerNorm's input, fp32 (hidden,),
    on the model's device.

    A share is E[(x_j - mean of its token)^2] over the sum of the same for all dims, over valid tokens.

    Args:
        model: at the teacher's widths, with its own layers (a runtime may have replaced those of the teacher).
        family: its table.
    """
    norms = family.layer_norms(model)
    meters = {name: _ShareMeter() for name in norms}
    handles = [norms[name].register_forward_pre_hook(meter) for name, meter in meters.items()]
    try:
        for batch in batches:
            for meter in meters.values():
                meter.attention_mask = batch.attention_mask
            run_backbone(model, family, batch.input_ids, batch.padding_mask, batch.token_types)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([meter.shares() for meter in meters.values()]).amax(0)


class _ShareMeter:
    """Forward pre-hook of one LayerNorm."""

    def __init__(self) -> None:
        self.attention_mask: Tensor | None = None
        self._sum: Tensor | None = None

    def __call__(self, _module, inputs) -> None:
        x = inputs[0].float()
        squared = (x - x.mean(-1, keepdim=True)).square() * self.attention_mask.unsqueeze(-1)
        total = squared.sum((0, 1)).double()
        self._sum = total if self._sum is None else self._sum + total

    def shares(self) -> Tensor:
        return (self._sum / self._sum.sum()).float()


def protected_dims(shares: Tensor, threshold: float, target_width: int) -> Tensor:
    """Indices of dims above `threshold` (0 = none), the largest shares first, at most half of the target width."""
    if threshold <= 0:
        return torch.empty(0, dtype=torch.int64)
    shares = shares.cpu()
    above = (shares > threshold).nonzero().squeeze(1)
    order = shares[above].argsort(descending=True)[: target_width // 2]
    return above[order].sort().values
