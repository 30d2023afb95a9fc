"""teacher.runtime=deepspeed: the backbone inside `deepspeed.init_inference`, with its own kernels only on request.

Injected kernels (DeepSpeed 0.19) were written for another Hugging Face: their layer returns a tuple that today's
encoder feeds straight on, and takes SDPA's boolean padding mask for an additive one, so that padding leaks without a
word. Both are put right here; whether that was enough is tried at start (self_check.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from homodistil.distill.runtime.self_check import Probe, check_same
from homodistil.errors import UserError
from homodistil.models.activations import ActivationHooks, Activations
from homodistil.models.family import ModelFamily


class EngineRuntime(ActivationHooks):
    """Without injection: a cast and a wrapper, the module computes as before."""

    shows_attention = True

    def __init__(self, model: nn.Module, family: ModelFamily, _device: torch.device, dtype: torch.dtype) -> None:
        import deepspeed

        super().__init__(model, family)
        self._backbone = deepspeed.init_inference(family.backbone(model), dtype=dtype)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None) -> Activations:
        return self.run(input_ids, attention_mask)


class InjectedRuntime:
    """With DeepSpeed's kernels in place of the model's layers. Queries and keys stay inside them.

    Raises:
        UserError: DeepSpeed refuses, or its layers compute something else than the model's.
    """

    shows_attention = False

    def __init__(self, model: nn.Module, family: ModelFamily, device: torch.device, dtype: torch.dtype) -> None:
        self.scale = float(family.attentions(model)[0].scaling)
        probe = Probe.make(model.config, device)
        plain = HiddenStates(model, family, family.backbone(model))
        expected, _ = plain(probe.input_ids, probe.attention_mask), plain.close()
        self._hidden = HiddenStates(model, family, inject_kernels(model, family, device, dtype))
        check_same(self._hidden, expected, probe, "teacher.kernel_inject")

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None) -> Activations:
        if attention_mask is None:  # these kernels were written for a mask, and are tried with one
            attention_mask = torch.ones_like(input_ids)
        embedding, *layers = self._hidden(input_ids, attention_mask)
        return Activations(embedding, layers, [None] * len(layers), [None] * len(layers), self.scale)


class HiddenStates:
    """(input_ids, attention_mask) -> [what entered layer 0, output of every layer], each (B, T, D), through hooks."""

    def __init__(self, model: nn.Module, family: ModelFamily, backbone: nn.Module) -> None:
        self._backbone, self._seen = backbone, []
        modules = [family.embeddings(model), *family.layers(model)]
        self._handles = [module.register_forward_hook(self._see) for module in modules]

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        self._seen = []
        self._backbone(input_ids=input_ids, attention_mask=attention_mask)
        seen, self._seen = self._seen, []
        return seen

    def _see(self, _module: nn.Module, _args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        self._seen.append(output[0] if isinstance(output, tuple) else output)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def inject_kernels(model: nn.Module, family: ModelFamily, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Replace the layers of `model` by DeepSpeed's. Returns the engine around the backbone."""
    import deepspeed

    backbone = family.backbone(model)
    backbone.set_attn_implementation("eager")  # the one whose padding mask is additive
    try:
        engine = deepspeed.init_inference(backbone, dtype=dtype, replace_with_kernel_inject=True)
    except Exception as error:  # DeepSpeed raises assertions, build errors and its own, depending on what is missing
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"teacher.kernel_inject: DeepSpeed cannot put its kernels into this teacher on {device.type} ({reason}); "
            f"set teacher.kernel_inject=false"
        ) from error
    for layer in family.layers(model):
        layer.config.return_tuple = False  # DeepSpeed sets it whatever is asked for
    return engine
