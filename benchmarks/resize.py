"""Cost of resize events on live engines: time against a training step and extra memory, next to a new engine an event.

    python benchmarks/resize.py                                   # every kind of engine, 2 ranks, 10 M parameters
    python benchmarks/resize.py --quick                           # under 90 s
    python benchmarks/resize.py --engines "ZeRO-2 bf16" --json out.json

Two engines with equal weights train on equal tokens. At every event one is resized in place, the other is replaced by
a new `deepspeed.initialize` with its state copied over by hand (reinitialize.py), the two by turns first; then all
their state is compared bitwise. Ranks are started twice: once for time, once for memory. Extra memory is the growth of
the process's peak resident set over its level before the event (of the allocator's on a GPU), with an allocator that
returns freed memory at once (glibc; it makes everything slower, hence the second run); the unit is one fp32 state
partition, parameters x 4 bytes / ranks. Every number is the worst of the ranks.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from launch import hand_back, is_rank, join_ranks, run_ranks
from memory_counters import STRICT_ALLOCATOR, memory_in_use, peak_memory, start_peak
from report import environment, result_path, write, write_json
from resize_tables import report, rows
from workload import (
    ENGINES,
    SIZES,
    bert_config,
    make_engine,
    make_model,
    narrower,
    refusal,
    synchronize,
    train_step,
)

KINDS = ["ffn", "hidden", "heads and their dims", "one neuron", "all axes"]
QUICK_KINDS = ["hidden", "all axes"]
QUICK_ENGINES = ["ZeRO-0 bf16", "ZeRO-1 bf16", "ZeRO-2 bf16", "ZeRO-3 bf16"]
STEPS_BETWEEN, WARMUP_STEPS = 2, 3


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), help="default: all")
    parser.add_argument("--rounds", type=int, default=1, help="times through the kinds of events")
    parser.add_argument("--ranks", type=int, default=2, help="processes on this machine")
    parser.add_argument("--quick", action="store_true", help="small model, two events, a wrapper of each stage")
    parser.add_argument("--json", type=Path, help="write rows here, and nothing under benchmarks/results/")
    args = parser.parse_args()
    args.engines = args.engines or (QUICK_ENGINES if args.quick else list(ENGINES))
    return args


def widths_of_event(widths: dict[str, int], kind: str) -> dict[str, int]:
    """Axis -> its width after an event of this kind, about a sixteenth narrower."""
    sixteenth = {axis: max(1, size - max(1, size // 16)) for axis, size in widths.items()}

    def every(*ends: str) -> dict[str, int]:
        return {axis: sixteenth[axis] for axis in widths if axis.endswith(ends)}

    if kind == "one neuron":
        return {"layer.0.ffn": widths["layer.0.ffn"] - 1}
    ends = {
        "ffn": (".ffn",),
        "hidden": ("hidden",),
        "heads and their dims": (".heads", "_dim"),
        "all axes": ("hidden", ".ffn", "_dim"),
    }
    return every(*ends[kind])


def run_engine(engine_name: str, args: argparse.Namespace, device: torch.device) -> dict:
    """Milliseconds of steps, and one entry an event with the costs of both ways."""
    from reinitialize import ReinitializedRun

    from homodistil.models.encoders.bert import BERT as bert
    from homodistil.models.resize_plan import make_plan
    from homodistil.resize import check_supported

    size = SIZES["quick" if args.quick else "standard"]
    build = partial(make_engine, engine_name, size=size)
    model = make_model(size)
    table, engine = bert.axis_table(model), build(model)
    check_supported(engine)
    other = ReinitializedRun(build(make_model(size)), build, bert_config(size))
    num_steps, step_ms, events = 0, [], []

    def train(num: int) -> None:
        nonlocal num_steps
        for _ in range(num):
            step_ms.append(train_step(engine, size, num_steps))
            train_step(other.engine, size, num_steps)
            num_steps += 1

    train(WARMUP_STEPS)
    step_ms.clear()
    for number, kind in enumerate((QUICK_KINDS if args.quick else KINDS) * args.rounds):
        train(STEPS_BETWEEN)
        if "offload" in engine_name:
            copy_state(engine, other.engine)
        plan = make_plan(table, narrower(table, widths_of_event(table.widths, kind), number))
        events.append({"kind": kind, **run_event(engine, other, plan, number, device)})
        check_equal(engine, other.engine)
        table = table.with_widths(plan.widths_after)
    other.engine.destroy()
    engine.destroy()
    return {"step_ms": step_ms, "events": events}


def run_event(engine, other, plan, number: int, device: torch.device) -> dict:
    """Costs of both ways, the worst of the ranks; who goes first alternates."""
    import torch.distributed as dist

    from homodistil.models.encoders.bert import BERT as bert
    from homodistil.models.parameter_shape import full_numel
    from homodistil.resize import resize

    num_parameters = sum(map(full_numel, engine.module.parameters()))

    def in_place() -> None:
        nonlocal bytes_moved
        bytes_moved = resize(engine, plan).bytes_moved
        bert.refresh(engine.module, plan.widths_after)

    bytes_moved, costs = 0, {}
    ways = [("in place", in_place), ("new engine", lambda: other.resize(plan))]
    for way, action in ways[:: 1 if number % 2 == 0 else -1]:
        worst = torch.tensor(cost_of(action, device), dtype=torch.float64, device=device)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        costs[way] = dict(zip(("milliseconds", "extra_bytes"), worst.tolist(), strict=True))
    state_bytes = num_parameters * 4 / dist.get_world_size()
    return {"parameters": num_parameters, "state_bytes": state_bytes, "bytes_moved": bytes_moved, "costs": costs}


def cost_of(action, device: torch.device) -> tuple[float, float]:
    """Milliseconds, and bytes of the peak over the level before."""
    import torch.distributed as dist

    synchronize(device)
    dist.barrier()
    before = memory_in_use(device)
    start_peak(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3, float(peak_memory(device) - before)


def copy_state(engine, other) -> None:
    """Makes what an event moves equal again. DeepSpeedCPUAdam multiplies its beta ** t up step by step, out of reach;
    a new one computes the power: from its third step on the last bit may differ.
    """
    from homodistil.resize import owned_state

    with torch.no_grad():
        for mine, theirs in zip(owned_state(engine), owned_state(other), strict=True):
            theirs.weight.copy_(mine.weight)
            for kind, values in theirs.states.items():
                values.copy_(mine.states[kind])


def check_equal(engine, other) -> None:
    """Weights, masters and both moments of the two engines are bitwise equal on this rank."""
    from homodistil.resize import owned_state

    for mine, theirs in zip(owned_state(engine), owned_state(other), strict=True):
        assert (mine.name, mine.start, mine.states.keys()) == (theirs.name, theirs.start, theirs.states.keys())
        assert torch.equal(mine.weight, theirs.weight), mine.name
        assert all(torch.equal(mine.states[kind], theirs.states[kind]) for kind in mine.states), mine.name
    for (name, mine), theirs in zip(engine.module.named_parameters(), other.module.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def merge(timed: dict, measured: dict) -> dict:
    """Memory of the second run into the events of the first."""
    for engine_name, result in timed.items():
        for event, other in zip(result["events"], measured[engine_name]["events"], strict=True):
            for way, cost in event["costs"].items():
                cost["extra_bytes"] = other["costs"][way]["extra_bytes"]
    return timed


def main() -> None:
    args = parse_args()
    if is_rank():
        device = join_ranks()
        hand_back({name: run_engine(name, args, device) for name in args.engines})
        return
    refused = {name: reason for name in args.engines if (reason := refusal(name))}
    options = ["--rounds", str(args.rounds), *(["--quick"] if args.quick else [])]
    options += ["--engines", *[name for name in args.engines if name not in refused]]
    timed, measured = (run_ranks(__file__, options, args.ranks, env) for env in ({}, STRICT_ALLOCATOR))
    results = merge(timed, measured)
    text = report(results, refused, args)
    print(text)
    if args.quick and not args.json:
        return
    config = {"quick": args.quick, "rounds": args.rounds, "ranks": args.ranks, **environment()}
    write_json(args.json or result_path("resize", ".json"), rows(results, config))
    if not args.json:
        write(result_path("resize", ".md"), text)


if __name__ == "__main__":
    main()
