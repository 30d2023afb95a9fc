"""In a rank of `throughput.py`: one run of the product's step, stretch by stretch of its schedule."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time

import torch

from benchmarks.harness.memory_counters import memory_in_use, peak_memory, start_peak
from benchmarks.harness.part_flops import part_flops
from benchmarks.harness.product import build_trainer, run_config
from benchmarks.harness.shapes import SHAPES, Plan, Shape
from benchmarks.harness.step_parts import operator_shares, profiled_step, teacher_labelled
from benchmarks.harness.workload import synchronize
from homodistil.config.command_line import parse
from homodistil.metrics.device_peak import peak_flops
from homodistil.metrics.recorder import EVENTS_FILE, read_lines
from homodistil.models.shapes import target_shape, target_widths
from homodistil.pruning.schedule import WidthSchedule


def run_shape(args: argparse.Namespace, device: torch.device) -> dict:
    """In a rank: everything that is measured of one shape."""
    shape = SHAPES[args.shapes[0]]
    plan = Plan(args.steps_per_width, events=4 if args.quick else 7)
    config = run_config(shape, plan, args.work, args.quick, args.world_size, args.set)
    bytes_before = memory_in_use(device)
    trainer = build_trainer(shape, config, args.deepspeed, args.work, device)
    dtype = trainer.student.model.dtype
    run = Measurement(trainer, device)
    with teacher_labelled(trainer):
        operators = run.settle(plan.settle)
        stretches = [plan.interval] * plan.events + [plan.num_steps - plan.end_step]
        stages = merged([run.stage(num_steps) for num_steps in stretches])
    move_ms = [event["milliseconds"] for event in read_lines(args.work / "run" / EVENTS_FILE)]
    again = [peak_flops(device, dtype) for _ in range(2)]
    peak = max([trainer.step_log.peak, *again], key=lambda measured: measured.flops_per_s)
    return {
        "world_size": args.world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "peak": {"flops_per_s": peak.flops_per_s, "source": peak.source},
        "tokens": config.train.global_batch_size * config.data.seq_len,
        "num_sequences": config.train.global_batch_size,
        "micro_batch": config.train.micro_batch_size,
        "seq_len": config.data.seq_len,
        "bytes_before": bytes_before,
        "stages": stages,
        "move_ms": move_ms,
        "run_parts": run.all_parts,
        "operators": operators,
        "recipe": recipe_schedule(shape, run),
        "probe_sequences": sum(len(batch.input_ids) for batch in trainer.gap.batches) * args.world_size,
    }


def merged(stages: list[dict]) -> list[dict]:
    """Neighbours of the same widths as one: the schedule's last events may have nothing left to remove."""
    distinct: list[dict] = []
    for stage in stages:
        if distinct and distinct[-1]["event_ms"] is None:
            last = distinct[-1]
            last |= {name: last[name] + stage[name] for name in ("steps", "step_ms", "parts")}
            last |= {"peak_bytes": max(last["peak_bytes"], stage["peak_bytes"]), "event_ms": stage["event_ms"]}
        else:
            distinct.append(stage)
    return distinct


class Measurement:
    """A trainer, and what its steps cost."""

    def __init__(self, trainer, device: torch.device) -> None:
        self.trainer, self.device = trainer, device
        self.teacher_widths = trainer.student.widths
        self._peak_bytes = 0
        self.all_parts: list[dict[str, float]] = []
        """Of every profiled step."""

    def settle(self, num_steps: int) -> dict:
        """The first steps of a run; shares of operators in the last of them."""
        for _ in range(num_steps - 1):
            self.trainer.train_step()
        return operator_shares(profiled_step(self.trainer.train_step, self.device)[1], self.device)

    def stage(self, num_steps: int) -> dict:
        """`num_steps` steps at the current widths; the last may end in an event."""
        widths, parameters = self.trainer.student.widths, self.trainer.student.num_parameters()
        flops = self.flops(widths)
        start_peak(self.device)
        self._peak_bytes = 0
        self.trainer.train_step()  # new shapes
        # Profiling costs a CPU's steps a few per cent: they are timed only where there are no others.
        num_profiled = min(2, max(1, (num_steps - 1) // 3))
        num_plain = num_steps - 1 - num_profiled
        plain_ms = self._plain(num_plain) if num_plain else []
        parts = [self._by_parts() for _ in range(num_profiled - 1)]
        self._see_peak()
        peak_bytes = self._peak_bytes  # not an event's
        parts.append(self._by_parts())
        self.all_parts += parts
        event_s = parts[-1]["resize"] if self.trainer.student.widths != widths else None
        if event_s is not None:
            parts[-1] |= {"resize": 0.0}
        return {
            "hidden": widths["hidden"],
            "parameters": parameters,
            "steps": num_steps,
            "step_ms": plain_ms or [sum(step.values()) * 1e3 for step in parts],
            "parts": parts,
            "event_ms": None if event_s is None else event_s * 1e3,
            "flops": flops,
            "peak_bytes": peak_bytes,
        }

    def _plain(self, count: int) -> list[float]:
        """Milliseconds of each step; on a GPU their mean, without a wait of ours between them."""
        groups = [1] * count if self.device.type == "cpu" else [count]
        milliseconds = []
        for num_steps in groups:
            synchronize(self.device)
            start = time.perf_counter()
            for _ in range(num_steps):
                self.trainer.train_step()
            synchronize(self.device)
            milliseconds.append((time.perf_counter() - start) * 1e3 / num_steps)
        self._see_peak()
        return milliseconds

    def _by_parts(self) -> dict[str, float]:
        parts, _ = profiled_step(self.trainer.train_step, self.device)
        self._see_peak()
        return parts

    def _see_peak(self) -> None:
        """Step by step: the product starts an accelerator's peak anew whenever it logs."""
        self._peak_bytes = max(self._peak_bytes, peak_memory(self.device))

    def flops(self, widths: dict[str, int]) -> dict[str, float]:
        """Part -> FLOPs of one step over all ranks."""
        config, model = self.trainer.config, self.trainer.student.model
        sequences, seq_len = config.train.global_batch_size, config.data.seq_len
        return part_flops(
            widths,
            self.teacher_widths,
            self.trainer.student.objective.config,
            num_sequences=sequences,
            seq_len=seq_len,
            target_rows=config.data.mask_probability * sequences * (seq_len - 2),  # [CLS] and [SEP] never are
            vocab_size=model.config.vocab_size,
        )


def recipe_schedule(shape: Shape, run: Measurement) -> dict:
    """The recipe's own cubic schedule with t_f = 0.7 T: residual widths, how many steps each, their FLOPs."""
    # Overrides of widths count here too; those of the schedule's length are this benchmark's own.
    config = parse([f"recipe={shape.recipe}", *shape.overrides, "pruning.end_fraction=0.7"])
    pruning = dataclasses.replace(
        run.trainer.config.pruning,
        start_fraction=0.0,
        end_fraction=0.7,
        interval_steps=config.pruning.interval_steps,
    )
    target = target_widths(target_shape(run.trainer.config.student, run.teacher_widths), run.teacher_widths)
    schedule = WidthSchedule(run.teacher_widths, target, pruning, config.train.steps)
    widths, points = dict(run.teacher_widths), []
    bounds = [0, *sorted(schedule.table), config.train.steps]
    for start, end in itertools.pairwise(bounds):
        widths |= schedule.table.get(start, {})
        points.append({"hidden": widths["hidden"], "steps": end - start, "flops": sum(run.flops(widths).values())})
    sizes = {"steps": config.train.steps, "num_sequences": config.train.global_batch_size}
    return {"name": shape.recipe, "events": len(schedule.table), "points": points, **sizes}
