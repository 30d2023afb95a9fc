"""The numbers of `throughput.py` as rows and as a page."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page
from benchmarks.harness.step_parts import OTHER, PARTS, explained, summed
from benchmarks.harness.table import table
from homodistil.evaluation.gap_probe import PROBE_SEQUENCES

MIB = 2**20
# The acceptance of the project: (part, largest share of the step).
LIMITS = {"measure": 0.03, "log": 0.01, "data": 0.01}
SMALLEST_EXPLAINED, SMALLEST_GEMM_SHARE = 0.95, 0.60


def step_ms(stage: dict) -> float:
    return statistics.median(stage["step_ms"])


def schedule_mean(result: dict, of_stage: Callable[[dict], float]) -> float:
    """Mean per step over the schedule that was run, of a number that each stage has."""
    steps = sum(stage["steps"] for stage in result["stages"])
    return sum(of_stage(stage) * stage["steps"] for stage in result["stages"]) / steps


def stage_flops(stage: dict) -> float:
    return sum(stage["flops"].values())


def interpolated_ms(stages: list[dict], hidden: float) -> float:
    """Milliseconds of a step at a residual width between measured ones."""
    known = sorted({stage["hidden"]: step_ms(stage) for stage in stages}.items())
    if hidden >= known[-1][0]:
        return known[-1][1]
    above = next(i for i, (width, _) in enumerate(known) if width > hidden) if hidden >= known[0][0] else 0
    if above == 0:
        return known[0][1]
    (low, low_ms), (high, high_ms) = known[above - 1], known[above]
    return low_ms + (high_ms - low_ms) * (hidden - low) / (high - low)


def event_ms(result: dict) -> float:
    """Mean of the events; what is not the engine's is scaled from the probe here to that of a run."""
    whole = statistics.mean(stage["event_ms"] for stage in result["stages"] if stage["event_ms"] is not None)
    move = statistics.mean(result["move_ms"])
    return move + (whole - move) * PROBE_SEQUENCES / result["probe_sequences"]


def whole_runs(result: dict) -> dict[str, tuple[float, float]]:
    """(mean milliseconds, mean FLOPs) of a step: as run here, over the recipe's schedule, and with its events."""
    recipe = result["recipe"]
    points, steps = recipe["points"], recipe["steps"]
    milliseconds = sum(interpolated_ms(result["stages"], point["hidden"]) * point["steps"] for point in points)
    flops = sum(point["flops"] * point["steps"] for point in points) / steps
    return {
        "schedule": (schedule_mean(result, step_ms), schedule_mean(result, stage_flops)),
        "recipe": (milliseconds / steps, flops),
        "recipe with events": ((milliseconds + recipe["events"] * event_ms(result)) / steps, flops),
    }


def gemm_share(flops: float, milliseconds: float, result: dict) -> float:
    return flops / (milliseconds / 1e3) / (result["peak"]["flops_per_s"] * result["world_size"])


def share_of(part: str, steps: list[dict[str, float]]) -> float:
    total = summed(steps)
    return total[part] / sum(total.values())


def rows(results: dict[str, dict], config: dict) -> Rows:
    made = Rows("throughput", config)
    for name, result in results.items():
        about = {key: result[key] for key in ("dtype", "micro_batch", "num_sequences", "seq_len", "peak", "operators")}

        def add(metric: str, unit: str, x: str | float, values, name=name, about=about) -> None:
            made.add(name, metric, unit, x, values, **about)

        for stage in result["stages"]:
            _stage_rows(stage, result, add)
        for x, (milliseconds, flops) in whole_runs(result).items():
            add("tokens_per_s", "tokens/s", x, result["tokens"] * 1e3 / milliseconds)
            add("mfu", "ratio", x, gemm_share(flops, milliseconds, result))
        add("explained", "ratio", "schedule", explained(summed(result["run_parts"])))
        add("event_ms", "ms", "schedule", event_ms(result))
        for part in PARTS:
            add(f"share/{part}", "ratio", "schedule", share_of(part, result["run_parts"]))
    return made


def _stage_rows(stage: dict, result: dict, add) -> None:
    x = stage["hidden"]
    add("step_ms", "ms", x, stage["step_ms"])
    add("tokens_per_s", "tokens/s", x, [result["tokens"] * 1e3 / ms for ms in stage["step_ms"]])
    add("mfu", "ratio", x, [gemm_share(stage_flops(stage), ms, result) for ms in stage["step_ms"]])
    add("parameters", "count", x, stage["parameters"])
    add("peak_memory", "bytes", x, stage["peak_bytes"])
    add("explained", "ratio", x, [explained(step) for step in stage["parts"]])
    for part in (*PARTS, OTHER):
        add(f"part/{part}", "ms", x, [step[part] * 1e3 for step in stage["parts"]])
    for part, flops in stage["flops"].items():
        add(f"gflop/{part}", "GFLOP", x, flops / 1e9)
    if stage["event_ms"] is not None:
        add("event_ms", "ms", x, stage["event_ms"])


def report(results: dict[str, dict], args: argparse.Namespace) -> str:
    how = "How numbers are taken: head of `benchmarks/speed/throughput.py`. MFU: model FLOPs over the GEMM peak below."
    return page("Throughput of the training step", how, *(_section(*item, args) for item in results.items()))


def _section(name: str, result: dict, args: argparse.Namespace) -> str:
    peak = result["peak"]
    head = (
        f"{result['world_size']} rank(s); {result['num_sequences']} sequences of {result['seq_len']} tokens per step "
        f"(the recipe's: {result['recipe']['num_sequences']}; optimizer, importance and events weigh less there), "
        f"micro-batch {result['micro_batch']}; {result['dtype']}, {args.deepspeed.name}; GEMM peak of a rank: "
        f"{peak['flops_per_s'] / 1e9:,.0f} GFLOP/s ({peak['source']}). Memory is the process's, "
        f"{result['bytes_before'] / MIB:.0f} MiB before anything was built."
    )
    blocks = [f"## {name}", head, _width_table(result), _whole_schedule(result), _part_table(result)]
    return "\n\n".join([*blocks, _between_table(result), _operators(result), _verdict(result)])


def _width_table(result: dict) -> str:
    columns = ["hidden {}", "parameters {:.2f} M", "step ms {:.1f}", "tokens/s {:,.0f}", "MFU {:.0%}"]
    columns += ["explained {:.1%}", "peak memory MiB {:.0f}", "event ms {:.0f}"]
    lines = []
    for stage in result["stages"]:
        milliseconds = step_ms(stage)
        line = [stage["hidden"], stage["parameters"] / 1e6, milliseconds, result["tokens"] * 1e3 / milliseconds]
        line += [gemm_share(stage_flops(stage), milliseconds, result), explained(summed(stage["parts"]))]
        lines.append([*line, stage["peak_bytes"] / MIB, stage["event_ms"]])
    return table(columns, lines)


def _whole_schedule(result: dict) -> str:
    recipe, tokens = result["recipe"], result["tokens"] * 1e3
    runs = {name: (tokens / ms, gemm_share(flops, ms, result)) for name, (ms, flops) in whole_runs(result).items()}
    full, target = (step_ms(result["stages"][i]) for i in (0, -1))
    return (
        f"Whole cubic schedule, t_f = 0.7 T, as run here: {runs['schedule'][0]:,.0f} tokens/s "
        f"({runs['schedule'][0] * full / tokens:.2f} x full width; target alone: {full / target:.2f} x), "
        f"MFU {runs['schedule'][1]:.0%}. Schedule of the recipe {recipe['name']} ({recipe['steps']} steps, "
        f"{recipe['events']} events), interpolated between the widths above: {runs['recipe'][0]:,.0f} tokens/s, MFU "
        f"{runs['recipe'][1]:.0%}; with its events ({event_ms(result):.0f} ms each, of which "
        f"{statistics.mean(result['move_ms']):.0f} in the engine, the rest scaled from a probe of "
        f"{result['probe_sequences']} sequences to one of {PROBE_SEQUENCES}): "
        f"{runs['recipe with events'][0]:,.0f} tokens/s."
    )


def _part_table(result: dict) -> str:
    stages = result["stages"]
    shown = [stages[0], stages[len(stages) // 2], stages[-1]]
    columns = ["part"]
    for stage in shown:
        columns += [f"hidden {stage['hidden']}: ms {{:.2f}}", "share {:.1%}"]
    lines = []
    for part in (*PARTS, OTHER):
        line = [part]
        for stage in shown:
            line += [summed(stage["parts"])[part] * 1e3 / len(stage["parts"]), share_of(part, stage["parts"])]
        lines.append([*line, share_of(part, result["run_parts"])])
    return table([*columns, "share over the run {:.2%}"], lines)


def _between_table(result: dict) -> str:
    """Full width: what each part does, and what the same FLOPs would take at the GEMM peak."""
    stage, peak = result["stages"][0], result["peak"]["flops_per_s"]
    seconds = {part: total / len(stage["parts"]) for part, total in summed(stage["parts"]).items()}
    flops = {part: stage["flops"].get(part, 0.0) / result["world_size"] for part in seconds}
    seconds["step"], flops["step"] = sum(seconds.values()), sum(flops.values())
    lines = []
    for part, spent in seconds.items():
        rate = flops[part] / spent / 1e9 if flops[part] and spent else None
        at_peak = flops[part] / peak
        lines.append([part, flops[part] / 1e9, spent * 1e3, rate, at_peak * 1e3, (spent - at_peak) * 1e3])
    columns = ["part", "GFLOP {:,.2f}", "ms {:.2f}", "GFLOP/s {:,.0f}", "ms at GEMM peak {:.2f}", "ms beyond {:.2f}"]
    return (
        "Full width, what stands between the step and plain matrix products (FLOPs of one rank, each counted once):\n\n"
        + table(columns, lines)
    )


def _operators(result: dict) -> str:
    shares = result["operators"]
    listed = ", ".join(f"`{name}` {share:.1%}" for name, share in shares["others"])
    return f"Operators at full width (torch.profiler, self time): matrix products {shares['gemm']:.1%}; {listed}."


def _verdict(result: dict) -> str:
    run, full = result["run_parts"], result["stages"][0]
    lines = [f"* explained: {explained(summed(run)):.1%} (wanted: at least {SMALLEST_EXPLAINED:.0%})"]
    for part, limit in LIMITS.items():
        # Behind t_f no gradient is scored any more: importance is shown where it is measured, at full width.
        where, steps = ("at full width", full["parts"]) if part == "measure" else ("over the run", run)
        lines.append(f"* {part}, {where}: {share_of(part, steps):.2%} (wanted: at most {limit:.0%})")
    rate = gemm_share(stage_flops(full), step_ms(full), result)
    lines.append(f"* GEMM rate reached at full width: {rate:.0%} (wanted: at least {SMALLEST_GEMM_SHARE:.0%})")
    return "\n".join(lines)
