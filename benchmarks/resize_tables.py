"""Tables and rows of what benchmarks/resize.py measured."""

from __future__ import annotations

import argparse
import sys

from report import environment_text, row, spread
from workload import SIZES, stage_of

MEMORY_LIMIT = 1.2
"""fp32 state partitions that an event may take on top, ZeRO 1-3."""
MIB = 2**20


def numbers_of(result: dict) -> dict[str, tuple[str, list[float]]]:
    """Metric -> unit and one value an event."""
    events = result["events"]
    found = {}
    for way in ("in place", "new engine"):
        found[f"{way}: time"] = "ms", [e["costs"][way]["milliseconds"] for e in events]
        found[f"{way}: extra memory"] = "MiB", [e["costs"][way]["extra_bytes"] / MIB for e in events]
        states = [e["costs"][way]["extra_bytes"] / e["state_bytes"] for e in events]
        found[f"{way}: extra state partitions"] = "partitions", states
    for metric in ("time", "extra memory"):
        # An event without any growth still moves a page or two.
        pairs = zip(found[f"new engine: {metric}"][1], found[f"in place: {metric}"][1], strict=True)
        found[f"ratio of {metric}"] = "x", [new / max(own, 1e-3 if metric == "time" else 0.1) for new, own in pairs]
    found["step"] = "ms", result["step_ms"]
    found["sent between ranks"] = "MiB", [e["bytes_moved"] / MIB for e in events]
    return found


def overview(results: dict[str, dict]) -> str:
    """One line an engine: medians over events, 20th to 80th percentile in brackets."""
    lines = [
        "| engine | step ms | in place ms | new engine ms | time, x | in place MiB | in place, partitions (worst) | "
        "new engine MiB | memory, x |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for engine_name, result in results.items():
        numbers = numbers_of(result)

        def cell(metric: str, digits: int = 0, numbers=numbers) -> str:
            low, middle, high = spread(numbers[metric][1])
            return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

        partitions = numbers["in place: extra state partitions"][1]
        cells = [cell("step"), cell("in place: time"), cell("new engine: time"), cell("ratio of time", 1)]
        cells += [cell("in place: extra memory", 1), f"{spread(partitions)[1]:.2f} ({max(partitions):.2f})"]
        cells += [cell("new engine: extra memory", 1), cell("ratio of extra memory", 1)]
        lines.append(f"| {engine_name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(results: dict[str, dict]) -> str:
    """Engines of ZeRO 1-3 whose events took more memory than they may."""
    above = []
    for engine_name, result in results.items():
        worst = max(numbers_of(result)["in place: extra state partitions"][1])
        if stage_of(engine_name) > 0 and worst > MEMORY_LIMIT:
            above.append(f"{engine_name} ({worst:.2f})")
    found = f"ABOVE IT: {', '.join(above)}" if above else "held by all"
    return f"Limit for ZeRO 1-3: {MEMORY_LIMIT} fp32 state partitions on top of the level before an event: {found}."


def by_kind(engine_name: str, result: dict) -> str:
    lines = [
        f"## {engine_name}",
        "",
        "| event | parameters before | in place ms | new engine ms | in place MiB | partitions | new engine MiB | "
        "MiB between ranks |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for event in result["events"]:
        own, new = event["costs"]["in place"], event["costs"]["new engine"]
        lines.append(
            f"| {event['kind']} | {event['parameters'] / 1e6:.2f} M | {own['milliseconds']:.0f} "
            f"| {new['milliseconds']:.0f} | {own['extra_bytes'] / MIB:.1f} "
            f"| {own['extra_bytes'] / event['state_bytes']:.2f} | {new['extra_bytes'] / MIB:.1f} "
            f"| {event['bytes_moved'] / MIB:.1f} |"
        )
    return "\n".join(lines)


def report(results: dict[str, dict], refused: dict[str, str], args: argparse.Namespace) -> str:
    parts = [
        "# Cost of resize events",
        environment_text(),
        f"Model: BERT {SIZES['quick' if args.quick else 'standard']}; {args.ranks} ranks.",
        f"    {' '.join(['python', 'benchmarks/resize.py', *sys.argv[1:]])}",
        "New engine: `deepspeed.initialize` at every event, state copied over by hand; the ratios say how much more it "
        "costs. How each number is taken: head of `benchmarks/resize.py`. After every event all state of both engines "
        "was bitwise equal. Medians over events, 20th to 80th percentile in brackets.",
        overview(results),
        # The quick model's whole partition is as small as the chunks that the mover works in.
        *([] if args.quick else [verdict(results)]),
        *[f"Not run: {name}: {reason}" for name, reason in refused.items()],
        *[by_kind(name, result) for name, result in results.items()],
    ]
    return "\n\n".join(parts)


def rows(results: dict[str, dict], config: dict) -> list[dict]:
    found = []
    for engine_name, result in results.items():
        for metric, (unit, values) in numbers_of(result).items():
            found.append(row("resize", engine_name, metric, unit, "all events", values, config))
        for event in result["events"]:
            for way, cost in event["costs"].items():
                for metric, unit in (("milliseconds", "ms"), ("extra_bytes", "bytes")):
                    found.append(
                        row("resize", f"{engine_name}, {way}", metric, unit, event["kind"], [cost[metric]], config)
                    )
    return found
