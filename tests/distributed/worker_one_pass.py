"""One rank of test_one_pass.py: AdamW that counts importance while it updates, against AdamW and a naive count.

    torchrun --nproc_per_node 2 worker_one_pass.py '[{"stage": 2}]'      (cases: see test_one_pass.py)

Prints one line `CASE {json}` a case: the largest relative difference of any axis' sums from the naive count and from
the pass before the step, how strongly clipping acted, and the distance of weights and moments to AdamW's.
"""

from __future__ import annotations

import json
import math
import sys

import deepspeed
import torch
import torch.distributed as dist
import worker_importance
from support import reference, tiny_bert
from support.reference import ROWS
from torch import Tensor

from homodistil.config.schema import PruningConfig
from homodistil.engine.counting_adamw import CountingAdamW
from homodistil.models.axes import AxisTable
from homodistil.models.encoders import bert
from homodistil.models.parameter_shape import full_shape
from homodistil.models.resize_plan import make_plan
from homodistil.pruning.importance import Importance
from homodistil.resize import check_supported, gradient_fragments, master_weights, owned_state, resize
from homodistil.training.gradient_scores import measure_importance

ACCUMULATION, NUM_STEPS, EVENT_STEP, LAST_COUNTED = 2, 20, 4, 9


def make_engine(optimizer_class: type, case: dict):
    model = tiny_bert.make_model()
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": case.get("clip", 0.05),
        "bf16": {"enabled": case.get("bf16", False)},
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **case.get("config", {}),
    }
    fused = {"fused": True} if optimizer_class is torch.optim.AdamW else {}
    optimizer = optimizer_class(tiny_bert.param_groups(model), lr=reference.LR, eps=reference.EPS, **fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, tiny_bert.lr_factor)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]
    check_supported(engine)
    return engine


class Run:
    def __init__(self, optimizer_class: type, case: dict) -> None:
        self.engine, self.is_checked = make_engine(optimizer_class, case), optimizer_class is CountingAdamW
        self.model = self.engine.module
        self.naive, self.two_pass, self.smallest_norm = 0.0, 0.0, float("inf")

    def table(self) -> AxisTable:
        return bert.axis_table(self.model)

    def train(self) -> None:
        config = PruningConfig(ema_beta=0.0)
        importance = Importance(self.table(), config, seed=0, device=torch.device("cpu"))
        for step in range(NUM_STEPS):
            if step == EVENT_STEP:
                plan = make_plan(self.table(), worker_importance.KEEP)
                resize(self.engine, plan)
                bert.refresh(self.model, plan.widths_after)
            for micro in range(ACCUMULATION):
                self.backward(step * ACCUMULATION + micro)
                if micro == ACCUMULATION - 1 and self.is_checked and step < LAST_COUNTED:
                    self.counted_step(importance)
                else:
                    self.engine.step()

    def backward(self, index: int) -> None:
        batch, rank = tiny_bert.make_batch(index, ROWS * dist.get_world_size()), dist.get_rank()
        self.engine.backward(self.engine(**{k: v[rank * ROWS : (rank + 1) * ROWS] for k, v in batch.items()}).loss)

    def counted_step(self, importance: Importance) -> None:
        table = self.table()
        shapes = {name: full_shape(p) for name, p in self.model.named_parameters()}
        expected, norm = self.naive_sums(table, shapes)
        before = importance.measure(gradient_fragments(self.engine), table, shapes)
        measurement = measure_importance(self.engine, importance, table, shapes)
        self.engine.step()
        found = measurement()
        assert found.keys() == expected.keys() == before.keys()
        for axis, value in found.items():
            scale = expected[axis].max()
            self.naive = max(self.naive, ((value - expected[axis]).abs().max() / scale).item())
            self.two_pass = max(self.two_pass, ((value - before[axis]).abs() / before[axis]).max().item())
        self.smallest_norm = min(self.smallest_norm, norm)

    def naive_sums(self, table: AxisTable, shapes: dict) -> tuple[dict[str, Tensor], float]:
        """By axis, from the whole matrices of |weight * gradient| in double, and the gradients' norm."""
        trained = {name: shapes[name] for name, p in self.model.named_parameters() if p.requires_grad}
        scores = {name: torch.zeros(math.prod(shape), dtype=torch.float64) for name, shape in trained.items()}
        squares = torch.zeros((), dtype=torch.float64)
        for name, start, weight, gradient in gradient_fragments(self.engine):
            scores[name][start : start + len(weight)] += (weight.double() * gradient.double()).abs()
            squares += gradient.double().square().sum()
        for tensor in (*scores.values(), squares):
            dist.all_reduce(tensor)
        found: dict[str, Tensor] = {}
        for use in table.uses:
            if not use.scored or use.parameter not in scores:
                continue
            matrix = scores[use.parameter].view(trained[use.parameter])
            sums = matrix if matrix.ndim == 1 else matrix.sum(1 - use.dim)
            parts = [(use.axes[0], sums)]
            if len(use.axes) == 2:
                grid = sums.view(table.widths[use.axes[0]], -1)
                parts = [(use.axes[0], grid.sum(1)), (use.axes[1], grid)]
            for axis, part in parts:
                found[axis] = found.get(axis, 0) + part
        return found, squares.sqrt().item()

    def everything(self) -> dict[tuple[str, str], Tensor]:
        """Master weights and moments, whole."""
        found = {("weight", name): tensor for name, tensor in master_weights(self.engine).items()}
        moments = {}
        for piece in owned_state(self.engine):
            assert set(piece.states) in (set(), {"exp_avg", "exp_avg_sq"})
            for key, value in piece.states.items():
                numel = found["weight", piece.name].numel()
                whole = moments.setdefault((key, piece.name), torch.zeros(numel))
                whole[piece.start : piece.start + len(value)] = value
        names = [None] * dist.get_world_size()
        dist.all_gather_object(names, list(moments))
        for key in sorted(set().union(*names)):
            whole = moments.get(key, torch.zeros(found["weight", key[1]].numel()))
            dist.all_reduce(whole)
            found[key] = whole
        return found


def run_case(case: dict) -> dict:
    counting, plain = Run(CountingAdamW, case), Run(torch.optim.AdamW, case)
    counting.train()
    plain.train()
    found, expected = counting.everything(), plain.everything()
    assert found.keys() == expected.keys() and len(found) > 3 * 30
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    off = {
        kind: max((found[key] - expected[key]).abs().max().item() for key in found if key[0] == kind) for kind in kinds
    }
    counted = {"naive": counting.naive, "two_pass": counting.two_pass, "smallest_norm": counting.smallest_norm}
    return case | counted | off | {"wrapper": type(counting.engine.optimizer).__name__}


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    for case in json.loads(sys.argv[1]):
        result = run_case(case)
        if dist.get_rank() == 0:
            print("CASE", json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
