"""The gap study as Markdown, rows of JSON and a figure (PNG and SVG beside the Markdown)."""

from __future__ import annotations

from report import environment_text, result_path, row

from study.gap_plot import draw
from study.gap_study import Course, jumps, mean_over_steps
from study.markdown import DASH, failures, number, plus_minus, table
from study.options import Options
from study.statistics import spread

HEADINGS = [
    "pruning ends",
    "events",
    "sum of KL jumps",
    "largest",
    "mean KL over training",
    "highest KL",
    "final KL (TEST)",
    "final MLM loss (TEST)",
    "CPU s",
]


def report(found: list[Course], options: Options, command: str, errors: dict[str, str]) -> str:
    head = (
        f"# The teacher-student gap over training\n\n{environment_text()}\n\n    {command}\n\n{options.steps} steps, "
        f"lr {options.rates[0]:g} for all, selection without compensation; mean +- standard deviation over seeds "
        f"{', '.join(map(str, options.seeds))}. Jumps, mean and highest KL: on the probe (48 held-out sequences), "
        f"every few steps and before and after every event."
    )
    parts = [head]
    for width in options.widths:
        paths = [path for path in found if path.width == width]
        parts.append(f"## Width: {width}\n\n{table(HEADINGS, [_line(path) for path in paths])}")
        parts.append(f"Distances at the end of training, by layer:\n\n{_layers(paths)}")
        parts.append(f"Events of seed {options.seeds[0]}, KL before -> after:\n\n{_events(paths, options.seeds[0])}")
        if not options.quick and any(path.curves for path in paths):
            name = result_path(f"quality_gap_{width}", "")
            draw(paths, options.seeds[0], name)
            parts.append(f"![KL, hidden and attention distance over training]({name.name}.png)")
    return "\n\n".join([*parts, *failures(errors)])


def _line(path: Course) -> list[str]:
    if not path.runs:
        return [path.end, *[DASH] * (len(HEADINGS) - 1)]
    events, curves, runs = path.events.values(), path.curves.values(), path.runs.values()
    found = [
        ([sum(jumps(lines)) for lines in events], "{:.2f}"),
        ([max(jumps(lines), default=0.0) for lines in events], "{:.2f}"),
        ([mean_over_steps(curve["kl"]) for curve in curves], "{:.3f}"),
        ([max(value for _, value in curve["kl"]) for curve in curves], "{:.2f}"),
        ([run["test"]["kl_to_teacher"] for run in runs], "{:.3f}"),
        ([run["test"]["mlm_loss"] for run in runs], "{:.3f}"),
        ([run["cpu_s"] for run in runs], "{:.0f}"),
    ]
    num_events = "/".join(str(n) for n in dict.fromkeys(len(lines) for lines in events))
    return [path.end, num_events, *(plus_minus(spread(values), form) for values, form in found)]


def _layers(paths: list[Course]) -> str:
    terms = list(dict.fromkeys(term for path in paths for c in path.curves.values() for term in c if "layer" in term))
    lines = [
        [path.end, *(plus_minus(spread([c[term][-1][1] for c in path.curves.values()]), "{:.3f}") for term in terms)]
        for path in paths
        if path.curves
    ]
    return table(["pruning ends", *terms], lines)


def _events(paths: list[Course], seed: int) -> str:
    lines = []
    for path in paths:
        told = [
            f"{e['step']} (hidden {e['widths_after'].get('hidden', e['widths_before'].get('hidden'))}): "
            f"{number(e['gap_before']['kl'], '{:.2f}')} -> {number(e['gap_after']['kl'], '{:.2f}')}"
            for e in path.events.get(seed, [])
        ]
        lines.append(f"* {path.end}: {'; '.join(told) or DASH}")
    return "\n".join(lines)


def rows(found: list[Course], config: dict) -> list[dict]:
    """Final values with a number a seed, and every curve of every seed (thin: a point an evaluation or event)."""
    made = []
    for path in found:
        for metric in ("mlm_loss", "kl_to_teacher") if path.runs else ():
            numbers = [run["test"][metric] for run in path.runs.values()]
            made.append(row("quality_gap", f"{path.end}/{path.width}", metric, "nats", "final", numbers, config))
        for seed, curves in path.curves.items():
            for term, curve in curves.items():
                made.append(row("quality_gap", f"{path.end}/{path.width}", term, "nats", "curve", [curve[-1][1]], {}))
                made[-1] |= {"seed": seed, "curve": [[step, round(value, 5)] for step, value in curve]}
    return made
