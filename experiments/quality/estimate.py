"""How long a run takes on this machine, roughly: FLOPs of its steps at the speed that two layers are measured to have.

Meant for a list of runs that is printed before the first of them; once some are done, the pool's own estimate is
better. Whatever else runs during the measurement makes the estimate longer.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch

from homodistil.engine.build import load_engine_config
from homodistil.engine.ds_config import student_dtype
from homodistil.models.axes import Widths
from homodistil.models.flops import backbone_flops
from homodistil.planning.step_work import run_flops
from homodistil.training.resolve import ResolvedRun

START_S = 5.0
"""Of a run beside its steps and evaluations: engine, trial resize, events, export."""
_OPTIMIZER_BYTES_PER_S = 5e9
"""Of a core that updates weights, moments and master weights; a GPU is so much faster that it does not count."""
_ADAM_BYTES = 28
_LAYERS, _ROUNDS = 2, 3


class Estimator:
    """Seconds of runs in a process of one thread, or on the first GPU.

    Args:
        engine_json: DeepSpeed's JSON.
        eval_blocks: held-out blocks a half.
        like: any run of the study, whose layers are measured.
    """

    def __init__(self, engine_json: Path, eval_blocks: int, like: ResolvedRun) -> None:
        self._eval_blocks = eval_blocks
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._flops_per_s = training_speed(like, student_dtype(load_engine_config(engine_json)), self._device)
        torch.set_num_threads(threads)

    def seconds(self, resolved: ResolvedRun, length: int = 1) -> float:
        """Of one run. `length`: times the steps of its config."""
        steps = sum(self._step_s(resolved, phase.widths) * phase.num_steps for phase in resolved.phases)
        return START_S + length * steps + self._evaluation_s(resolved)

    def _step_s(self, resolved: ResolvedRun, widths: Widths) -> float:
        flops = run_flops(resolved, widths, resolved.config.train.global_batch_size).total
        parameters = resolved.teacher_parameters if self._device.type == "cpu" else 0
        return flops / self._flops_per_s + _ADAM_BYTES * parameters / _OPTIMIZER_BYTES_PER_S

    def _evaluation_s(self, resolved: ResolvedRun) -> float:
        """Forward passes of teacher and student over both halves."""
        flops = run_flops(resolved, resolved.phases[-1].widths, 2 * self._eval_blocks)
        return (flops.teacher + flops.student / 3) / self._flops_per_s


def training_speed(resolved: ResolvedRun, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of forward and backward of two layers of the teacher's shape at the run's micro-batch (seconds)."""
    config, family = copy.deepcopy(resolved.teacher_config), resolved.family
    config.num_hidden_layers = min(_LAYERS, config.num_hidden_layers)
    model = family.empty(config, "lm").to(device, dtype)
    backbone, widths = family.backbone(model), family.axis_table(model).widths
    train, seq_len = resolved.config.train, resolved.config.data.seq_len
    ids = torch.randint(config.vocab_size, (train.micro_batch_size, seq_len), device=device)
    flops = 3 * backbone_flops(widths, ids.numel(), seq_len, family.architecture)
    return flops / min(_seconds(backbone, ids) for _ in range(_ROUNDS))


def _seconds(backbone: torch.nn.Module, ids: torch.Tensor) -> float:
    _wait(ids.device)
    start = time.perf_counter()
    backbone(input_ids=ids).last_hidden_state.float().square().mean().backward()
    _wait(ids.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
