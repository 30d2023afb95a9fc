"""The ablations as a page and as rows."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page
from benchmarks.harness.table import cell, table
from experiments.quality.ablation import Ablation, Variant
from experiments.quality.comparison import Entry
from experiments.quality.comparison_tables import METRICS, failures
from experiments.quality.options import Options
from experiments.quality.statistics import difference, marked, over_seeds, spread

COLUMNS = ["variant", "held-out MLM loss {:.3f}", "difference {}", "KL to teacher {:.3f}", "difference {}"]
COLUMNS += ["masked top-1 {:.4f}", "CPU s {:.0f}", "seeds {}"]


def report(study: Ablation, options: Options, errors: Mapping[str, str]) -> str:
    how = (
        f"{options.steps} steps; one change at a time, at the base's own best rate; TEST half; mean +- standard "
        f"deviation over seeds {', '.join(map(str, options.seeds))}; differences to the base are paired by seed (same "
        f"data, same masks). A difference counts where it is more than twice its deviation (marked *). A variant that "
        f"is the base itself, or means nothing for it, is left out."
    )
    parts = [_width_part(study, width) for width in study.base]
    return page(f"Ablations of {options.base}", how, *parts, failures(errors))


def _width_part(study: Ablation, width: str) -> str:
    base = study.base[width]
    lines = [_line(base, base, f"base: {base.arm.label}")]
    group = None
    for variant in study.variants:
        if variant.width == width:
            if variant.group != group:
                group = variant.group
                lines.append([f"**{group}**", *[""] * (len(COLUMNS) - 1)])
            lines.append(_line(variant, base, variant.name))
    refused = [f"* {v.name}: refused. {v.refused}" for v in study.variants if v.width == width and v.refused]
    title = f"## Width: {width}, lr {cell(base.rate, '{:g}')}"
    return "\n\n".join([title, table(COLUMNS, lines), *(["\n".join(refused)] if refused else [])])


def _line(what: Variant | Entry, base: Entry, name: str) -> list:
    if not what.runs:
        return [name, *[None] * (len(COLUMNS) - 1)]
    line = [name]
    for metric in ("mlm_loss", "kl_to_teacher"):
        line += [over_seeds(what.runs, metric), marked(difference(what.runs, base.runs, metric))]
    cpu = spread([run["cpu_s"] for run in what.runs.values()])
    return [*line, over_seeds(what.runs, "masked_top1"), cpu.mean, len(what.runs)]


def rows(study: Ablation, config: dict) -> Rows:
    """`x` is the width; `values` has a number per seed; `difference` is the paired one to the base."""
    made = Rows("quality_ablate", config)
    for what in (*study.base.values(), *study.variants):
        base = study.base[what.width]
        name = f"{what.group}: {what.name}" if isinstance(what, Variant) else "base"
        for metric, about in METRICS.items() if what.runs else ():
            numbers = [run["test"][metric] for run in what.runs.values()]
            row = made.add(name, metric, about.unit, what.width, numbers, rate=base.rate)
            change = difference(what.runs, base.runs, metric)
            row |= {"values": numbers, "difference": change and {"mean": change.mean, "sd": change.sd}}
    return made
