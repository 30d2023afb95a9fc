"""In a rank of `throughput.py`: one run of the product's step, stretch by stretch of its schedule."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time

import torch
from memory_counters import memory_in_use, peak_memory, start_peak
from operators import profile_step
from part_flops import part_flops
from product import build_trainer, probe_sequences, run_config
from shapes import SHAPES, Plan, Shape
from step_parts import EVENT_PARTS, PartClock, measured
from workload import synchronize

from homodistil.config.command_line import parse
from homodistil.metrics.device_peak import peak_flops
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
    operators = run.settle(plan.settle)
    stages = merged(
        [*(run.stage(plan.interval) for _ in range(plan.events)), run.stage(plan.num_steps - plan.end_step)]
    )
    again = [peak_flops(device, dtype) for _ in range(2)]
    peak = max([trainer.step_log.peak, *again], key=lambda found: found.flops_per_s)
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
        "run_parts": run.all_parts,
        "log_every_steps": config.train.log_every_steps,
        "operators": operators,
        "recipe": recipe_schedule(shape, run),
        "probe_sequences": probe_sequences(config, args.world_size),
    }


def merged(stages: list[dict]) -> list[dict]:
    """Neighbours of the same widths as one: the schedule's last events may have nothing left to remove."""
    found: list[dict] = []
    for stage in stages:
        if found and found[-1]["event"] is None:
            last = found[-1]
            last |= {name: last[name] + stage[name] for name in ("steps", "step_ms", "parts")}
            last |= {"peak_bytes": max(last["peak_bytes"], stage["peak_bytes"]), "event": stage["event"]}
        else:
            found.append(stage)
    return found


class Measurement:
    """A trainer, and what its steps cost."""

    def __init__(self, trainer, device: torch.device) -> None:
        self.trainer, self.device = trainer, device
        self.clock = PartClock(device)
        self.teacher_widths = trainer.student.widths
        self._peak_bytes = 0
        self.all_parts: list[dict[str, float]] = []
        """Of every step that was timed part by part, the first one behind an event too."""

    def settle(self, num_steps: int) -> dict:
        """The first steps of a run, the last of them under the profiler."""
        for _ in range(num_steps - 1):
            self.trainer.train_step()
        return profile_step(self.trainer.train_step, self.device)

    def stage(self, num_steps: int) -> dict:
        """`num_steps` steps at today's widths; the last may end in an event."""
        widths, parameters = self.trainer.student.widths, self.trainer.student.num_parameters()
        flops = self.flops(widths)
        start_peak(self.device)
        self._peak_bytes = 0
        first = self._by_parts()
        num_plain = 0 if self.device.type == "cpu" else (num_steps - 1) // 2
        plain_ms = self._plain(num_plain) if num_plain else []
        parts = [self._by_parts() for _ in range(num_steps - 2 - num_plain)]
        peak_bytes = self._peak_bytes  # not an event's
        parts.append(self._by_parts())
        self.all_parts += [first, *parts]
        is_event, event = self.trainer.student.widths != widths, {name: parts[-1][name] for name in EVENT_PARTS}
        if is_event:
            parts[-1] |= dict.fromkeys(EVENT_PARTS, 0.0)
        return {
            "hidden": widths["hidden"],
            "parameters": parameters,
            "steps": num_steps,
            "step_ms": plain_ms or [sum(step.values()) * 1e3 for step in parts],
            "parts": parts,
            "event": event if is_event else None,
            "flops": flops,
            "peak_bytes": peak_bytes,
        }

    def _plain(self, count: int) -> list[float]:
        """Mean milliseconds of steps that follow each other without a wait of ours."""
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(count):
            self.trainer.train_step()
        synchronize(self.device)
        found = [(time.perf_counter() - start) * 1e3 / count]
        self._see_peak()
        return found

    def _by_parts(self) -> dict[str, float]:
        with measured(self.trainer, self.clock), self.clock.step():
            self.trainer.train_step()
        self._see_peak()
        return self.clock.take()

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
