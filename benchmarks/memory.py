"""Does memory follow the width? Many consecutive resize events on live engines, with training steps in between.

    python benchmarks/memory.py                          # ZeRO 0, 1, 2, 3 in fp32, 2 ranks, 60 events each
    python benchmarks/memory.py --size tiny --engines "ZeRO-2 fp32" --json out.json

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
import sys
from pathlib import Path

import torch
from launch import hand_back, is_rank, join_ranks, run_ranks
from memory_counters import NO_SHAPE_CACHES, STRICT_ALLOCATOR, live_tensor_bytes, memory_in_use
from report import environment, environment_text, result_path, row, write, write_json
from workload import ENGINES, SIZES, Size, make_engine, make_model, narrower, random_ids, refusal, stage_of, train_step

CONTROL = "plain torch, no engine"
ENGINES_BY_DEFAULT = [CONTROL, "ZeRO-0 fp32", "ZeRO-1 fp32", "ZeRO-2 fp32", "ZeRO-3 fp32"]
STEP_OF_AXIS = {
    "standard": {"hidden": 4, "ffn": 16, "qk_dim": 1, "vo_dim": 1},
    "tiny": {"hidden": 1, "ffn": 1, "qk_dim": 1, "vo_dim": 1},
}
TURNS = [("hidden",), ("ffn",), ("qk_dim", "vo_dim")]
SETTLING_EVENTS = 10
"""The first events still meet code for the first time (imports, buffers of gloo): not part of the slope."""
MIB = 2**20
ENVIRONMENT = STRICT_ALLOCATOR | NO_SHAPE_CACHES
NEGLIGIBLE_SHARE = 0.05
"""Growth over all events, as a share of the bytes they freed, that counts as none: heap pages, not tensors."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=[CONTROL, *ENGINES], default=ENGINES_BY_DEFAULT)
    parser.add_argument("--size", choices=list(STEP_OF_AXIS), default="standard")
    parser.add_argument("--events", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine")
    parser.add_argument("--json", type=Path, help="write rows here, and nothing under benchmarks/results/")
    return parser.parse_args()


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


def run(name: str, size_name: str, num_events: int, device: torch.device) -> dict:
    """Readings after every event, and the live bytes of a fresh start at the final widths."""
    if name == CONTROL:
        return run_control(size_name, num_events, device)
    return run_engine(name, size_name, num_events, device)


def run_engine(engine_name: str, size_name: str, num_events: int, device: torch.device) -> dict:
    from homodistil.models.encoders.bert import BERT as bert
    from homodistil.models.resize_plan import make_plan
    from homodistil.resize import check_supported, resize

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


def run_control(size_name: str, num_events: int, device: torch.device) -> dict:
    """The same widths and tokens in a plain loop, without engine, optimizer or homodistil.resize's mover."""
    from homodistil.models.encoders.bert import BERT as bert
    from homodistil.models.resize_plan import make_plan

    size, readings = SIZES[size_name], []
    gc.collect()
    gc.freeze()
    live_before, model = live_tensor_bytes(device), make_model(size).to(device)
    table = bert.axis_table(model)
    for event in range(-1, num_events):
        if event >= 0:
            plan = make_plan(table, narrower(table, widths_of_event(table.widths, event, size_name), event))
            for name, index in plan.index.items():
                param = model.get_parameter(name)
                for dim, kept in index.items():
                    param.data = param.data.index_select(dim, kept.to(device))
            bert.refresh(model, plan.widths_after)
            table = table.with_widths(plan.widths_after)
            del plan, index, kept
        ids = random_ids(size, event).to(device)
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        readings.append(read(model, CONTROL, device, live_before))
    return {"readings": readings, "fresh_live": readings[-1]["accounted"]}


def read(module, engine_name: str, device: torch.device, live_before: int) -> dict[str, float]:
    import torch.distributed as dist

    from homodistil.models.parameter_shape import full_numel

    num_parameters = sum(map(full_numel, module.parameters()))
    live = live_tensor_bytes(device) - live_before
    accounted = 4 * num_parameters
    if engine_name != CONTROL:
        accounted = accounted_bytes(engine_name, num_parameters, dist.get_world_size())
    return {
        "parameters": num_parameters,
        "accounted": accounted,
        "live": live,
        "resident": memory_in_use(device),
    }


def fresh_live_bytes(engine_name: str, size: Size, widths: dict[str, int], device: torch.device) -> int:
    """Live bytes of a new engine that had `widths` from the start, after two steps."""
    from homodistil.models.encoders.bert import BERT as bert
    from homodistil.models.resize_plan import make_plan, slice_module

    gc.collect()
    live_before = live_tensor_bytes(device)
    model = make_model(size)
    table = bert.axis_table(model)
    slice_module(model, make_plan(table, narrower(table, widths, 0)))
    bert.refresh(model, widths)
    engine = make_engine(engine_name, model, size)
    for step in range(2):
        train_step(engine, size, step)
    found = live_tensor_bytes(device) - live_before
    engine.destroy()
    return found


def slope(readings: list[dict], metric: str) -> tuple[float, float]:
    """Least squares of (metric - accounted) over the event number: bytes an event, and the standard error of that."""
    points = [(float(k), r[metric] - r["accounted"]) for k, r in enumerate(readings) if k >= SETTLING_EVENTS]
    n, mean_x, mean_y = len(points), sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    squares = sum((x - mean_x) ** 2 for x, _ in points)
    found = sum((x - mean_x) * (y - mean_y) for x, y in points) / squares
    residual = sum((y - mean_y - found * (x - mean_x)) ** 2 for x, y in points)
    return found, (residual / (n - 2) / squares) ** 0.5


def summary(result: dict) -> dict:
    """Slopes in KiB an event, the growth that they add up to, and whether that is nothing."""
    readings = result["readings"]
    freed = readings[0]["accounted"] - readings[-1]["accounted"]
    found = {"freed_mib": freed / MIB, "fresh_difference_kib": (readings[-1]["live"] - result["fresh_live"]) / 1024}
    for metric in ("live", "resident"):
        rise, error = slope(readings, metric)
        growth = rise * (len(readings) - 1)
        found[metric] = {
            "slope_kib": rise / 1024,
            "error_kib": error / 1024,
            "flat": rise <= 2 * error or growth < NEGLIGIBLE_SHARE * freed,
        }
    return found


def table(engine_name: str, result: dict) -> str:
    lines = [
        f"## {engine_name}",
        "",
        "| event | parameters | accounted MiB | live tensors MiB | resident MiB | live - acc. | resident - acc. |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    readings = result["readings"]
    for event in range(0, len(readings), 10):
        r = readings[event]
        cells = [r["accounted"], r["live"], r["resident"], r["live"] - r["accounted"], r["resident"] - r["accounted"]]
        numbers = " | ".join(f"{cell / MIB:.2f}" for cell in cells)
        lines.append(f"| {event} | {r['parameters'] / 1e6:.3f} M | {numbers} |")
    found = summary(result)
    lines += [
        "",
        f"Freed by the events: {found['freed_mib']:.2f} MiB. Live bytes after the last event minus those of a",
    ]
    lines[-1] += f" fresh engine of these widths: {found['fresh_difference_kib']:.2f} KiB."
    for metric, what in (("live", "live tensors"), ("resident", "resident")):
        s = found[metric]
        lines.append(
            f"Slope of ({what} - accounted): {s['slope_kib']:+.2f} +- {s['error_kib']:.2f} KiB an event: "
            f"{'none' if s['flat'] else 'MEMORY STAYS BEHIND'}."
        )
    return "\n".join(lines)


def rows(results: dict[str, dict], config: dict) -> list[dict]:
    found = []
    for engine_name, result in results.items():
        for event, reading in enumerate(result["readings"]):
            for metric in ("accounted", "live", "resident"):
                found.append(row("memory", engine_name, metric, "bytes", event, [reading[metric]], config))
        numbers = summary(result)
        found.append(
            row("memory", engine_name, "fresh_difference", "KiB", "end", [numbers["fresh_difference_kib"]], config)
        )
        for metric in ("live", "resident"):
            for part in ("slope", "error"):
                value = numbers[metric][f"{part}_kib"]
                found.append(row("memory", engine_name, f"{metric}_{part}", "KiB/event", "all", [value], config))
    return found


def report(results: dict[str, dict], refused: dict[str, str], args: argparse.Namespace) -> str:
    parts = [
        f"# Memory over {args.events} resize events",
        environment_text(),
        f"Model: BERT {SIZES[args.size]}; {args.ranks} ranks. Each event narrows hidden, ffn or the dims of every "
        f"head, in turn, by {STEP_OF_AXIS[args.size]}; a training step follows.",
        f"    {' '.join(['python', 'benchmarks/memory.py', *sys.argv[1:]])}",
        f"How numbers are taken: head of `benchmarks/memory.py`. Slopes: least squares from event {SETTLING_EVENTS} "
        f"on, +- standard error; 'none' when at most 2 standard errors above zero, or when all events left less "
        f"than {NEGLIGIBLE_SHARE:.0%} of what they freed.",
        *[table(name, result) for name, result in results.items()],
        *[f"## {name}\n\nnot run: {reason}" for name, reason in refused.items()],
    ]
    return "\n\n".join(parts)


def main() -> None:
    args = parse_args()
    if is_rank():
        device = join_ranks()
        hand_back({name: run(name, args.size, args.events, device) for name in args.engines})
        return
    refused = {name: reason for name in args.engines if name != CONTROL and (reason := refusal(name))}
    supported = [name for name in args.engines if name not in refused]
    options = ["--size", args.size, "--events", str(args.events), "--engines", *supported]
    results = run_ranks(__file__, options, args.ranks, ENVIRONMENT)
    text = report(results, refused, args)
    print(text)
    config = {"size": args.size, "events": args.events, "ranks": args.ranks, **environment()}
    write_json(args.json or result_path("memory", ".json"), rows(results, config))
    if not args.json:
        write(result_path("memory", ".md"), text)


if __name__ == "__main__":
    main()
