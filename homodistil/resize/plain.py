"""ZeRO stage 0, and modules without an optimizer: every rank holds everything, so resizing is local slicing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from homodistil.resize.adapter import Adapter, Fragment, index_by_parameter, select_param, select_state
from homodistil.resize.plan import ResizePlan


@torch.no_grad()
def slice_module(module: nn.Module, plan: ResizePlan) -> None:
    """Apply `plan` to a module that no engine or optimizer holds yet; frozen parameters are sliced as well.

    Raises:
        ValueError: the plan was made for a model of other parameter names or sizes.
    """
    for param, index in index_by_parameter(dict(module.named_parameters()), plan).items():
        select_param(param, index)


class PlainAdapter(Adapter):
    """Stage 0 in fp32: the engine's optimizer is the torch optimizer over the module's own parameters."""

    fields = {"state": dict, "param_groups": list}

    def masters(self) -> dict[nn.Parameter, Tensor]:
        """Parameter of the model -> the fp32 tensor that the torch optimizer updates (here: itself)."""
        return {param: param for group in self.optimizer.param_groups for param in group["params"]}

    def torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer

    def check_layout(self) -> None:
        masters = self.masters()
        for name, param in self.parameters.items():
            master = masters.get(param, param)
            if master.shape != param.shape:
                raise ValueError(f"master weight of {name}: shape {tuple(master.shape)}, expected {tuple(param.shape)}")

    def has_pending_gradients(self) -> bool:
        return any(param.grad is not None for param in self.parameters.values())

    def resize(self, plan: ResizePlan) -> int:
        masters, state = self.masters(), self.torch_optimizer().state
        for param, index in self.index_by_parameter(plan).items():
            master = masters.get(param)  # None: a frozen parameter that no group holds
            if master is not None:
                select_state(state.get(master, {}), param.shape, index)
            if master is not None and master is not param:
                select_param(master, index)
            select_param(param, index)
        return 0

    def gradient_fragments(self) -> Iterator[Fragment]:
        masters = self.masters()
        trainable = [name for name, param in self.parameters.items() if param.requires_grad]
        # Every rank has them all: each yields its share.
        for name in trainable[dist.get_rank() :: dist.get_world_size()]:
            param = self.parameters[name]
            gradient = torch.zeros_like(param) if param.grad is None else param.grad
            weight = masters.get(param, param).detach()
            yield Fragment(name, 0, weight.flatten().float(), gradient.flatten().float())

    def master_weights(self) -> dict[str, Tensor]:
        masters = self.masters()
        return {name: masters.get(p, p).detach().float().clone() for name, p in self.parameters.items()}


class UnfusedAdapter(PlainAdapter):
    """Stage 0 in bf16 with a torch optimizer: FP16_UnfusedOptimizer, one fp32 master a parameter."""

    fields = {"fp16_groups": list, "fp32_groups": list, "optimizer": torch.optim.Optimizer}

    def masters(self) -> dict[nn.Parameter, Tensor]:
        pairs = zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
        return {param: master for low, high in pairs for param, master in zip(low, high, strict=True)}

    def torch_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer
