"""Stage 0 in bf16 or fp16 with DeepSpeed's FusedAdam: FP16_Optimizer (DeepSpeed 0.19, runtime/fp16/fused_optimizer.py).

Each parameter group is one flat buffer of model weights and one of fp32 masters, both whole on every rank. This is a
layout with one partition, so nothing is sent between ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Set

import torch
from torch import Tensor, nn

from homodistil.resize.adapters.adapter import MasterSlice
from homodistil.resize.adapters.flat_adapter import FlatAdapter
from homodistil.resize.flat import FlatMove, Layout


class FusedAdapter(FlatAdapter):
    masters_field = "fp32_groups_flat"
    weights_field = "fp16_groups_flat"
    params_field = "fp16_groups"
    fields = {
        "optimizer": torch.optim.Optimizer,
        "fp16_groups": list,
        "fp16_groups_flat": list,
        "fp32_groups_flat": list,
        "flatten_grad_norm_mask_list": list,
    }

    def process_group(self, i: int) -> None:
        return None

    def rank(self, i: int) -> int:
        return 0  # the only partition

    def layout(self, i: int) -> Layout:
        return Layout.packed([tuple(param.shape) for param in self.params(i)], 1, *self.alignment(i))

    def alignment(self, i: int) -> tuple[int, int]:
        return 1, 1

    def check_layout(self) -> None:
        masks = [mask.numel() for mask in self.optimizer.flatten_grad_norm_mask_list]
        if any(masks):  # ranges of elements that the norm excludes; only with model parallelism
            raise ValueError(f"flatten_grad_norm_mask_list: found {masks} entries, expected none")
        for i, master in enumerate(self.masters()):
            numel = self.layout(i).numel
            self.check_group(
                i,
                {
                    "fp16_groups_flat": (self.weights(i).numel(), numel),
                    "fp32_groups_flat": (tuple(master.shape), (numel,)),
                },
            )

    def weights_follow_masters(self) -> bool:
        # The wrapper creates its states by a step on zero gradients, in which weight decay changes the masters only.
        return self.engine.global_steps > self.engine.skipped_steps

    def has_pending_gradients(self) -> bool:
        return any(param.grad is not None for param in self.parameters.values())

    def gradients(self, i: int) -> Callable[[MasterSlice], Tensor]:
        def gradient(held: MasterSlice) -> Tensor:
            param = self.parameters[held.name]
            return torch.zeros_like(param) if param.grad is None else param.grad

        return gradient

    def forget(self, i: int, leaving: Set[nn.Parameter]) -> None:
        super().forget(i, leaving)
        forget_overflows(self.optimizer, leaving)

    def resize_group(self, i: int, move: FlatMove) -> int:
        dtype, device = self.weights(i).dtype, self.weights(i).device
        bytes_moved = self.move_states(i, move)
        self.release_weights(i)
        self.optimizer.fp16_groups_flat[i] = None
        flat = self.optimizer.fp16_groups_flat[i] = torch.empty(move.new.numel, dtype=dtype, device=device)
        self.spread_weights(i, [flat])
        self.bind_weights(i, move.new)
        return bytes_moved

    def weights_from_masters(self) -> None:
        for i, flat in enumerate(self.optimizer.fp16_groups_flat):
            self.spread_weights(i, [flat])


def forget_overflows(wrapper, leaving: Set[nn.Parameter]) -> None:
    """Take `leaving` out of the parameters whose gradients a wrapper of stage 0 looks through for overflows."""
    checker = wrapper.overflow_checker
    checker.params = [param for param in checker.params if param not in leaving]
