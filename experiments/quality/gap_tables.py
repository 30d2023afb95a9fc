"""The gap study as a page, rows and a figure (docs/figures)."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.harness.environment import ROOT
from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page, result_path
from benchmarks.harness.table import DASH, cell, table
from experiments.quality.comparison_tables import failures
from experiments.quality.gap_plot import draw
from experiments.quality.gap_study import Course, jumps, mean_over_steps
from experiments.quality.options import Options
from experiments.quality.statistics import over_seeds, spread

COLUMNS = ["pruning ends", "events {}", "sum of KL jumps {:.2f}", "largest {:.2f}", "mean KL over training {:.3f}"]
COLUMNS += ["highest KL {:.2f}", "final KL (TEST) {:.3f}", "final MLM loss (TEST) {:.3f}", "CPU s {:.0f}"]
FIGURES = ROOT / "docs" / "figures"


def report(courses: list[Course], options: Options, errors: Mapping[str, str]) -> str:
    how = (
        f"{options.steps} steps, lr {options.rates[0]:g} for all, selection without compensation; mean +- standard "
        f"deviation over seeds {', '.join(map(str, options.seeds))}. Jumps, mean and highest KL: on the probe (48 "
        f"held-out sequences), every few steps and before and after every event."
    )
    parts = []
    for width in options.widths:
        paths = [path for path in courses if path.width == width]
        parts.append(f"## Width: {width}\n\n{table(COLUMNS, map(_line, paths))}")
        parts.append(f"Distances at the end of training, by layer:\n\n{_layers(paths)}")
        parts.append(f"Events of seed {options.seeds[0]}, KL before -> after:\n\n{_events(paths, options.seeds[0])}")
        if not options.quick and any(path.curves for path in paths):
            name = FIGURES / result_path(f"quality_gap_{width}", "").name
            draw(paths, options.seeds[0], name)
            parts.append(f"![KL, hidden and attention distance over training](../../docs/figures/{name.name}.png)")
    return page("The teacher-student gap over training", how, *parts, failures(errors))


def _line(path: Course) -> list:
    if not path.runs:
        return [path.end, *[None] * (len(COLUMNS) - 1)]
    events, curves = path.events.values(), path.curves.values()
    num_events = "/".join(str(n) for n in dict.fromkeys(len(lines) for lines in events))
    return [
        path.end,
        num_events,
        spread([sum(jumps(lines)) for lines in events]),
        spread([max(jumps(lines), default=0.0) for lines in events]),
        spread([mean_over_steps(curve["kl"]) for curve in curves]),
        spread([max(value for _, value in curve["kl"]) for curve in curves]),
        over_seeds(path.runs, "kl_to_teacher"),
        over_seeds(path.runs, "mlm_loss"),
        spread([run["cpu_s"] for run in path.runs.values()]),
    ]


def _layers(paths: list[Course]) -> str:
    terms = list(dict.fromkeys(term for path in paths for c in path.curves.values() for term in c if "layer" in term))
    lines = [
        [path.end, *(spread([curves[term][-1][1] for curves in path.curves.values()]) for term in terms)]
        for path in paths
        if path.curves
    ]
    return table(["pruning ends", *(f"{term} {{:.3f}}" for term in terms)], lines)


def _events(paths: list[Course], seed: int) -> str:
    lines = []
    for path in paths:
        events = [
            f"{e['step']} (hidden {e['widths_after'].get('hidden', e['widths_before'].get('hidden'))}): "
            f"{cell(e['gap_before']['kl'], '{:.2f}')} -> {cell(e['gap_after']['kl'], '{:.2f}')}"
            for e in path.events.get(seed, [])
        ]
        lines.append(f"* {path.end}: {'; '.join(events) or DASH}")
    return "\n".join(lines)


def rows(courses: list[Course], config: dict) -> Rows:
    """Final values with a number per seed, and every curve of every seed (a point per evaluation or event)."""
    made = Rows("quality_gap", config)
    for path in courses:
        variant = f"{path.end}/{path.width}"
        for metric in ("mlm_loss", "kl_to_teacher") if path.runs else ():
            made.add(variant, metric, "nats", "final", [run["test"][metric] for run in path.runs.values()])
        for seed, curves in path.curves.items():
            for term, curve in curves.items():
                row = made.add(variant, term, "nats", "curve", curve[-1][1])
                row |= {"config": {}, "seed": seed, "curve": [[step, round(value, 5)] for step, value in curve]}
    return made
