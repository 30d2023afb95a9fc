"""The map as a page and as rows."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page
from benchmarks.harness.table import DASH, cell, table
from experiments.quality.comparison_tables import failures
from experiments.quality.compute_map import ENDS, Cell, Map
from experiments.quality.options import Options
from experiments.quality.statistics import difference, marked, over_seeds

METRICS = {"mlm_loss": "Held-out MLM loss", "kl_to_teacher": "KL to teacher"}
COLUMNS = ["cell", "gradual: t_f, lr {}", "one-shot: lr {:g}", "gradual {:.3f}", "one-shot, equal steps {:.3f}"]
COLUMNS += ["gradual - one-shot {}", "one-shot, equal compute (steps) {}", "gradual - one-shot {}", "seeds {}"]


def report(study: Map, options: Options, errors: Mapping[str, str]) -> str:
    how = (
        f"Same losses, selection without compensation. In each cell gradual (end of pruning "
        f"{' or '.join(f'{end:g}' for end in ENDS)} of the steps) and one-shot have their own best rate of "
        f"{', '.join(f'{rate:g}' for rate in options.rates)}, and of one further where the best was at an end; "
        f"chosen on the VALIDATION half, first seed. Reported: TEST half, mean +- standard deviation over seeds; "
        f"differences are paired by seed, negative: gradual is better, * where it is more than twice its deviation. "
        f"Equal compute: one-shot with as many further steps as gradual costs more, by CPU seconds or FLOPs, whichever "
        f"gives one-shot more, rounded up; at its rate of equal steps."
    )
    parts = [f"## {title}\n\n{table(COLUMNS, [_line(c, m) for c in study.cells])}" for m, title in METRICS.items()]
    if study.left_out:
        listed = "\n".join(f"* {what}" for what in study.left_out)
        parts.append(f"## Left out (--budget-minutes {options.budget_minutes:g})\n\n{listed}")
    return page("Where gradual pruning beats one-shot", how, *parts, failures(errors))


def _line(which: Cell, metric: str) -> list:
    gradual, one_shot = which.gradual, which.one_shot
    longer = over_seeds(which.longer, metric)
    return [
        which.label,
        f"{gradual.variant or DASH}, {cell(gradual.rate, '{:g}')}",
        one_shot.rate,
        over_seeds(gradual.runs, metric),
        over_seeds(one_shot.runs, metric),
        marked(difference(gradual.runs, one_shot.runs, metric)),
        f"{cell(longer, '{:.3f}')} ({which.longer_steps})" if longer else None,
        marked(difference(gradual.runs, which.longer, metric)),
        len(gradual.runs),
    ]


def rows(study: Map, config: dict) -> Rows:
    """`x` is the cell; `values` has a number per seed."""
    made = Rows("quality_map", config)
    for which in study.cells:
        forms = {"gradual": which.gradual.runs, "one_shot": which.one_shot.runs}
        forms["one_shot_equal_compute"] = which.longer
        about = {"width": which.width, "steps": which.steps, "longer_steps": which.longer_steps}
        about |= {"t_f": which.gradual.variant, "rates": [which.gradual.rate, which.one_shot.rate]}
        about |= {"validation": which.gradual.validation | which.one_shot.validation, "left_out": study.left_out}
        for name, runs in forms.items():
            numbers = {metric: [run["test"][metric] for run in runs.values()] for metric in METRICS}
            numbers["cpu_s"] = [run["cpu_s"] for run in runs.values()]
            for metric, values in numbers.items() if runs else ():
                unit = "s" if metric == "cpu_s" else "nats"
                made.add(name, metric, unit, which.label, values, **about)["values"] = values
    return made
