"""teacher.runtime=deepspeed: the backbone inside `deepspeed.init_inference`, without DeepSpeed's own layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from homodistil.models.activations import ActivationHooks, Activations
from homodistil.models.family import ModelFamily


class EngineRuntime(ActivationHooks):
    """A cast and a wrapper: the module computes as before."""

    def __init__(self, model: nn.Module, family: ModelFamily, dtype: torch.dtype) -> None:
        import deepspeed

        super().__init__(model, family)
        self._backbone = deepspeed.init_inference(family.backbone(model), dtype=dtype)

    @torch.no_grad()
    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_types: Tensor | None = None
    ) -> Activations:
        return self.run(input_ids, attention_mask, token_types)
