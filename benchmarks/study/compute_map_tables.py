"""The map as Markdown and as rows of JSON."""

from __future__ import annotations

from report import environment_text, row

from study.compute_map import ENDS, Cell, Map
from study.markdown import DASH, failures, number, plus_minus, table
from study.options import Options
from study.statistics import Spread, paired, spread

METRICS = {"mlm_loss": "held-out MLM loss", "kl_to_teacher": "KL to teacher"}
HEADINGS = [
    "cell",
    "gradual: t_f, lr",
    "one-shot: lr",
    "gradual",
    "one-shot, equal steps",
    "gradual - one-shot",
    "one-shot, equal compute (steps)",
    "gradual - one-shot",
    "seeds",
]


def report(found: Map, options: Options, command: str, errors: dict[str, str]) -> str:
    rates = ", ".join(f"{rate:g}" for rate in options.rates)
    head = (
        f"# Where gradual pruning beats one-shot\n\n{environment_text()}\n\n    {command}\n\nSame losses, selection "
        f"without compensation. In each cell gradual (end of pruning {' or '.join(f'{end:g}' for end in ENDS)} of the "
        f"steps) and one-shot have their own best rate of {rates}, and of one further where the best was at an end; "
        f"chosen on the VALIDATION half, first seed. Reported: TEST half, mean +- standard deviation over seeds; "
        f"differences are paired by seed, negative: gradual is better, * where it is more than twice its deviation. "
        f"Equal compute: one-shot with as many further steps as gradual costs more, by CPU seconds or FLOPs, whichever "
        f"gives one-shot more, rounded up; at its rate of equal steps."
    )
    parts = [head]
    for metric, heading in METRICS.items():
        lines = [_line(cell, metric) for cell in found.cells]
        parts.append(f"## {heading[0].upper()}{heading[1:]}\n\n{table(HEADINGS, lines)}")
    if found.left_out:
        listed = "\n".join(f"* {what}" for what in found.left_out)
        parts.append(f"## Left out (--budget-minutes {options.budget_minutes:g})\n\n{listed}")
    return "\n\n".join([*parts, *failures(errors)])


def _line(cell: Cell, metric: str) -> list[str]:
    gradual, one_shot = cell.gradual, cell.one_shot
    longer = _of(cell.longer, metric)
    return [
        cell.label,
        f"{gradual.variant or DASH}, {number(gradual.rate, '{:g}')}",
        number(one_shot.rate, "{:g}"),
        plus_minus(_of(gradual.runs, metric), "{:.3f}"),
        plus_minus(_of(one_shot.runs, metric), "{:.3f}"),
        _difference(gradual.runs, one_shot.runs, metric),
        f"{plus_minus(longer, '{:.3f}')} ({cell.longer_steps})" if longer else DASH,
        _difference(gradual.runs, cell.longer, metric),
        str(len(gradual.runs)),
    ]


def _of(runs: dict[int, dict], metric: str) -> Spread | None:
    return spread([run["test"][metric] for run in runs.values()]) if runs else None


def difference(runs: dict[int, dict], others: dict[int, dict], metric: str) -> Spread | None:
    """Paired, over the seeds that both have."""
    common = [seed for seed in runs if seed in others]
    if not common:
        return None
    return paired(*([side[seed]["test"][metric] for seed in common] for side in (runs, others)))


def _difference(runs: dict[int, dict], others: dict[int, dict], metric: str) -> str:
    found = difference(runs, others, metric)
    mark = " *" if found is not None and abs(found.mean) > 2 * found.sd else ""
    return plus_minus(found, "{:+.3f}") + mark


def rows(found: Map, config: dict) -> list[dict]:
    """`x` is the cell; `values` has a number a seed."""
    made = []
    for cell in found.cells:
        forms = {"gradual": cell.gradual.runs, "one_shot": cell.one_shot.runs, "one_shot_equal_compute": cell.longer}
        about = config | {"width": cell.width, "steps": cell.steps, "longer_steps": cell.longer_steps}
        about |= {"t_f": cell.gradual.variant, "rates": [cell.gradual.rate, cell.one_shot.rate]}
        about |= {"validation": cell.gradual.validation | cell.one_shot.validation, "left_out": found.left_out}
        for name, runs in forms.items():
            for metric in METRICS if runs else ():
                numbers = [run["test"][metric] for run in runs.values()]
                made.append(row("quality_map", name, metric, "nats", cell.label, numbers, about) | {"values": numbers})
            if runs:
                cost = [run["cpu_s"] for run in runs.values()]
                made.append(row("quality_map", name, "cpu_s", "s", cell.label, cost, about) | {"values": cost})
    return made
