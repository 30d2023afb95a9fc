"""teacher.runtime=torch: the module as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from homodistil.models.activations import ActivationHooks, Activations
from homodistil.models.family import ModelFamily


class PlainRuntime:
    def __init__(self, model: nn.Module, family: ModelFamily) -> None:
        self._taps = ActivationHooks(model, family)
        self.scale = self._taps.scale

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_types: Tensor | None = None
    ) -> Activations:
        return self._taps.run(input_ids, attention_mask, token_types)
