"""What the peers' measurements say, for people and for programs."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator

from benchmarks.peers.measure import TOLERANCE, Curve
from benchmarks.peers.totals import Total, interpolate, whole_schedule
from benchmarks.peers.workload import TERMS
from benchmarks.report import environment_text, row, spread

MIB = 2**20
WANTED = {"(a) masks": 2.3, "(b) TextBrewer": 3.0, "(c) plain loop": 3.0}
"""Peer -> how many times longer its step is meant to be than ours."""
WANTED_SCHEDULE = 1.8


def report(results: dict[str, dict], args) -> str:
    first = next(iter(results.values()))
    parts = [
        "# homodistil beside its peers",
        environment_text(),
        f"    {' '.join(['python -m benchmarks.peers', *sys.argv[1:]])}",
        f"Task: {first['task']}. {args.threads} threads each, homodistil on {args.ranks} rank(s), {args.clock} time. "
        "How numbers are taken and what is compared: heads of `benchmarks/peers/__main__.py` and `workload.py`. "
        "Medians, 20th to 80th percentile in brackets; ratios, taken round by round: how much longer the peer's step "
        "is.",
        *(part for precision, found in results.items() for part in _of_precision(precision, found)),
    ]
    return "\n\n".join(parts)


def _of_precision(precision: str, found: dict) -> Iterator[str]:
    yield f"## {precision}"
    for name, reason in found["missing"].items():
        yield f"Not run: {name}: {reason}"
    yield loss_table(found["terms"], precision)
    if "steps" in found:
        yield step_table(found["steps"], found["arithmetic"])
    if "memory" in found:
        yield memory_table(found["memory"])
    if "curve" in found:
        yield curve_table(found["curve"])
    if "run" in found:
        yield run_text(found)
    yield verdict(found)


def loss_table(terms: dict[str, dict[str, float]], precision: str) -> str:
    lines = [
        f"First batch, starting weights: the same loss within {TOLERANCE[precision]:g} (relative, each term).",
        "",
        f"| peer | {' | '.join(TERMS)} |",
        "|---|" + "--:|" * len(TERMS),
    ]
    for label, values in terms.items():
        lines.append(f"| {label} | {' | '.join(f'{values[name]:.5g}' for name in TERMS)} |")
    return "\n".join(lines)


def step_table(steps: dict[str, list[float]], arithmetic: dict[str, float]) -> str:
    """Arithmetic: matrix products alone, as a ratio to ours; what is beyond it is overhead of the peer (or of ours)."""
    ours = next(iter(steps))
    lines = [
        "| peer | step ms | times ours | GFLOP of its products | times ours |",
        "|---|--:|--:|--:|--:|",
    ]
    for label, values in steps.items():
        ratio = _with_spread(_ratios(steps, label), "{:.2f}")
        work = arithmetic[label]
        lines.append(
            f"| {label} | {_with_spread(values, '{:.0f}')} | {ratio} | {work:.0f} | {work / arithmetic[ours]:.2f} |"
        )
    return "\n".join(lines)


def memory_table(memory: dict[str, dict[str, float]]) -> str:
    lines = ["| peer | peak resident MiB | of these libraries | the rest |", "|---|--:|--:|--:|"]
    for label, found in memory.items():
        peak, libraries = found["peak"] / MIB, found["libraries"] / MIB
        lines.append(f"| {label} | {peak:.0f} | {libraries:.0f} | {peak - libraries:.0f} |")
    return "\n".join(lines)


def curve_table(curve: Curve) -> str:
    labels = list(curve.points[0].others_ms)
    lines = [
        f"Along the recipe's schedule of {curve.steps} steps and {len(curve.events)} resize events:",
        "",
        f"| after step | hidden | ours ms | {' | '.join(f'{label}, times ours' for label in labels)} "
        "| event ms | of it in the engine |",
        "|--:|--:|--:|" + "--:|" * (len(labels) + 2),
    ]
    for point in curve.points:
        ratios = " | ".join(_with_spread(_divided(point.others_ms[label], point.ours_ms), "{:.2f}") for label in labels)
        event = f"{point.event['ms']:.0f} | {point.event['move_ms']:.0f}" if point.event else " | "
        lines.append(
            f"| {point.step} | {point.hidden} | {_with_spread(point.ours_ms, '{:.0f}')} | {ratios} | {event} |"
        )
    for label in labels:
        lines += ["", _total_text(label, whole_schedule(curve, label))]
    return "\n".join(lines)


def _total_text(label: str, total: Total) -> str:
    hours = 1 / 3.6e6
    return (
        f"Whole schedule, against {label}: {total.ratio:.2f} times ours ({total.other_ms * hours:.1f} h against "
        f"{total.steps_ms * hours:.1f} h of steps + {total.moves_ms * hours:.2f} h of resizing + "
        f"{total.probes_ms * hours:.2f} h of measuring the gap around it); {total.ratio_without_probes:.2f} without "
        f"measuring the gap, whose cost an event does not grow with the batch."
    )


def run_text(found: dict) -> str:
    run = found["run"]
    ours, other, events = run["ours_ms"], run["other_ms"], run["events"]
    quiet = [i for i in range(len(ours)) if i + 2 not in events]  # the first timed step is number 2
    without = sum(other[i] for i in quiet) / sum(ours[i] for i in quiet)
    text = (
        f"A real run of {len(ours)} steps with {len(events)} resize events, many more a step than the recipe's: ours "
        f"{sum(ours) / 1e3:.1f} s, (a) {sum(other) / 1e3:.1f} s: {sum(other) / sum(ours):.2f} times ours, events "
        f"included; {without:.2f} over the {len(quiet)} steps without one"
    )
    if "curve" in found:
        text += f" ({_predicted(found['curve'], run, quiet):.2f} from the table above)"
    return text + "."


def _predicted(curve: Curve, run: dict, which: list[int]) -> float:
    label = next(iter(curve.points[0].others_ms))
    points = sorted(curve.points, key=lambda point: point.hidden)
    widths = [point.hidden for point in points]
    ratios = [statistics.median(_divided(point.ours_ms, point.others_ms[label])) for point in points]
    return len(which) / sum(interpolate(widths, ratios, run["hidden"][i]) for i in which)


def verdict(found: dict) -> str:
    """What was wanted, and what came out, against each peer's faster setting."""
    lines = ["| wanted | found | |", "|---|--:|---|"]

    def line(what: str, value: str, holds: bool) -> None:
        lines.append(f"| {what} | {value} | {'yes' if holds else 'NO'} |")

    for name, limit in WANTED.items():
        labels = _labels(found["arithmetic"], name)
        if "steps" in found and labels:
            faster = min(labels, key=lambda label: statistics.median(found["steps"][label]))
            ratio = statistics.median(_ratios(found["steps"], faster))
            line(f"step >= {limit} times faster than {name}", f"{ratio:.2f} ({faster})", ratio >= limit)
    if "curve" in found:
        ratio = whole_schedule(found["curve"], next(iter(found["curve"].points[0].others_ms))).ratio
        line(f"whole schedule >= {WANTED_SCHEDULE} times faster than (a) masks", f"{ratio:.2f}", ratio >= 1.8)
    if "memory" in found:
        ours, *others = found["memory"].items()
        smallest = min((peak["peak"], label) for label, peak in others if label.startswith("("))
        text = f"{ours[1]['peak'] / MIB:.0f} MiB, the smallest of theirs {smallest[0] / MIB:.0f} ({smallest[1]})"
        line("peak memory below each of them", text, ours[1]["peak"] < smallest[0])
    return "\n".join(lines)


def _labels(of: dict, name: str) -> list[str]:
    """Those of a peer's settings."""
    return [label for label in of if label == name or (label.startswith(f"{name}, ") and "masked rows" not in label)]


def rows(results: dict[str, dict], config: dict) -> list[dict]:
    entries = []
    for precision, found in results.items():
        task = config | found["task"]

        def add(label, metric, unit, x, values, task=task):
            entries.append(row("peers", label, metric, unit, x, values, task))

        for label, values in found.get("steps", {}).items():
            add(label, "step", "ms", precision, values)
            add(label, "ratio", "times ours", precision, _ratios(found["steps"], label))
        for label, work in found["arithmetic"].items():
            add(label, "arithmetic", "GFLOP", precision, [work])
        for label, values in found.get("memory", {}).items():
            for metric in ("peak", "libraries"):
                add(label, metric, "bytes", precision, [values[metric]])
        for point in found["curve"].points if "curve" in found else []:
            add("homodistil", "step", "ms", point.hidden, point.ours_ms)
            for label, values in point.others_ms.items():
                add(label, "ratio", "times ours", point.hidden, _divided(values, point.ours_ms))
            for metric, value in (point.event or {}).items():
                add("homodistil", f"event_{metric}", "ms", point.hidden, [value])
        for label in found["curve"].points[0].others_ms if "curve" in found else []:
            total = whole_schedule(found["curve"], label)
            add(label, "schedule_ratio", "times ours", precision, [total.ratio])
            add(label, "schedule_ratio_without_probes", "times ours", precision, [total.ratio_without_probes])
        if "run" in found:
            ratio = sum(found["run"]["other_ms"]) / sum(found["run"]["ours_ms"])
            add("(a) masks", "short_run_ratio", "times ours", precision, [ratio])
    return entries


def _ratios(steps: dict[str, list[float]], label: str) -> list[float]:
    return _divided(steps[label], next(iter(steps.values())))


def _divided(values: list[float], ours: list[float]) -> list[float]:
    return [a / b for a, b in zip(values, ours, strict=True)]


def _with_spread(values: list[float], form: str) -> str:
    low, middle, high = (form.format(value) for value in spread(values))
    return f"{middle} [{low}, {high}]"
