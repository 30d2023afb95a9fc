"""AdamW for the student (weight decay for matrices only) in the configured implementation, and its LR schedule."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from homodistil.config.schema import OptimizerConfig, TrainConfig
from homodistil.engine.ds_config import offloads_optimizer, zero_stage
from homodistil.engine.native_ops import load_op
from homodistil.errors import UserError


def build_optimizer(module: nn.Module, train: TrainConfig, config: OptimizerConfig, engine_config: dict) -> Optimizer:
    """AdamW over the trainable parameters of `module`, in two groups: with and without weight decay.

    Args:
        engine_config: DeepSpeed's JSON; for `deepspeed_fused` its stage and offload decide between FusedAdam and
            DeepSpeedCPUAdam.

    Raises:
        UserError: the implementation is not installed.
    """
    options = {
        "lr": train.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
    }
    groups = parameter_groups(module, train.weight_decay)
    if config.implementation == "deepspeed_fused":
        return _deepspeed_fused(groups, options, engine_config)
    build = {"torch_fused": _torch_fused, "apex_fused": _apex_fused}
    return build[config.implementation](groups, **options)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices of the model with weight decay; vectors (biases, LayerNorm) and distillation
    projections without."""
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.startswith("projections.")
            (decay if decays else no_decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


class LearningRateShare:
    """Factor on `train.lr` as a function of the updates done: linear warm-up, a constant part, linear decay to 0.

    `rewarm` and cool-downs lower it for some updates, `set_width_share` at the present widths. torch's LambdaLR saves
    the attributes of such an object in its state, so that a resumed run continues with them.
    """

    def __init__(self, train: TrainConfig) -> None:
        self.steps = train.lr_steps or train.steps
        self.warmup_steps = round(train.warmup_fraction * self.steps)
        self.decay_steps = min(self.steps - self.warmup_steps, round(train.decay_fraction * self.steps))
        self.rewarm_steps = train.rewarm_steps
        self.width_share = 1.0
        """Factor at the present widths, `train.uncut_lr_share` to 1."""
        self.lowered_at: int | None = None
        """Updates done at the last `rewarm`; None if there was none."""
        self.cooldowns = [[start, train.cool_steps] for start in train.cool_from]
        """[updates done when it begins, length in updates] of each cool-down."""

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            share = step / self.warmup_steps
        else:
            share = min(1.0, max(0.0, (self.steps - step) / max(1, self.decay_steps)))
        share *= self.width_share
        for start, steps in self.cooldowns:
            if start <= step < start + steps:
                share *= (start + steps - step) / steps
        if self.lowered_at is None:
            return share
        # Does not start at 0: with an event every few updates, nothing would be learned in between.
        return share * min(1.0, (step - self.lowered_at + 1) / (self.rewarm_steps + 1))


def build_schedule(optimizer: Optimizer, train: TrainConfig) -> LambdaLR:
    """Linear warm-up over `warmup_fraction` of the steps, linear decay to 0 over the last `decay_fraction` of them."""
    return LambdaLR(optimizer, LearningRateShare(train))


def set_width_share(schedule: LambdaLR, share: float) -> None:
    """Multiply the rates from the next update on with `share`, in (0, 1], instead of the share before."""
    for share_of_group, group, peak in _groups(schedule):
        share_of_group.width_share = share
        group["lr"] = peak * share_of_group(schedule.last_epoch)


def rewarm(schedule: LambdaLR) -> None:
    """Lower the rates after a resize event: the next n = `train.rewarm_steps` updates have 1/(n + 1), 2/(n + 1), ...
    of their rate. A further event within these updates starts the sequence again."""
    for share, group, peak in _groups(schedule):
        if share.rewarm_steps:
            share.lowered_at = schedule.last_epoch
            group["lr"] = peak * share(schedule.last_epoch)


def _groups(schedule: LambdaLR) -> Iterator[tuple[LearningRateShare, dict, float]]:
    """(share, the optimizer's group, peak rate) of each parameter group. The rate of the next update is already set
    after the last one."""
    return zip(schedule.lr_lambdas, schedule.optimizer.param_groups, schedule.base_lrs, strict=True)


def cool_down(schedule: LambdaLR, steps: int) -> None:
    """Lower the rates of the next n = `steps` updates to 1, (n - 1)/n, ... 1/n of their values; later ones stay."""
    new = [schedule.last_epoch, steps]
    for share in schedule.lr_lambdas:  # the same object for all parameter groups
        share.cooldowns = [*(old for old in share.cooldowns if old != new), new]


def _torch_fused(groups: list[dict], **options) -> Optimizer:
    return torch.optim.AdamW(groups, fused=True, **options)


def _deepspeed_fused(groups: list[dict], options: dict, engine_config: dict) -> Optimizer:
    """FusedAdam, or DeepSpeedCPUAdam if master weights and optimizer states are partitioned in host memory."""
    on_host = offloads_optimizer(engine_config) or not torch.cuda.is_available()
    if zero_stage(engine_config) > 0 and on_host:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_op("CPUAdamBuilder")
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    from deepspeed.ops.adam import FusedAdam

    load_op("FusedAdamBuilder")
    return FusedAdam(groups, adam_w_mode=True, **options)


def check_implementation(name: str) -> None:
    """Raise `UserError` if the AdamW implementation `name` is not installed. Does not import it."""
    if name == "apex_fused" and not is_nvidia_apex():
        raise UserError(
            "optimizer.implementation: apex_fused needs NVIDIA's apex, built from its repository with CUDA extensions "
            "(the package called apex in the Python registry is another project); use torch_fused instead"
        )


def _apex_fused(groups: list[dict], **options) -> Optimizer:
    check_implementation("apex_fused")  # before the import: another package is called apex, too
    from apex.optimizers import FusedAdam

    return FusedAdam(groups, adam_w_mode=True, **options)


def is_nvidia_apex() -> bool:
    """Whether the installed `apex` is NVIDIA's, judged by its files: another package of this name is not imported."""
    spec = importlib.util.find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = Path(next(iter(spec.submodule_search_locations)))
    has_files = (folder / "optimizers" / "fused_adam.py").is_file() and (folder / "multi_tensor_apply").is_dir()
    return has_files and importlib.util.find_spec("amp_C") is not None
