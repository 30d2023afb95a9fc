"""One rank of test_loss_scaling.py: real fp16 training on the CPU, with overflows and resize events.

    torchrun --nproc_per_node 2 worker_fp16.py '[{"stage": 2}]'

DeepSpeed refuses fp16 on CPUs without fast fp16 kernels. torch computes fp16 there all the same, slowly: that one
answer is switched here, everything behind it is DeepSpeed's own. Runs on a GPU as well (DS_ACCELERATOR=cuda).
Prints one line `CASE {json}` a case.
"""

from __future__ import annotations

import json
import math
import sys

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from support import reference, tiny_bert
from worker_trajectory import OPTIMIZERS, Run, distances

from homodistil.config.schema import PruningConfig
from homodistil.engine.build import init_ranks
from homodistil.engine.engine import TrainingEngine, backward
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.parameter_shape import full_shape
from homodistil.models.resize_plan import make_plan
from homodistil.pruning.importance import Importance
from homodistil.pruning.pruner import Pruner
from homodistil.pruning.schedule import WidthSchedule
from homodistil.resize import check_supported, gradient_fragments, step_applied
from homodistil.training.gradient_scores import measure_importance

NUM_STEPS = 16
INJECTED = {6: 0, 9: 1}
"""Update (from 1) -> rank (modulo their number) whose gradients become infinite. An event falls on each of them."""
WIDTHS = {"hidden": 29, "layer.0.ffn": 41, "layer.1.qk_dim": 7, "layer.1.vo_dim": 7}
SCALER = {"initial_scale_power": 18, "loss_scale_window": 4, "hysteresis": 1}


class Fp16Run(Run):
    """Like a trainer: measure, step, accept what was applied, resize when it is due."""

    def __init__(self, case: dict):
        self.accumulation, self.events, self.model = 1, {}, tiny_bert.make_model()
        self.device = torch.device(get_accelerator().current_device_name())
        self.engine, *_ = deepspeed.initialize(
            model=self.model,
            optimizer=OPTIMIZERS[case.get("optimizer", "torch")](tiny_bert.param_groups(self.model)),
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, tiny_bert.lr_factor),
            config={
                "train_micro_batch_size_per_gpu": reference.ROWS,
                "gradient_clipping": reference.CLIP,
                "fp16": {"enabled": True, **SCALER},
                "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
                "zero_force_ds_cpu_optimizer": False,
                "zero_allow_untested_optimizer": True,
            },
        )
        check_supported(self.engine)
        self.pruner = make_pruner(bert.axis_table(self.model), case.get("events", True), self.device)
        self.step = 0
        self.kept_hidden = torch.arange(36)
        self.loss_scales: list[float | None] = []
        self.resized_at: list[int] = []

    def train(self) -> list[float]:
        losses = []
        for step in range(NUM_STEPS):
            loss, scale = self.backward(step), self.engine.optimizer.loss_scale
            before, norm, sums = self.snapshot(), self.gradient_norm(), self.measure()
            self.engine.step()
            self.step += 1
            applied = step_applied(self.engine)
            self.loss_scales.append(scale if applied else None)
            if applied:
                losses.append(loss)
                self.check_norm(norm)
                if sums is not None:  # None once there is nothing left to decide
                    self.pruner.accept(sums)
                if keep := self.due():
                    self.resize_and_check(keep)
            else:
                assert sums is None or not all(value.isfinite().all() for value in sums.values())
                assert same(self.snapshot(), before), "a skipped step changed something"
        return losses

    def measure(self) -> dict | None:
        if not self.pruner.wants_gradients(self.step + 1):
            return None
        shapes = {name: full_shape(p) for name, p in self.model.named_parameters()}
        return measure_importance(
            TrainingEngine(self.engine), self.pruner.importance, bert.axis_table(self.model), shapes
        )

    def due(self) -> dict | None:
        return self.pruner.due(self.step, bert.axis_table(self.model).widths, self.kept_hidden)

    def gradient_norm(self) -> float:
        """Of all fragments of all ranks together."""
        squares = sum(fragment.gradient.square().sum() for fragment in gradient_fragments(self.engine))
        squares = torch.as_tensor(squares, dtype=torch.float32).to(self.device)
        dist.all_reduce(squares)
        return squares.sqrt().item()

    def check_norm(self, norm: float) -> None:
        """Fragments are free of the loss scale. Wrappers of stage 0 report a norm with some of the scale in it."""
        if self.engine.zero_optimization():
            reported = float(self.engine.get_global_grad_norm())
            assert abs(norm - reported) <= 1e-3 * reported, (norm, reported)
        else:
            assert norm < 100, norm  # 16384 times as much with the scale

    def snapshot(self) -> dict:
        """Scores, weights, masters and moments; no moments before the first applied step."""
        state = self.pruner.importance.state_dict()
        scores = {(kind, axis): v.clone() for kind in ("average", "uncertainty") for axis, v in state[kind].items()}
        return scores | (self.everything() if any(self.loss_scales) else {})

    def backward(self, step: int) -> float:
        rank, world = dist.get_rank(), dist.get_world_size()
        batch = tiny_bert.make_batch(step, reference.ROWS * world)
        rows = slice(rank * reference.ROWS, (rank + 1) * reference.ROWS)
        loss = self.engine(**{k: v[rows].to(self.device) for k, v in batch.items()}).loss.float()
        is_injected = step + 1 in INJECTED and INJECTED[step + 1] % world == rank
        backward(self.engine, loss * math.inf if is_injected else loss)
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item() / world

    def resize_and_check(self, keep: dict) -> None:
        scaler, plan = scaler_of(self.engine), make_plan(bert.axis_table(self.model), keep)
        self.events[self.step] = keep
        self.resize(keep)
        assert scaler_of(self.engine) == scaler, "the loss scale, or its counts, did not survive"
        self.pruner.after_resize(plan)
        self.kept_hidden = torch.arange(plan.widths_after["hidden"])
        self.resized_at.append(self.step)


def make_pruner(table, has_events: bool, device: torch.device) -> Pruner:
    schedule = "linear" if has_events else "none"
    config = PruningConfig(schedule=schedule, start_fraction=0.0, end_fraction=0.7, interval_steps=3)
    config.max_event_fraction, config.width_multiple = 0.25, 1
    config.ffn_multiple = config.head_dim_multiple = 1
    schedule = WidthSchedule(dict(table.widths), WIDTHS, config, NUM_STEPS)
    importance = Importance(table, config, seed=0, device=device)
    return Pruner(schedule, importance, torch.tensor([], dtype=torch.int64))


def scaler_of(engine) -> dict:
    """The loss scale and its counts, wherever the wrapper keeps them."""
    scaler = getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config
    return dict(vars(scaler))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def main() -> None:
    torch.set_num_threads(1)
    if get_accelerator().device_name() == "cpu":
        type(get_accelerator()).is_fp16_supported = lambda self: True
    init_ranks()
    for case in json.loads(sys.argv[1]):
        run = Fp16Run(case)
        losses = run.train()
        warm = run.engine.zero_optimization_stage() == 0
        expected = reference.train_bf16(
            NUM_STEPS, dist.get_world_size(), run.events, warm_states=warm, loss_scales=run.loss_scales
        )
        found = distances(run, losses, expected)
        found |= {"skipped": [i + 1 for i, scale in enumerate(run.loss_scales) if scale is None]}
        found |= {"resized_at": run.resized_at, "scales": run.loss_scales, "skipped_steps": run.engine.skipped_steps}
        if dist.get_rank() == 0:
            print("CASE", json.dumps(case | found | {"wrapper": type(run.engine.optimizer).__name__}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
