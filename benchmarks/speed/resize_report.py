"""The numbers of `resize.py` as rows and as a page."""

from __future__ import annotations

import argparse
import statistics

from benchmarks.harness.rows import Rows, ratios
from benchmarks.harness.run import page
from benchmarks.harness.table import table
from benchmarks.harness.workload import SIZES, stage_of

MEMORY_LIMIT = 1.2
"""fp32 state partitions that an event may take on top, ZeRO 1-3."""
MIB = 2**20
WAYS = ("in place", "new engine")


def numbers_of(result: dict) -> dict[str, tuple[str, list[float]]]:
    """Metric -> unit and one value per event."""
    events = result["events"]
    numbers = {}
    for way in WAYS:
        costs = [event["costs"][way] for event in events]
        numbers[f"{way}: time"] = "ms", [cost["milliseconds"] for cost in costs]
        numbers[f"{way}: extra memory"] = "MiB", [cost["extra_bytes"] / MIB for cost in costs]
        partitions = ratios([cost["extra_bytes"] for cost in costs], [event["state_bytes"] for event in events])
        numbers[f"{way}: extra state partitions"] = "partitions", partitions
    # An event without any growth still moves a page or two: at least 0.1 MiB.
    for metric, least in (("time", 1e-3), ("extra memory", 0.1)):
        new, in_place = (numbers[f"{way}: {metric}"][1] for way in reversed(WAYS))
        numbers[f"ratio of {metric}"] = "x", ratios(new, [max(value, least) for value in in_place])
    numbers["step"] = "ms", result["step_ms"]
    numbers["sent between ranks"] = "MiB", [event["bytes_moved"] / MIB for event in events]
    return numbers


def overview(results: dict[str, dict]) -> str:
    """One line per engine: medians over events, 20th to 80th percentile in brackets."""
    columns = {
        "step ms {:.0f}": "step",
        "in place ms {:.0f}": "in place: time",
        "new engine ms {:.0f}": "new engine: time",
        "time, x {:.1f}": "ratio of time",
        "in place MiB {:.1f}": "in place: extra memory",
        "in place, partitions (worst) {}": "in place: extra state partitions",
        "new engine MiB {:.1f}": "new engine: extra memory",
        "memory, x {:.1f}": "ratio of extra memory",
    }
    lines = []
    for engine_name, result in results.items():
        cells = {metric: values for metric, (_, values) in numbers_of(result).items()}
        partitions = cells["in place: extra state partitions"]
        cells["in place: extra state partitions"] = f"{statistics.median(partitions):.2f} ({max(partitions):.2f})"
        lines.append([engine_name, *(cells[metric] for metric in columns.values())])
    return table(["engine", *columns], lines)


def verdict(results: dict[str, dict]) -> str:
    """Engines of ZeRO 1-3 whose events took more memory than they may."""
    above = []
    for engine_name, result in results.items():
        worst = max(numbers_of(result)["in place: extra state partitions"][1])
        if stage_of(engine_name) > 0 and worst > MEMORY_LIMIT:
            above.append(f"{engine_name} ({worst:.2f})")
    outcome = f"ABOVE IT: {', '.join(above)}" if above else "held by all"
    return f"Limit for ZeRO 1-3: {MEMORY_LIMIT} fp32 state partitions on top of the level before an event: {outcome}."


def by_kind(engine_name: str, result: dict) -> str:
    columns = ["event", "parameters before {:.2f} M", "in place ms {:.0f}", "new engine ms {:.0f}"]
    columns += ["in place MiB {:.1f}", "partitions {:.2f}", "new engine MiB {:.1f}", "MiB between ranks {:.1f}"]
    lines = []
    for event in result["events"]:
        in_place, new = (event["costs"][way] for way in WAYS)
        line = [event["kind"], event["parameters"] / 1e6, in_place["milliseconds"], new["milliseconds"]]
        line += [in_place["extra_bytes"] / MIB, in_place["extra_bytes"] / event["state_bytes"]]
        lines.append([*line, new["extra_bytes"] / MIB, event["bytes_moved"] / MIB])
    return f"## {engine_name}\n\n{table(columns, lines)}"


def report(results: dict[str, dict], refused: dict[str, str], args: argparse.Namespace) -> str:
    how = (
        "New engine: `deepspeed.initialize` at every event, state copied over by hand; the ratios say how much more it "
        "costs. How each number is taken: head of `benchmarks/speed/resize.py`. After every event all state of both "
        "engines was bitwise equal. Medians over events, 20th to 80th percentile in brackets."
    )
    return page(
        "Cost of resize events",
        f"Model: BERT {SIZES['quick' if args.quick else 'standard']}; {args.ranks} ranks.",
        how,
        overview(results),
        # The quick model's whole partition is as small as the chunks that the mover works in.
        "" if args.quick else verdict(results),
        *[f"Not run: {name}: {reason}" for name, reason in refused.items()],
        *[by_kind(name, result) for name, result in results.items()],
    )


def rows(results: dict[str, dict], config: dict) -> Rows:
    made = Rows("resize", config)
    for engine_name, result in results.items():
        for metric, (unit, values) in numbers_of(result).items():
            made.add(engine_name, metric, unit, "all events", values)
        for event in result["events"]:
            for way, cost in event["costs"].items():
                for metric, unit in (("milliseconds", "ms"), ("extra_bytes", "bytes")):
                    made.add(f"{engine_name}, {way}", metric, unit, event["kind"], cost[metric])
    return made
