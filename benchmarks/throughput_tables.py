"""The numbers of `throughput.py` as rows and Markdown."""

from __future__ import annotations

import argparse
import statistics
import sys

from report import environment_text, row
from step_parts import EVENT_PARTS, OTHER, PARTS, explained, summed

MIB = 2**20
STEP_PARTS = tuple(part for part in PARTS if part != "gap")
"""In a step without an event "resize" is the question whether one is due."""
# The acceptance of the project: (part, largest share of the step) over the whole schedule.
LIMITS = {"importance": 0.03, "logging": 0.01, "data wait": 0.01}
SMALLEST_EXPLAINED, SMALLEST_GEMM_SHARE = 0.95, 0.60
PROBE_SEQUENCES = 48
"""Of a run's gap at every event (homodistil/evaluation/gap_probe.py); this benchmark takes fewer."""


def step_ms(stage: dict) -> float:
    return statistics.median(stage["step_ms"])


def schedule_ms(result: dict) -> float:
    """Mean milliseconds of a step over the schedule that was run, from each stage's median."""
    steps = sum(stage["steps"] for stage in result["stages"])
    return sum(step_ms(stage) * stage["steps"] for stage in result["stages"]) / steps


def schedule_flops(result: dict) -> float:
    """Mean FLOPs of a step over the same."""
    steps = sum(stage["steps"] for stage in result["stages"])
    return sum(sum(stage["flops"].values()) * stage["steps"] for stage in result["stages"]) / steps


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


def recipe_ms(result: dict) -> tuple[float, float]:
    """Mean milliseconds of a step over the recipe's schedule, and with its events' cost spread over all steps."""
    recipe = result["recipe"]
    steps = sum(interpolated_ms(result["stages"], point["hidden"]) * point["steps"] for point in recipe["points"])
    events = recipe["events"] * event_ms(result)
    return steps / recipe["steps"], (steps + events) / recipe["steps"]


def recipe_flops(result: dict) -> float:
    points = result["recipe"]["points"]
    return sum(point["flops"] * point["steps"] for point in points) / result["recipe"]["steps"]


def event_ms(result: dict) -> float:
    """Mean of the events: resizing, and the gap on a run's probe."""
    found = [stage["event"] for stage in result["stages"] if stage["event"]]
    scale = PROBE_SEQUENCES / result["probe_sequences"]
    return statistics.mean(event["resize"] + event["gap"] * scale for event in found) * 1e3


def gemm_share(flops: float, milliseconds: float, result: dict) -> float:
    return flops / (milliseconds / 1e3) / (result["peak"]["flops_per_s"] * result["world_size"])


def share_of(part: str, steps: list[dict[str, float]]) -> float:
    total = summed(steps)
    return total[part] / sum(total.values())


def rows(results: dict[str, dict], config: dict) -> list[dict]:
    return [entry for name, result in results.items() for entry in _rows(name, result, config)]


def _rows(name: str, result: dict, config: dict) -> list[dict]:
    config = config | {key: result[key] for key in ("dtype", "micro_batch", "num_sequences", "seq_len", "peak")}
    config["operators"] = result["operators"]
    found = []

    def add(metric: str, unit: str, x: str | float, values: list[float]) -> None:
        found.append(row("throughput", name, metric, unit, x, values, config))

    for stage in result["stages"]:
        _stage_rows(stage, result, add)
    mean_ms, (interpolated, with_events) = schedule_ms(result), recipe_ms(result)
    tokens = result["tokens"] * 1e3
    for x, milliseconds in (("schedule", mean_ms), ("recipe", interpolated), ("recipe with events", with_events)):
        flops = schedule_flops(result) if x == "schedule" else recipe_flops(result)
        add("tokens_per_s", "tokens/s", x, [tokens / milliseconds])
        add("mfu", "ratio", x, [gemm_share(flops, milliseconds, result)])
    add("explained", "ratio", "schedule", [explained(summed(result["run_parts"]))])
    add("event_ms", "ms", "schedule", [event_ms(result)])
    for part in STEP_PARTS:
        add(f"share/{part}", "ratio", "schedule", [share_of(part, result["run_parts"])])
    return found


def _stage_rows(stage: dict, result: dict, add) -> None:
    x, total_flops = stage["hidden"], sum(stage["flops"].values())
    add("step_ms", "ms", x, stage["step_ms"])
    add("tokens_per_s", "tokens/s", x, [result["tokens"] * 1e3 / ms for ms in stage["step_ms"]])
    add("mfu", "ratio", x, [gemm_share(total_flops, ms, result) for ms in stage["step_ms"]])
    add("parameters", "count", x, [stage["parameters"]])
    add("peak_memory", "bytes", x, [stage["peak_bytes"]])
    add("explained", "ratio", x, [explained(step) for step in stage["parts"]])
    for part in (*STEP_PARTS, OTHER):
        add(f"part/{part}", "ms", x, [step[part] * 1e3 for step in stage["parts"]])
    for part, flops in stage["flops"].items():
        add(f"gflop/{part}", "GFLOP", x, [flops / 1e9])
    for part, seconds in (stage["event"] or {}).items():
        add(f"event/{part}", "ms", x, [seconds * 1e3])


def report(results: dict[str, dict], args: argparse.Namespace) -> str:
    parts = [
        "# Throughput of the training step",
        environment_text(),
        f"    {' '.join(['python', 'benchmarks/throughput.py', *sys.argv[1:]])}",
        "How numbers are taken: head of `benchmarks/throughput.py`. MFU: model FLOPs over the GEMM peak named below.",
        *[_section(name, result, args) for name, result in results.items()],
    ]
    return "\n\n".join(parts)


def _section(name: str, result: dict, args: argparse.Namespace) -> str:
    peak = result["peak"]
    head = (
        f"{result['world_size']} rank(s); {result['num_sequences']} sequences of {result['seq_len']} tokens a step "
        f"(the recipe's: {result['recipe']['num_sequences']}; optimizer, importance and events weigh less there), "
        f"micro-batch {result['micro_batch']}; {result['dtype']}, {args.deepspeed.name}; GEMM peak a rank: "
        f"{peak['flops_per_s'] / 1e9:,.0f} GFLOP/s ({peak['source']})."
    )
    head += f" Memory is the process's, {result['bytes_before'] / MIB:.0f} MiB before anything was built."
    blocks = [f"## {name}", head, _width_table(result), _whole_schedule(result), _part_table(result)]
    return "\n\n".join([*blocks, _between_table(result), _operators(result), _verdict(result)])


def _width_table(result: dict) -> str:
    lines = [
        "| hidden | parameters | step ms | tokens/s | MFU | explained | peak memory MiB | event: resize ms | gap ms |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for stage in result["stages"]:
        milliseconds, event = step_ms(stage), stage["event"] or {}
        share = gemm_share(sum(stage["flops"].values()), milliseconds, result)
        cells = [f"{stage['parameters'] / 1e6:.2f} M", f"{milliseconds:.1f}"]
        cells += [f"{result['tokens'] * 1e3 / milliseconds:,.0f}", f"{share:.0%}"]
        cells += [f"{explained(summed(stage['parts'])):.1%}", f"{stage['peak_bytes'] / MIB:.0f}"]
        cells += [f"{event[part] * 1e3:.0f}" if event else "" for part in EVENT_PARTS]
        lines.append(f"| {stage['hidden']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _whole_schedule(result: dict) -> str:
    mean_ms, (interpolated, with_events), recipe = schedule_ms(result), recipe_ms(result), result["recipe"]
    tokens = result["tokens"] * 1e3
    full, target = (step_ms(result["stages"][i]) for i in (0, -1))
    return (
        f"Whole cubic schedule, t_f = 0.7 T, as run here: {tokens / mean_ms:,.0f} tokens/s "
        f"({full / mean_ms:.2f} x full width; target alone: {full / target:.2f} x), "
        f"MFU {gemm_share(schedule_flops(result), mean_ms, result):.0%}. "
        f"Schedule of the recipe {recipe['name']} ({recipe['steps']} steps, {recipe['events']} events), interpolated "
        f"between the widths above: {tokens / interpolated:,.0f} tokens/s, MFU "
        f"{gemm_share(recipe_flops(result), interpolated, result):.0%}; with its events "
        f"({event_ms(result):.0f} ms each, the gap on {PROBE_SEQUENCES} sequences scaled from "
        f"{result['probe_sequences']}): {tokens / with_events:,.0f} tokens/s."
    )


def _part_table(result: dict) -> str:
    stages = result["stages"]
    shown = [stages[0], stages[len(stages) // 2], stages[-1]]
    heads = [f"hidden {stage['hidden']}: ms | share" for stage in shown]
    lines = [f"| part | {' | '.join(heads)} | share over the run |", "|---|" + "--:|" * (2 * len(shown) + 1)]
    for part in (*STEP_PARTS, OTHER):
        cells = []
        for stage in shown:
            milliseconds = summed(stage["parts"])[part] * 1e3 / len(stage["parts"])
            cells += [f"{milliseconds:.2f}", f"{share_of(part, stage['parts']):.1%}"]
        lines.append(f"| {part} | {' | '.join(cells)} | {share_of(part, result['run_parts']):.2%} |")
    return "\n".join(lines)


def _between_table(result: dict) -> str:
    """Full width: what each part does, and what the same FLOPs would take at the GEMM peak."""
    stage, peak = result["stages"][0], result["peak"]["flops_per_s"]
    lines = [
        "Full width, what stands between the step and plain matrix products (FLOPs of one rank, each counted once):",
        "",
        "| part | GFLOP | ms | GFLOP/s | ms at GEMM peak | ms beyond |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    sums, count = summed(stage["parts"]), len(stage["parts"])
    for part in (*STEP_PARTS, OTHER):
        flops = stage["flops"].get(part, 0.0) / result["world_size"]
        lines.append(_between_line(part, flops, sums[part] / count, peak))
    flops = sum(stage["flops"].values()) / result["world_size"]
    return "\n".join([*lines, _between_line("step", flops, sum(sums.values()) / count, peak)])


def _between_line(part: str, flops: float, seconds: float, peak: float) -> str:
    rate = f"{flops / seconds / 1e9:,.0f}" if flops and seconds else ""
    at_peak = flops / peak
    cells = [f"{flops / 1e9:,.2f}", f"{seconds * 1e3:.2f}", rate, f"{at_peak * 1e3:.2f}"]
    return f"| {part} | {' | '.join(cells)} | {(seconds - at_peak) * 1e3:.2f} |"


def _operators(result: dict) -> str:
    found = result["operators"]
    listed = ", ".join(f"`{name}` {share:.1%}" for name, share in found["others"])
    return f"Operators at full width (torch.profiler, self time): matrix products {found['gemm']:.1%}; {listed}."


def _verdict(result: dict) -> str:
    steps, stage = result["run_parts"], result["stages"][0]
    at_full = [step for step in stage["parts"]]
    lines = [f"* explained: {explained(summed(steps)):.1%} (wanted: at least {SMALLEST_EXPLAINED:.0%})"]
    for part, limit in LIMITS.items():
        # Behind t_f no gradient is scored any more: importance is shown where it is measured, at full width.
        where, share = ("at full width", share_of(part, at_full)) if part == "importance" else ("over the run", None)
        share = share_of(part, steps) if share is None else share
        lines.append(f"* {part}, {where}: {share:.2%} (wanted: at most {limit:.0%})")
    rate = gemm_share(sum(stage["flops"].values()), step_ms(stage), result)
    lines.append(f"* GEMM rate reached at full width: {rate:.0%} (wanted: at least {SMALLEST_GEMM_SHARE:.0%})")
    return "\n".join(lines)
