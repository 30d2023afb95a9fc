"""The product: `Trainer.train_step` on a real DeepSpeed engine, put together as a run of homodistil puts it together.

Importance is measured in every step, also at the final width, where a run has stopped doing so.
"""

from __future__ import annotations

import os
import time

import deepspeed  # noqa: F401  (here, so that it counts among the libraries: see child.py)
import torch

from benchmarks.harness.environment import ROOT
from benchmarks.peers.workload import Files, Task, arguments
from homodistil.config.command_line import parse
from homodistil.engine.build import init_ranks, load_engine_config, resolve_engine_config
from homodistil.metrics.recorder import EVENTS_FILE, METRICS_FILE, read_lines
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.training.inputs import prepare_inputs
from homodistil.training.run import DistillationRun
from homodistil.training.step_logger import run_recorder
from homodistil.training.trainer import TrainState

ENGINES = {"bf16": "zero2.json", "fp32": "zero2_fp32.json"}


class Peer:
    """Args: options: widths: "final" starts at the cut of workload.py and stays there, "full" at the teacher's and
    follows a schedule."""

    def __init__(self, task: Task, files: Files, setting: str, options: dict) -> None:
        device = init_ranks()
        self.folder = files.folder / f"run-{os.environ['MASTER_PORT']}"  # another every start
        config = parse(arguments(task, files, self.folder))
        config.train.micro_batch_size = task.sequences
        engine_config = load_engine_config(ROOT / "ds_configs" / ENGINES[task.precision])
        engine_config = resolve_engine_config(engine_config, config.train, 1)
        self.run = DistillationRun(config, engine_config, prepare_inputs(config, device), self.folder, "benchmark")
        if options["widths"] == "final":
            _stay_at(self.run, files.keep())
        every = config.train.log_every_steps
        config.train.log_every_steps = 1  # `terms` reads the first step's
        self.trainer = self.run.build_trainer(run_recorder(self.folder, config, 0), TrainState())
        self.trainer.train_step()
        self.terms = self._logged()
        config.train.log_every_steps = every

    def step(self) -> None:
        self.trainer.train_step()

    def _logged(self) -> dict[str, torch.Tensor]:
        first = next(line for line in read_lines(self.folder / METRICS_FILE) if line["kind"] == "train")
        return {k.removeprefix("loss/"): torch.tensor(v) for k, v in first.items() if k.startswith("loss/")}

    # -- along the schedule

    def narrow(self, step: int) -> dict[str, float]:
        """One resize event to the widths that the schedule has reached at `step`, as training does it.

        Returns:
            ms: of everything an event does; move_ms: of the engine's own part, without the probe of the gap.
        """
        student, pruner = self.run.student, self.run.pruner
        keep = pruner.due(step, student.widths, student.origins["hidden"])
        start = time.perf_counter()
        self.trainer.resize(keep)
        times = {"ms": (time.perf_counter() - start) * 1e3}
        event = read_lines(self.folder / EVENTS_FILE)[-1]
        return times | {"move_ms": event["milliseconds"], "hidden": student.widths["hidden"]}

    def schedule(self) -> list[tuple[int, int]]:
        """(step, hidden width after it) of every resize event."""
        table, hidden, stages = self.run.pruner.schedule.table, self.run.teacher_widths["hidden"], []
        for step in sorted(table):
            hidden = table[step].get("hidden", hidden)
            stages.append((step, hidden))
        return stages


def _stay_at(run, keep: dict[str, torch.Tensor]) -> None:
    plan = make_plan(run.student.axis_table(), keep)
    slice_module(run.student, plan)
    run.student.after_resize(plan.keep)
    run.pruner.after_resize(plan)
    run.pruner.schedule.table = {}
    run.pruner.schedule.end_step = 10**9  # importance all the way
