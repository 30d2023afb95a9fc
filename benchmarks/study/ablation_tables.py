"""The ablations as Markdown and as rows of JSON."""

from __future__ import annotations

from report import environment_text, row

from study.ablation import Ablation, Variant
from study.comparison import Entry
from study.comparison_tables import METRICS
from study.markdown import DASH, failures, number, plus_minus, table
from study.options import Options
from study.statistics import Spread, paired, spread

HEADINGS = [
    "variant",
    "held-out MLM loss",
    "difference",
    "KL to teacher",
    "difference",
    "masked top-1",
    "CPU s",
    "seeds",
]


def report(found: Ablation, options: Options, command: str, errors: dict[str, str]) -> str:
    head = (
        f"# Ablations of {options.base}\n\n{environment_text()}\n\n    {command}\n\n"
        f"{options.steps} steps; one change at a time, at the base's own best rate; TEST half; mean +- standard "
        f"deviation over seeds {', '.join(map(str, options.seeds))}; differences to the base are paired by seed (same "
        f"data, same masks). A difference counts where it is more than twice its deviation (marked *). A variant that "
        f"is the base itself, or means nothing for it, is left out."
    )
    parts = [_width_part(found, width) for width in found.base]
    return "\n\n".join([head, *parts, *failures(errors)])


def _width_part(found: Ablation, width: str) -> str:
    base = found.base[width]
    lines = [_line(base, base, f"base: {base.arm.label}")]
    group = None
    for variant in found.variants:
        if variant.width == width:
            if variant.group != group:
                group = variant.group
                lines.append([f"**{group}**", *[""] * (len(HEADINGS) - 1)])
            lines.append(_line(variant, base, variant.name))
    refused = [f"* {v.name}: refused. {v.refused}" for v in found.variants if v.width == width and v.refused]
    title = f"## Width: {width}, lr {number(base.rate, '{:g}')}"
    return "\n\n".join([title, table(HEADINGS, lines), *(["\n".join(refused)] if refused else [])])


def _line(what: Variant | Entry, base: Entry, name: str) -> list[str]:
    if not what.runs:
        return [name, *[DASH] * (len(HEADINGS) - 1)]
    cells = []
    for metric in ("mlm_loss", "kl_to_teacher"):
        cells += [plus_minus(_of(what, metric), "{:.3f}"), _difference(what, base, metric)]
    cpu = spread([found["cpu_s"] for found in what.runs.values()])
    return [name, *cells, plus_minus(_of(what, "masked_top1"), "{:.4f}"), f"{cpu.mean:.0f}", str(len(what.runs))]


def _of(what: Variant | Entry, metric: str) -> Spread:
    return spread([found["test"][metric] for found in what.runs.values()])


def difference(what: Variant | Entry, base: Entry, metric: str) -> Spread | None:
    """To the base, over the seeds that both have. None for the base itself."""
    common = [seed for seed in what.runs if seed in base.runs]
    if what is base or not common:
        return None
    return paired(*([side.runs[seed]["test"][metric] for seed in common] for side in (what, base)))


def _difference(what: Variant | Entry, base: Entry, metric: str) -> str:
    found = difference(what, base, metric)
    mark = " *" if found is not None and abs(found.mean) > 2 * found.sd else ""
    return plus_minus(found, "{:+.3f}") + mark


def rows(found: Ablation, config: dict) -> list[dict]:
    """`x` is the width; `values` has a number a seed; `difference` is the paired one to the base."""
    made = []
    for what in (*found.base.values(), *found.variants):
        base = found.base[what.width]
        name = f"{what.group}: {what.name}" if isinstance(what, Variant) else "base"
        for metric, about in METRICS.items() if what.runs else ():
            numbers = [run["test"][metric] for run in what.runs.values()]
            made.append(
                row("quality_ablate", name, metric, about.unit, what.width, numbers, config | {"rate": base.rate})
            )
            change = difference(what, base, metric)
            made[-1] |= {"values": numbers, "difference": change and {"mean": change.mean, "sd": change.sd}}
    return made
