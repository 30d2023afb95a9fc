"""ZeRO stage 0 without flat buffers: every rank holds everything, so resizing is local slicing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

import torch
from torch import Tensor, nn

from homodistil.models.resize_plan import DimIndex
from homodistil.resize.adapters.adapter import Adapter, MasterSlice, StateGroup, select_param, select_state
from homodistil.resize.adapters.fused import forget_overflows


class PlainAdapter(Adapter):
    """Stage 0 in fp32: the engine's optimizer is the torch optimizer over the parameters of the module."""

    fields = {"state": dict, "param_groups": list}

    def masters(self) -> dict[nn.Parameter, Tensor]:
        """Parameter of the model -> the fp32 tensor that the torch optimizer updates (here the parameter itself)."""
        return {param: param for group in self.optimizer.param_groups for param in group["params"]}

    def torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    def groups(self) -> list[StateGroup]:
        state = self.torch_optimizer().state
        return [
            StateGroup(
                master, state.get(master, {}), [MasterSlice(self.name_of[param], 0, 0, param.numel())], replicated=True
            )
            for param, master in self.masters().items()
        ]

    def gradients(self, i: int) -> Callable[[MasterSlice], Tensor]:
        def gradient(held: MasterSlice) -> Tensor:
            param = self.parameters[held.name]
            return torch.zeros_like(param) if param.grad is None else param.grad

        return gradient

    def check_layout(self) -> None:
        for param, master in self.masters().items():
            if master.shape != param.shape:
                actual, expected = tuple(master.shape), tuple(param.shape)
                raise ValueError(f"master weight of {self.name_of[param]}: shape {actual}, expected {expected}")

    def has_pending_gradients(self) -> bool:
        return any(param.grad is not None for param in self.parameters.values())

    def group_params(self) -> list[list[nn.Parameter]]:
        return [group["params"] for group in self.optimizer.param_groups]

    def keep(self, index_of: Mapping[nn.Parameter, DimIndex], leaving: Set[nn.Parameter]) -> int:
        masters, state = self.masters(), self.torch_optimizer().state
        if leaving:
            self.forget(leaving)
        for param, index in index_of.items():
            if param in leaving:
                state.pop(masters.get(param), None)
                continue
            master = masters.get(param)  # None for a frozen parameter, which is in no group
            if master is not None:
                select_state(state.get(master, {}), param.shape, index)
            if master is not None and master is not param:
                select_param(master, index)
            select_param(param, index)
        return 0

    def forget(self, leaving: Set[nn.Parameter]) -> None:
        """Take `leaving` out of the optimizer's groups; the lists stay the same objects."""
        for params in self.group_params():
            params[:] = [param for param in params if param not in leaving]

    def weights_from_masters(self) -> None:
        for param, master in self.masters().items():
            if master is not param:
                param.data.copy_(master)


class UnfusedAdapter(PlainAdapter):
    """Stage 0 in bf16 or fp16 with a torch optimizer: FP16_UnfusedOptimizer, one fp32 master per parameter."""

    fields = {"fp16_groups": list, "fp32_groups": list, "optimizer": torch.optim.Optimizer}

    def masters(self) -> dict[nn.Parameter, Tensor]:
        pairs = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
        return {param: master for low, high in pairs for param, master in zip(low, high, strict=True)}

    def torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def group_params(self) -> list[list[nn.Parameter]]:
        return self.optimizer.fp16_groups

    def forget(self, leaving: Set[nn.Parameter]) -> None:
        for low, high in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
            staying = [i for i, param in enumerate(low) if param not in leaving]
            low[:], high[:] = [low[i] for i in staying], [high[i] for i in staying]
        forget_overflows(self.optimizer, leaving)
