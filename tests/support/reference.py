"""The plain single-process training loop that DeepSpeed runs with resizes are held against.

Nothing of homodistil is in here, but for how an op of DeepSpeed's is built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from homodistil.engine.native_ops import load_op
from support import tiny_bert

LR, EPS, CLIP = 1e-3, 1e-6, 0.5
ROWS = 3
"""Sequences a rank and micro-batch."""


@dataclass
class Trajectory:
    losses: list[float]
    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]


def make_optimizer(groups: list[dict]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=LR, eps=EPS)


def make_cpu_adam(groups: list[dict]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    load_op("CPUAdamBuilder")
    return DeepSpeedCPUAdam(groups, lr=LR, eps=EPS)


def make_fused(groups: list[dict]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import FusedAdam

    load_op("FusedAdamBuilder")
    return FusedAdam(groups, lr=LR, eps=EPS)


def train(num_steps: int, accumulation: int, world: int, events: dict[int, dict[str, Tensor]]) -> Trajectory:
    """fp32: whole global batches, AdamW, clipping, warm-up; at an event parameters and moments are cut by hand."""
    model = tiny_bert.make_model(num_layers=tiny_bert.num_layers(events))
    optimizer = make_optimizer(tiny_bert.param_groups(model))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, tiny_bert.lr_factor)
    losses = []
    for step in range(num_steps):
        if step in events:
            cut(model, {p: p for p in model.parameters()}, optimizer, events[step])
        optimizer.zero_grad()
        loss_sum = 0.0
        for micro in range(accumulation):
            batch = tiny_bert.make_batch(step * accumulation + micro, ROWS * world)
            loss_sum += backward(model, batch, accumulation)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        losses.append(loss_sum)
    return trajectory(model, {p: p for p in model.parameters()}, optimizer, losses)


def train_bf16(
    num_steps: int,
    world: int,
    events: dict[int, dict[str, Tensor]],
    accumulation: int = 1,
    accumulate_fp32: bool = False,
    warm_states: bool = False,
    loss_scales: list[float | None] | None = None,
) -> Trajectory:
    """bf16 weights under fp32 masters; the ranks' gradients are averaged in bf16, as ZeRO's bucket does.

    Args:
        accumulate_fp32: a rank's gradients are added up over micro-batches in fp32, not in bf16.
        warm_states: a step on zero gradients comes first, as in DeepSpeed's wrappers of stage 0.
        loss_scales: train in fp16 instead, with this factor on the loss of each step; None: the step is left out.
    """
    dtype = torch.bfloat16 if loss_scales is None else torch.float16
    model = tiny_bert.make_model(dtype, tiny_bert.num_layers(events))
    masters = {p: nn.Parameter(p.detach().float()) for p in model.parameters()}
    groups = [g | {"params": [masters[p] for p in g["params"]]} for g in tiny_bert.param_groups(model)]
    optimizer = make_optimizer(groups)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if warm_states:
        step_masters(masters, {p: torch.zeros_like(masters[p]) for p in trainable}, optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, tiny_bert.lr_factor)
    losses = []
    for step in range(num_steps):
        if step in events:
            cut(model, masters, optimizer, events[step])
            trainable = [p for p in model.parameters() if p.requires_grad]
        scale = 1.0 if loss_scales is None else loss_scales[step]
        if scale is None:
            continue
        average = {p: torch.zeros_like(p) for p in trainable}
        loss_sum = 0.0
        for rank in range(world):
            own = {p: torch.zeros_like(p, dtype=torch.float32 if accumulate_fp32 else None) for p in trainable}
            for micro in range(accumulation):
                batch = tiny_bert.make_batch(step * accumulation + micro, ROWS * world)
                rows = {k: v[rank * ROWS : (rank + 1) * ROWS] for k, v in batch.items()}
                loss_sum += backward(model, rows, accumulation, scale) / world
                for p in trainable:
                    own[p] += p.grad
                    p.grad = None
            for p in trainable:
                average[p] += own[p].to(p.dtype) / world
        step_masters(masters, {p: g.float() / scale for p, g in average.items()}, optimizer)
        scheduler.step()
        losses.append(loss_sum)
    return trajectory(model, masters, optimizer, losses)


def step_masters(masters: dict, gradients: dict[Tensor, Tensor], optimizer: torch.optim.Optimizer) -> None:
    for p, gradient in gradients.items():
        masters[p].grad = gradient
    nn.utils.clip_grad_norm_([masters[p] for p in gradients], CLIP)
    optimizer.step()
    with torch.no_grad():
        for p, master in masters.items():
            p.copy_(master)


def backward(model: nn.Module, batch: dict[str, Tensor], divisor: int = 1, scale: float = 1.0) -> float:
    """Gradients of the mean loss / divisor, times `scale`; returns the loss / divisor.

    No graph outlives the call: plain torch cannot cut parameters under one.
    """
    loss = model(**batch).loss / divisor
    (loss.float() * scale).backward()
    return loss.item()


@torch.no_grad()
def cut(model: nn.Module, masters: dict, optimizer: torch.optim.Optimizer, keep: dict[str, Tensor]) -> None:
    if "layers" in keep:
        drop(model, masters, optimizer, keep["layers"])
        return
    for name, cuts in tiny_bert.slices(model, keep).items():
        param = model.get_parameter(name)
        master = masters[param]
        for key in ("exp_avg", "exp_avg_sq"):
            if key in optimizer.state.get(master, {}):
                optimizer.state[master][key] = tiny_bert.take(optimizer.state[master][key], cuts)
        for tensor in {param, master}:
            tensor.grad = None
            tensor.data = tiny_bert.take(tensor.data, cuts)
    tiny_bert.refresh(model, keep)


def drop(model: nn.Module, masters: dict, optimizer: torch.optim.Optimizer, kept: list[int]) -> None:
    """Layers leave, by hand."""
    before = set(model.parameters())
    tiny_bert.drop_layers(model, kept)
    gone = {masters.pop(p) for p in before - set(model.parameters())}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p not in gone]
    for master in gone:
        optimizer.state.pop(master, None)


def trajectory(model: nn.Module, masters: dict, optimizer: torch.optim.Optimizer, losses: list[float]) -> Trajectory:
    names = {name: masters[p] for name, p in model.named_parameters()}
    weights = {name: master.detach() for name, master in names.items()}
    trained = {name: optimizer.state[master] for name, master in names.items() if master in optimizer.state}
    moments = [{name: state[key] for name, state in trained.items()} for key in ("exp_avg", "exp_avg_sq")]
    return Trajectory(losses, weights, *moments)
