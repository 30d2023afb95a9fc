"""The plan against reality on this machine: time of a step and peak memory of a rank.

    python -m benchmarks.memory.plan

Two models (random weights and words: neither matters here), ZeRO stages 0 to 3, two ranks, fp32, four widths each: the
teacher's, and after three events on the way to half of it (quickstart) or less. Each cell is the real engine and the
real trainer. Wall and processor time are medians of steps, the smaller of two jobs some minutes apart: what else
happens on a machine only adds to them (one cell's two medians have differed by 44 %). Memory is the largest resident
set of rank 0 while it steps, in a third job whose allocator gives back what is freed. Cells marked * calibrated the
plan, the rest it predicts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import torch

from benchmarks.harness.environment import environment
from benchmarks.harness.launch import hand_back, is_rank, join_ranks, run_ranks
from benchmarks.harness.memory_counters import NO_SHAPE_CACHES, STRICT_ALLOCATOR
from benchmarks.harness.product import build_trainer, run_config
from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page, parser, publish
from benchmarks.harness.shapes import SHAPES, Plan, Shape
from benchmarks.harness.table import table
from homodistil.config.derive import compressed_schedule
from homodistil.metrics.device_peak import peak_flops
from homodistil.planning.cluster import find_cluster
from homodistil.planning.command import machine_name
from homodistil.planning.machine_calibration import Sample, fit
from homodistil.planning.measure import measure_trainer, samples_of
from homodistil.planning.speed import expected_seconds
from homodistil.planning.step_work import StepWork
from homodistil.training.resolve import resolve_run

MODULE = "benchmarks.memory.plan"
NUM_RANKS = 2
MODELS = {
    "tiny (2 layers of 128)": SHAPES["quickstart"],
    "small (4 layers of 256)": Shape(
        layers=4,
        hidden=256,
        ffn=1024,
        heads=4,
        recipe="quickstart",
        batch={"cpu": (16, 8), "quick": (16, 8), "cuda": (256, 256)},
        overrides=(
            "student.preset=custom",
            "student.hidden_size=64",
            "student.intermediate_size=256",
            "student.num_attention_heads=4",
        ),
    ),
}
CALIBRATES = {("tiny (2 layers of 128)", 0), ("tiny (2 layers of 128)", 3), ("small (4 layers of 256)", 2)}
"""Of these runs the first and the last width."""
LIMITS = {"wall_s": ("wall time", 0.25), "cpu_s": ("processor time", 0.25), "bytes": ("memory", 0.15)}
"""Number -> what it is, and the largest error that is wanted."""


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    made.add_argument("--only", nargs=3, metavar=("MODEL", "STAGE", "WORK"), help=argparse.SUPPRESS)
    args = made.parse_args()
    if is_rank():
        model, stage, work = args.only
        hand_back(measure_cells(model, int(stage), Path(work)))
        return
    cells, calibration = predicted(measured(args.models))
    publish("plan", report(cells), rows(cells, environment() | {"calibration": calibration}), args)


def measure_cells(model: str, stage: int, work: Path) -> dict:
    """In a rank: all widths of one model under one stage."""
    device, shape = join_ranks(), MODELS[model]
    config = compressed_schedule(run_config(shape, Plan(interval=6, events=3), work, False, NUM_RANKS, []))
    engine = {"zero_optimization": {"stage": stage}}
    path = work / "engine.json"
    path.write_text(json.dumps(engine))
    cells = measure_trainer(build_trainer(shape, config, path, work, device), device)
    samples = samples_of(resolve_run(config), engine, find_cluster("cpu", NUM_RANKS), cells)
    return {"widths": [c.widths["hidden"] for c in cells], "samples": [dataclasses.asdict(s) for s in samples]}


def measured(models: list[str]) -> list[dict]:
    """Three jobs per model and stage: the better time of two, the memory of the third."""
    strict = STRICT_ALLOCATOR | NO_SHAPE_CACHES
    timed, again, weighed = (_round(models, environment) for environment in ({}, {}, strict))
    for first, second, third in zip(timed, again, weighed, strict=True):
        for sample, later, weight in zip(first["samples"], second["samples"], third["samples"], strict=True):
            sample |= {name: min(sample[name], later[name]) for name in ("wall_s", "cpu_s")}
            sample["peak_bytes"] = weight["peak_bytes"]
    return timed


def _round(models: list[str], environment: dict[str, str]) -> list[dict]:
    """One job per model and stage."""
    runs = []
    for model in models:
        for stage in range(4):
            with tempfile.TemporaryDirectory() as work:
                run = run_ranks(MODULE, ["--only", model, str(stage), work], NUM_RANKS, environment)
            print(f"{model}, ZeRO-{stage}: {[round(s['wall_s'], 3) for s in run['samples']]} s per step", flush=True)
            runs.append({"model": model, "stage": stage, **run})
    return runs


def predicted(runs: list[dict]) -> tuple[list[dict], dict]:
    """Cells with what was measured and what the plan, calibrated by a few of them, says."""
    cells = []
    for run in runs:
        for i, (hidden, raw) in enumerate(zip(run["widths"], run["samples"], strict=True)):
            is_end = i in (0, len(run["widths"]) - 1)
            cell = {"model": run["model"], "stage": run["stage"], "hidden": hidden}
            cell |= {"calibrates": is_end and (run["model"], run["stage"]) in CALIBRATES}
            cells.append(cell | {"sample": Sample(**(raw | {"work": StepWork(**raw["work"])}))})
    torch.set_num_threads(1)
    expected = expected_seconds(find_cluster("cpu", NUM_RANKS), peak_flops("cpu", torch.float32).flops_per_s)
    calibration = fit([cell["sample"] for cell in cells if cell["calibrates"]], machine_name(), expected)
    return [_scored(cell, calibration) for cell in cells], dataclasses.asdict(calibration)


def _scored(cell: dict, calibration) -> dict:
    sample = cell.pop("sample")
    both = {
        "wall_s": (calibration.wall_s(sample.work), sample.wall_s),
        "cpu_s": (calibration.cpu_s(sample.work), sample.cpu_s),
        "bytes": (calibration.process_bytes + sample.counted_bytes, sample.peak_bytes),
    }
    return cell | {name: {"planned": p, "measured": m, "error": p / m - 1} for name, (p, m) in both.items()}


def report(cells: list[dict]) -> str:
    columns = ["model", "ZeRO {}", "hidden {}", "ms per step: planned {:,.0f}", "measured {:,.0f}", "error {:+.0%}"]
    columns += ["CPU ms: planned {:,.0f}", "measured {:,.0f}", "error {:+.0%}"]
    columns += ["MB of a rank: planned {:,.0f}", "measured {:,.0f}", "error {:+.0%}"]
    lines = []
    for cell in cells:
        lines.append([cell["model"] + " *" * cell["calibrates"], cell["stage"], cell["hidden"]])
        for name, unit in (("wall_s", 1e3), ("cpu_s", 1e3), ("bytes", 1e-6)):
            value = cell[name]
            lines[-1] += [value["planned"] * unit, value["measured"] * unit, value["error"]]
    return page("The plan against reality", __doc__.partition("\n\n")[2], _counts(cells), table(columns, lines))


def _counts(cells: list[dict]) -> str:
    rest, parts = [cell for cell in cells if not cell["calibrates"]], []
    for name, (what, limit) in LIMITS.items():
        errors = [abs(cell[name]["error"]) for cell in rest]
        within = sum(error <= limit for error in errors)
        parts.append(f"{what}: {within} of {len(errors)} within {limit:.0%} (largest {max(errors):.0%})")
    return f"Of the {len(rest)} cells that did not calibrate, " + "; ".join(parts) + "."


def rows(cells: list[dict], config: dict) -> Rows:
    made = Rows("plan", config)
    for cell in cells:
        about = {"calibrates": cell["calibrates"]}
        for name in LIMITS:
            for kind, value in cell[name].items():
                variant = f"{cell['model']}, ZeRO-{cell['stage']}"
                made.add(variant, f"{name}/{kind}", "bytes" if name == "bytes" else "s", cell["hidden"], value, **about)
    return made


if __name__ == "__main__":
    main()
