"""What the peers' measurements say, for people and for programs."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator

from benchmarks.harness.rows import Rows, ratios
from benchmarks.harness.run import page
from benchmarks.harness.table import table
from benchmarks.peers.measure import TOLERANCE, Curve
from benchmarks.peers.totals import whole_schedule
from benchmarks.peers.workload import TERMS

MIB, HOURS_PER_MS = 2**20, 1 / 3.6e6
WANTED = {"(a) masks": 2.3, "(b) TextBrewer": 3.0, "(c) plain loop": 3.0}
"""Peer -> how many times longer its step is meant to be than ours."""
WANTED_SCHEDULE = 1.8


def report(results: dict[str, dict], args: argparse.Namespace) -> str:
    first = next(iter(results.values()))
    how = (
        f"Task: {first['task']}. {args.threads} threads each, {args.clock} time. "
        "How numbers are taken and what is compared: heads of `benchmarks/peers/__main__.py` and `workload.py`. "
        "Medians, 20th to 80th percentile in brackets; ratios, taken round by round: how much longer the peer's step "
        "is."
    )
    parts = (part for precision, result in results.items() for part in _of_precision(precision, result))
    return page("homodistil beside its peers", how, *parts)


def _of_precision(precision: str, result: dict) -> Iterator[str]:
    yield f"## {precision}"
    for name, reason in result["missing"].items():
        yield f"Not run: {name}: {reason}"
    yield f"First batch, starting weights: the same loss within {TOLERANCE[precision]:g} (relative, each term)."
    losses = [[label, *(values[name] for name in TERMS)] for label, values in result["terms"].items()]
    yield table(["peer", *(f"{name} {{:.5g}}" for name in TERMS)], losses)
    if "steps" in result:
        yield step_table(result["steps"], result["arithmetic"])
    if "memory" in result:
        memory = {label: (peak["peak"] / MIB, peak["libraries"] / MIB) for label, peak in result["memory"].items()}
        columns = ["peer", "peak resident MiB {:.0f}", "of these libraries {:.0f}", "the rest {:.0f}"]
        yield table(columns, [[label, peak, before, peak - before] for label, (peak, before) in memory.items()])
    if "curve" in result:
        yield curve_table(result["curve"])
    yield verdict(result)


def step_table(steps: dict[str, list[float]], arithmetic: dict[str, float]) -> str:
    """Arithmetic: matrix products alone, as a ratio to ours; what is beyond it is overhead of the peer (or of ours)."""
    ours = next(iter(steps))
    lines = [
        [label, ms, ratios(ms, steps[ours]), arithmetic[label], arithmetic[label] / arithmetic[ours]]
        for label, ms in steps.items()
    ]
    columns = ["peer", "step ms {:.0f}", "times ours {:.2f}", "GFLOP of its products {:.0f}", "times ours {:.2f}"]
    return table(columns, lines)


def curve_table(curve: Curve) -> str:
    labels = list(curve.points[0].others_ms)
    columns = ["after step {}", "hidden {}", "ours ms {:.0f}", *(f"{label}, times ours {{:.2f}}" for label in labels)]
    lines = []
    for point in curve.points:
        event = point.event or {"ms": None, "move_ms": None}
        compared = [ratios(point.others_ms[label], point.ours_ms) for label in labels]
        lines.append([point.step, point.hidden, point.ours_ms, *compared, event["ms"], event["move_ms"]])
    head = f"Along the recipe's schedule of {curve.steps} steps and {len(curve.events)} resize events:"
    made = table([*columns, "event ms {:.0f}", "of it in the engine {:.0f}"], lines)
    return "\n\n".join([head, made, *(_total_text(curve, label) for label in labels)])


def _total_text(curve: Curve, label: str) -> str:
    total = whole_schedule(curve, label)
    parts = (total.other_ms, total.steps_ms, total.moves_ms, total.probes_ms)
    other, steps, moves, probes = (part * HOURS_PER_MS for part in parts)
    return (
        f"Whole schedule, against {label}: {total.ratio:.2f} times ours ({other:.1f} h against {steps:.1f} h of steps "
        f"+ {moves:.2f} h of resizing + {probes:.2f} h of measuring the gap around it); "
        f"{total.ratio_without_probes:.2f} without measuring the gap, whose cost at an event does not grow with the "
        f"batch."
    )


def verdict(result: dict) -> str:
    """What was wanted, and what came out, against each peer's faster setting."""
    lines = []
    for name, limit in WANTED.items():
        labels = _labels(result["arithmetic"], name)
        if "steps" in result and labels:
            faster = min(labels, key=lambda label: statistics.median(result["steps"][label]))
            ratio = statistics.median(_times_ours(result["steps"], faster))
            lines.append([f"step >= {limit} times faster than {name}", f"{ratio:.2f} ({faster})", ratio >= limit])
    if "curve" in result:
        ratio = whole_schedule(result["curve"], next(iter(result["curve"].points[0].others_ms))).ratio
        what = f"whole schedule >= {WANTED_SCHEDULE} times faster than (a) masks"
        lines.append([what, f"{ratio:.2f}", ratio >= WANTED_SCHEDULE])
    if "memory" in result:
        ours, *rivals = result["memory"].items()
        smallest = min((peak["peak"], label) for label, peak in rivals if label.startswith("("))
        text = f"{ours[1]['peak'] / MIB:.0f} MiB, the smallest of theirs {smallest[0] / MIB:.0f} ({smallest[1]})"
        lines.append(["peak memory below each of them", text, ours[1]["peak"] < smallest[0]])
    return table(["wanted", "found {}", ""], [[*line, "yes" if holds else "NO"] for *line, holds in lines])


def _labels(of: dict, name: str) -> list[str]:
    """Those of a peer's settings."""
    return [label for label in of if label == name or (label.startswith(f"{name}, ") and "masked rows" not in label)]


def _times_ours(steps: dict[str, list[float]], label: str) -> list[float]:
    return ratios(steps[label], next(iter(steps.values())))


def rows(results: dict[str, dict], config: dict) -> Rows:
    made = Rows("peers", config)
    for precision, result in results.items():

        def add(label: str, metric: str, unit: str, x, values, task=result["task"]) -> None:
            made.add(label, metric, unit, x, values, **task)

        for label, values in result.get("steps", {}).items():
            add(label, "step", "ms", precision, values)
            add(label, "ratio", "times ours", precision, _times_ours(result["steps"], label))
        for label, work in result["arithmetic"].items():
            add(label, "arithmetic", "GFLOP", precision, work)
        for label, values in result.get("memory", {}).items():
            for metric in ("peak", "libraries"):
                add(label, metric, "bytes", precision, values[metric])
        if "curve" in result:
            _curve_rows(result["curve"], precision, add)
    return made


def _curve_rows(curve: Curve, precision: str, add) -> None:
    for point in curve.points:
        add("homodistil", "step", "ms", point.hidden, point.ours_ms)
        for label, values in point.others_ms.items():
            add(label, "ratio", "times ours", point.hidden, ratios(values, point.ours_ms))
        for metric, value in (point.event or {}).items():
            add("homodistil", f"event_{metric}", "ms", point.hidden, value)
    for label in curve.points[0].others_ms:
        total = whole_schedule(curve, label)
        add(label, "schedule_ratio", "times ours", precision, total.ratio)
        add(label, "schedule_ratio_without_probes", "times ours", precision, total.ratio_without_probes)
