"""Does memory follow the width? Many consecutive resize events on live engines, with training steps in between.

    python -m benchmarks.memory.resize_events          # ZeRO 0, 1, 2, 3 in fp32, 2 ranks, 60 events each
    python -m benchmarks.memory.resize_events --size tiny --engines "ZeRO-2 fp32" --json out.json

After every event and the training step behind it, three numbers of rank 0: what the process has (resident set; bytes
of the allocator on a GPU), what its live tensors hold, and what today's widths account for: weights, masters and both
moments, from shapes alone. Whatever a resize leaves behind shows as a slope of the differences over the events. In the
end a fresh engine of the final widths is built: the live bytes of the resized one have to equal its own.

The ranks run with an allocator that returns freed memory at once (glibc), and without the caches of oneDNN and MKL:
these keep code and buffers for every shape a step has met, in a plain torch model that shrinks as well.
"""

from __future__ import annotations

import argparse
import gc

import torch
import torch.distributed as dist

from benchmarks.harness.environment import environment
from benchmarks.harness.launch import hand_back, is_rank, join_ranks, run_ranks
from benchmarks.harness.memory_counters import NO_SHAPE_CACHES, STRICT_ALLOCATOR, live_tensor_bytes, memory_in_use
from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page, parser, publish
from benchmarks.harness.table import table
from benchmarks.harness.workload import (
    ENGINES,
    SIZES,
    Size,
    make_engine,
    make_model,
    narrower,
    refusal,
    stage_of,
    train_step,
)
from homodistil.models.encoders.bert import BERT as bert
from homodistil.models.parameter_shape import full_numel
from homodistil.models.resize_plan import make_plan, slice_module
from homodistil.resize import check_supported, resize

MODULE = "benchmarks.memory.resize_events"
ENGINES_BY_DEFAULT = ["ZeRO-0 fp32", "ZeRO-1 fp32", "ZeRO-2 fp32", "ZeRO-3 fp32"]
STEP_OF_AXIS = {
    "standard": {"hidden": 4, "ffn": 16, "qk_dim": 1, "vo_dim": 1},
    "tiny": {"hidden": 1, "ffn": 1, "qk_dim": 1, "vo_dim": 1},
}
TURNS = [("hidden",), ("ffn",), ("qk_dim", "vo_dim")]
SETTLING_EVENTS = 10
"""The first events still meet code for the first time (imports, buffers of gloo): not part of the slope."""
MIB = 2**20
METRICS = ("accounted", "live", "resident")
ENVIRONMENT = STRICT_ALLOCATOR | NO_SHAPE_CACHES
NEGLIGIBLE_SHARE = 0.05
"""Growth over all events, as a share of the bytes they freed, that counts as none: heap pages, not tensors."""


def parse_args() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--engines", nargs="+", choices=list(ENGINES), default=ENGINES_BY_DEFAULT)
    made.add_argument("--size", choices=list(STEP_OF_AXIS), default="standard")
    made.add_argument("--events", type=int, default=60)
    made.add_argument("--ranks", type=int, default=2, help="processes on this machine")
    return made.parse_args()


def accounted_bytes(engine_name: str, num_parameters: int, num_ranks: int) -> float:
    """Weights, fp32 masters and both moments on one rank between two steps (gradients are freed by then)."""
    weight_bytes = 2 if "bf16" in engine_name else 4
    stage, partition = stage_of(engine_name), num_parameters / num_ranks
    if stage == 0:
        masters = 4 * num_parameters if weight_bytes == 2 else 0  # in fp32 they are the weights
        return weight_bytes * num_parameters + masters + 8 * num_parameters
    if stage < 3:
        return weight_bytes * num_parameters + 12 * partition
    return (2 * weight_bytes + 12) * partition  # ZeRO-3 keeps its gradient partition


def widths_of_event(widths: dict[str, int], event: int, size_name: str) -> dict[str, int]:
    """Axis -> its width after event number `event`; hidden, ffn and head dims take turns."""
    turn = TURNS[event % len(TURNS)]
    chosen = [axis for axis in widths if axis.rsplit(".", 1)[-1] in turn]
    return {axis: widths[axis] - STEP_OF_AXIS[size_name][axis.rsplit(".", 1)[-1]] for axis in chosen}


def run_engine(engine_name: str, size_name: str, num_events: int, device: torch.device) -> dict:
    size = SIZES[size_name]
    gc.collect()
    gc.freeze()  # hundreds of thousands of objects of imported libraries: no longer walked at every reading
    live_before = live_tensor_bytes(device)
    model = make_model(size)
    table = bert.axis_table(model)
    engine = make_engine(engine_name, model, size)
    check_supported(engine)
    for step in range(2):
        train_step(engine, size, step)
    readings = [read(engine.module, engine_name, device, live_before)]
    for event in range(num_events):
        plan = make_plan(table, narrower(table, widths_of_event(table.widths, event, size_name), event))
        resize(engine, plan)
        bert.refresh(model, plan.widths_after)
        table = table.with_widths(plan.widths_after)
        del plan  # its indices are tensors, too
        train_step(engine, size, 2 + event)
        readings.append(read(engine.module, engine_name, device, live_before))
    engine.destroy()
    del engine, model
    return {"readings": readings, "fresh_live": fresh_live_bytes(engine_name, size, table.widths, device)}


def read(module, engine_name: str, device: torch.device, live_before: int) -> dict[str, float]:
    num_parameters = sum(map(full_numel, module.parameters()))
    live = live_tensor_bytes(device) - live_before
    accounted = accounted_bytes(engine_name, num_parameters, dist.get_world_size())
    return {
        "parameters": num_parameters,
        "accounted": accounted,
        "live": live,
        "resident": memory_in_use(device),
    }


def fresh_live_bytes(engine_name: str, size: Size, widths: dict[str, int], device: torch.device) -> int:
    """Live bytes of a new engine that had `widths` from the start, after two steps."""
    gc.collect()
    live_before = live_tensor_bytes(device)
    model = make_model(size)
    table = bert.axis_table(model)
    slice_module(model, make_plan(table, narrower(table, widths, 0)))
    bert.refresh(model, widths)
    engine = make_engine(engine_name, model, size)
    for step in range(2):
        train_step(engine, size, step)
    num_bytes = live_tensor_bytes(device) - live_before
    engine.destroy()
    return num_bytes


def slope(readings: list[dict], metric: str) -> tuple[float, float]:
    """Least squares of (metric - accounted) over the event number: bytes an event, and the standard error of that."""
    points = [(float(k), r[metric] - r["accounted"]) for k, r in enumerate(readings) if k >= SETTLING_EVENTS]
    n, mean_x, mean_y = len(points), sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    squares = sum((x - mean_x) ** 2 for x, _ in points)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in points) / squares
    residual = sum((y - mean_y - rise * (x - mean_x)) ** 2 for x, y in points)
    return rise, (residual / (n - 2) / squares) ** 0.5


def summary(result: dict) -> dict:
    """Slopes in KiB an event, the growth that they add up to, and whether that is nothing."""
    readings = result["readings"]
    freed = readings[0]["accounted"] - readings[-1]["accounted"]
    measured = {"freed_mib": freed / MIB, "fresh_difference_kib": (readings[-1]["live"] - result["fresh_live"]) / 1024}
    for metric in ("live", "resident"):
        rise, error = slope(readings, metric)
        growth = rise * (len(readings) - 1)
        measured[metric] = {
            "slope_kib": rise / 1024,
            "error_kib": error / 1024,
            "flat": rise <= 2 * error or growth < NEGLIGIBLE_SHARE * freed,
        }
    return measured


def section(engine_name: str, result: dict) -> str:
    columns = ["event {}", "parameters {:.3f} M", "accounted MiB {:.2f}", "live tensors MiB {:.2f}"]
    columns += ["resident MiB {:.2f}", "live - acc. {:.2f}", "resident - acc. {:.2f}"]
    lines = []
    for event, reading in list(enumerate(result["readings"]))[::10]:
        accounted, live, resident = (reading[metric] / MIB for metric in METRICS)
        lines.append([event, reading["parameters"] / 1e6, accounted, live, resident])
        lines[-1] += [live - accounted, resident - accounted]
    numbers = summary(result)
    verdicts = [
        f"Freed by the events: {numbers['freed_mib']:.2f} MiB. Live bytes after the last event minus those of a fresh "
        f"engine of these widths: {numbers['fresh_difference_kib']:.2f} KiB."
    ]
    for metric, what in (("live", "live tensors"), ("resident", "resident")):
        s = numbers[metric]
        verdicts.append(
            f"Slope of ({what} - accounted): {s['slope_kib']:+.2f} +- {s['error_kib']:.2f} KiB per event: "
            f"{'none' if s['flat'] else 'MEMORY STAYS BEHIND'}."
        )
    return "\n\n".join([f"## {engine_name}", table(columns, lines), "\n".join(verdicts)])


def rows(results: dict[str, dict], config: dict) -> Rows:
    made = Rows("memory", config)
    for engine_name, result in results.items():
        for event, reading in enumerate(result["readings"]):
            for metric in METRICS:
                made.add(engine_name, metric, "bytes", event, reading[metric])
        numbers = summary(result)
        made.add(engine_name, "fresh_difference", "KiB", "end", numbers["fresh_difference_kib"])
        for metric in ("live", "resident"):
            for part in ("slope", "error"):
                made.add(engine_name, f"{metric}_{part}", "KiB/event", "all", numbers[metric][f"{part}_kib"])
    return made


def report(results: dict[str, dict], refused: dict[str, str], args: argparse.Namespace) -> str:
    model = (
        f"Model: BERT {SIZES[args.size]}; {args.ranks} ranks. Each event narrows hidden, ffn or the dims of every "
        f"head, in turn, by {STEP_OF_AXIS[args.size]}; a training step follows."
    )
    how = (
        f"How numbers are taken: head of `benchmarks/memory/resize_events.py`. Slopes: least squares from event "
        f"{SETTLING_EVENTS} on, +- standard error; 'none' when at most 2 standard errors above zero, or when all "
        f"events left less than {NEGLIGIBLE_SHARE:.0%} of what they freed."
    )
    parts = [section(name, result) for name, result in results.items()]
    parts += [f"## {name}\n\nnot run: {reason}" for name, reason in refused.items()]
    return page(f"Memory over {args.events} resize events", model, how, *parts)


def main() -> None:
    args = parse_args()
    if is_rank():
        device = join_ranks()
        hand_back({name: run_engine(name, args.size, args.events, device) for name in args.engines})
        return
    refused = {name: reason for name in args.engines if (reason := refusal(name))}
    supported = [name for name in args.engines if name not in refused]
    options = ["--size", args.size, "--events", str(args.events), "--engines", *supported]
    results = run_ranks(MODULE, options, args.ranks, ENVIRONMENT)
    config = {"size": args.size, "events": args.events, "ranks": args.ranks, **environment()}
    publish("memory", report(results, refused, args), rows(results, config), args)


if __name__ == "__main__":
    main()
