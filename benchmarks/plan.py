"""The plan against reality on this machine: time of a step and peak memory of a rank.

    python benchmarks/plan.py

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
from launch import ROOT, hand_back, is_rank, join_ranks, run_ranks
from memory_counters import NO_SHAPE_CACHES, STRICT_ALLOCATOR
from shapes import SHAPES, Shape

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
_STRICT = STRICT_ALLOCATOR | NO_SHAPE_CACHES
MEMORY_LIMIT, TIME_LIMIT = 0.15, 0.25


def engine_json(stage: int) -> dict:
    return {"zero_optimization": {"stage": stage}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "plan_cpu_202611")
    parser.add_argument("--only", nargs=3, metavar=("MODEL", "STAGE", "WORK"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if is_rank():
        measure_cells(args.only[0], int(args.only[1]), Path(args.only[2]))
    else:
        compare(args.out)


def measure_cells(model: str, stage: int, work: Path) -> None:
    """In a rank: all widths of one model under one stage."""
    from product import build_trainer, run_config
    from shapes import Plan

    from homodistil.planning.cluster import find_cluster
    from homodistil.planning.measure import compressed_schedule, measure_trainer, samples_of

    device = join_ranks()
    shape = MODELS[model]
    config = compressed_schedule(run_config(shape, Plan(interval=6, events=3), work, False, NUM_RANKS, []))
    path = work / "engine.json"
    path.write_text(json.dumps(engine_json(stage)))
    measured = measure_trainer(build_trainer(shape, config, path, work, device), device)
    samples = samples_of(config, engine_json(stage), find_cluster("cpu", NUM_RANKS), measured)
    hand_back({"widths": [m.widths["hidden"] for m in measured], "samples": [dataclasses.asdict(s) for s in samples]})


def compare(out: Path) -> None:
    """Runs all cells, three jobs a model and stage."""
    timed, again, weighed = (_round(environment) for environment in ({}, {}, _STRICT))
    for first, second, third in zip(timed, again, weighed, strict=True):
        for sample, later, weight in zip(first["samples"], second["samples"], third["samples"], strict=True):
            sample |= {name: min(sample[name], later[name]) for name in ("wall_s", "cpu_s")}
            sample["peak_bytes"] = weight["peak_bytes"]
    cells, calibration = predicted(timed)
    out.with_suffix(".json").write_text(json.dumps({"cells": cells, "calibration": calibration}, indent=1) + "\n")
    out.with_suffix(".md").write_text(page(cells))
    print(page(cells))


def _round(environment: dict[str, str]) -> list[dict]:
    """One job a model and stage."""
    runs = []
    for model in MODELS:
        for stage in range(4):
            with tempfile.TemporaryDirectory() as work:
                run = run_ranks(__file__, ["--only", model, str(stage), work], NUM_RANKS, environment)
            print(f"{model}, ZeRO-{stage}: {[round(s['wall_s'], 3) for s in run['samples']]} s a step", flush=True)
            runs.append({"model": model, "stage": stage, **run})
    return runs


def predicted(runs: list[dict]) -> tuple[list[dict], dict]:
    """Cells with what was measured and what the plan, calibrated by a few of them, says."""
    from homodistil.metrics.device_peak import peak_flops
    from homodistil.planning.cluster import find_cluster
    from homodistil.planning.command import machine_name
    from homodistil.planning.machine_calibration import Sample, fit
    from homodistil.planning.speed import expected_seconds
    from homodistil.planning.step_work import StepWork

    cells = []
    for run in runs:
        last = len(run["widths"]) - 1
        for i, (hidden, raw) in enumerate(zip(run["widths"], run["samples"], strict=True)):
            sample = Sample(**(raw | {"work": StepWork(**raw["work"])}))
            calibrates = (run["model"], run["stage"]) in CALIBRATES and i in (0, last)
            cells.append(
                {"model": run["model"], "stage": run["stage"], "hidden": hidden}
                | {"calibrates": calibrates, "sample": sample}
            )
    torch.set_num_threads(1)
    expected = expected_seconds(find_cluster("cpu", NUM_RANKS), peak_flops("cpu", torch.float32).flops_per_s)
    found = fit([cell["sample"] for cell in cells if cell["calibrates"]], machine_name(), expected)
    return [_scored(cell, found) for cell in cells], dataclasses.asdict(found)


def _scored(cell: dict, calibration) -> dict:
    sample = cell.pop("sample")
    said = {
        "wall_s": (calibration.wall_s(sample.work), sample.wall_s),
        "cpu_s": (calibration.cpu_s(sample.work), sample.cpu_s),
        "bytes": (calibration.process_bytes + sample.counted_bytes, sample.peak_bytes),
    }
    return cell | {name: {"planned": p, "measured": m, "error": p / m - 1} for name, (p, m) in said.items()}


_LIMITS = {"wall_s": TIME_LIMIT, "cpu_s": TIME_LIMIT, "bytes": MEMORY_LIMIT}


def page(cells: list[dict]) -> str:
    """The results as Markdown."""
    lines = [
        "# The plan against reality, CPU (November 2026)",
        "",
        "```",
        __doc__.strip(),
        "```",
        "",
        _counts(cells),
        "",
    ]
    heading = (
        "model",
        "ZeRO",
        "hidden",
        "ms a step: planned",
        "measured",
        "error",
        "CPU ms: planned",
        "measured",
        "error",
    )
    heading += ("MB of a rank: planned", "measured", "error")
    lines += ["| " + " | ".join(heading) + " |", "|---|--:" + "|--:" * 10 + "|"]
    for cell in cells:
        row = [cell["model"] + (" *" if cell["calibrates"] else ""), str(cell["stage"]), str(cell["hidden"])]
        for name, unit in (("wall_s", 1e3), ("cpu_s", 1e3), ("bytes", 1e-6)):
            value = cell[name]
            row += [f"{value['planned'] * unit:,.0f}", f"{value['measured'] * unit:,.0f}", f"{value['error']:+.0%}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _counts(cells: list[dict]) -> str:
    predicted_cells = [cell for cell in cells if not cell["calibrates"]]
    parts = []
    for name, what in (("wall_s", "wall time"), ("cpu_s", "processor time"), ("bytes", "memory")):
        errors = [abs(cell[name]["error"]) for cell in predicted_cells]
        within = sum(error <= _LIMITS[name] for error in errors)
        parts.append(f"{what}: {within} of {len(errors)} within {_LIMITS[name]:.0%} (largest {max(errors):.0%})")
    return f"Of the {len(predicted_cells)} cells that did not calibrate, " + "; ".join(parts) + "."


if __name__ == "__main__":
    main()
