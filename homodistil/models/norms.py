"""A norm of a stock model as what it computes: rows standardised over their dims, times a gain, plus a shift."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Norm(NamedTuple):
    """LayerNorm, or one of the library's RMSNorm classes."""

    module: nn.Module
    offset: float = 0.0
    """What the module adds to its weight: 1 for Gemma's, which are trained around 0."""

    @property
    def is_centred(self) -> bool:
        """Whether it takes the mean over the dims out of every row (LayerNorm; RMSNorm does not)."""
        return isinstance(self.module, nn.LayerNorm)

    @property
    def gain(self) -> Tensor:
        """fp64, (D,)."""
        return self.module.weight.double() + self.offset

    @property
    def shift(self) -> Tensor | None:
        """fp64, (D,); None: it adds nothing."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.double()

    @property
    def _eps(self) -> float:
        return getattr(self.module, "eps", None) or self.module.variance_epsilon

    def standardise(self, rows: Tensor) -> Tensor:
        """What it does before gain and shift, in fp64: (..., D) -> (..., D)."""
        rows = rows.double()
        if self.is_centred:
            return functional.layer_norm(rows, rows.shape[-1:], eps=self._eps)
        return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self._eps)

    @torch.no_grad()
    def write(self, gain: Tensor, shift: Tensor | None = None) -> None:
        """Set gain, and shift where it has one (None: as it is)."""
        self.module.weight.copy_(gain - self.offset)
        if shift is not None and self.shift is not None:
            self.module.bias.copy_(shift)
