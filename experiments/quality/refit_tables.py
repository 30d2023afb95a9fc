"""The study `refit` as a page and as rows: the forms of the cut at every length, and whether their order changes."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page
from benchmarks.harness.table import cell, table
from experiments.quality.comparison_tables import TASKS, Metric, failures, rates_section
from experiments.quality.options import LENGTHS, Options
from experiments.quality.refit_arms import REFERENCE, REFIT_ARMS, is_gradual
from experiments.quality.refit_study import Cell, RefitStudy
from experiments.quality.statistics import Runs, difference, marked, over_seeds, spread

CUT = "cut alone"
"""The stage before any training, beside the lengths."""
_REFERENCE = REFIT_ARMS[REFERENCE].label


def metrics(study: RefitStudy) -> dict[str, Metric]:
    loss = "lm_loss" if study.is_causal else "mlm_loss"
    return {
        loss: Metric("held-out loss", "nats", "{:.3f}", True),
        "kl_to_teacher": Metric("KL to teacher", "nats", "{:.3f}", True),
    }


def report(study: RefitStudy, options: Options, errors: Mapping[str, str]) -> str:
    parts = [_order(study, width, name) for width in options.widths for name in metrics(study)]
    parts += [_length_part(study, width, length, options) for width in options.widths for length in LENGTHS]
    parts += [_tasks_part(study, width, task, options) for width in options.widths for task in TASKS]
    tried = [entry for entry in study.cells if entry.validation]
    parts += [rates_section(tried) if tried else "", _refused(study), _left_out(study), failures(errors)]
    return page("Which form of the cut is best after distillation", _how(options), *parts)


def _how(options: Options) -> str:
    return (
        f"Teacher: {options.teacher}. Same losses, batches and masks for every form (by seed); gradual forms end at a "
        f"tenth of the steps, with as many events at every length. Each form has its own learning rate: at the "
        f"shortest length the best of three, a factor of 2 apart, and of one beyond the end of these where the best is "
        f"at an end; at longer ones the best of that of the length before, half of it, and one beyond; chosen by the "
        f"loss on the VALIDATION half, seed {options.seeds[0]}. `(end)`: the chosen rate is the first or the last of "
        f"all that were tried. Reported: TEST half, mean +- standard deviation over seeds "
        f"{', '.join(map(str, options.seeds))}; differences to {_REFERENCE} are paired by seed, negative is better, "
        f"* where the difference is more than twice its deviation. Cut alone: the cut of the shortest length, the same "
        f"events without training (learning rate 1e-9)."
    )


def _order(study: RefitStudy, width: str, metric: str) -> str:
    """Every form's difference to the reference and rank, from the cut alone to the longest training."""
    stages = _stages(study, width)
    levels = {stage: _levels(forms, metric) for stage, forms in stages.items()}
    names = [name for name in REFIT_ARMS if any(name in forms for forms in stages.values())]
    if not names:
        return ""
    lines = [
        [REFIT_ARMS[name].label, *(_standing(forms, levels[stage], name, metric) for stage, forms in stages.items())]
        for name in names
    ]
    title = f"## Does the order change? {metrics(study)[metric].heading}, width {width}"
    about = f"Difference to {_REFERENCE}, and the rank among the forms that are there."
    return f"{title}\n\n{about} {_winners(levels)}\n\n{table(['form', *(f'{s} {{}}' for s in stages)], lines)}"


def _stages(study: RefitStudy, width: str) -> dict[str, dict[str, Runs]]:
    """Stage -> arm -> its runs, without stages and arms that have none."""
    cut = {arm: runs for (arm, of_width), runs in study.cut.items() if of_width == width and runs}
    lengths = {f"x{n}": {c.arm.name: c.runs for c in study.at(width, n) if c.runs} for n in LENGTHS}
    return {stage: forms for stage, forms in ({CUT: cut} | lengths).items() if forms}


def _levels(forms: dict[str, Runs], metric: str) -> dict[str, float]:
    """What forms are ranked by: the paired difference to the reference; they need not have equally many seeds."""
    base = forms.get(REFERENCE, {})
    start = over_seeds(base, metric).mean if base else 0.0
    changes = {name: difference(runs, base, metric) for name, runs in forms.items()}
    return {
        name: change.mean if change else over_seeds(forms[name], metric).mean - start
        for name, change in changes.items()
    }


def _standing(forms: dict[str, Runs], levels: dict[str, float], name: str, metric: str) -> str | None:
    if name not in forms:
        return None
    rank = 1 + sum(level < levels[name] for level in levels.values())
    change = difference(forms[name], forms.get(REFERENCE, {}), metric)
    return f"{'0' if name == REFERENCE else marked(change)} ({rank})"


def _winners(levels: dict[str, dict[str, float]]) -> str:
    best = {stage: min(forms, key=forms.get) for stage, forms in levels.items()}
    return "Best: " + "; ".join(f"{stage}: {REFIT_ARMS[name].label}" for stage, name in best.items()) + "."


def _length_part(study: RefitStudy, width: str, length: int, options: Options) -> str:
    cells = [c for c in study.at(width, length) if c.runs]
    if not cells:
        return ""
    columns = ["form", "lr {}"]
    for metric in metrics(study).values():
        columns += [f"cut alone: {metric.heading} {metric.form}", f"trained: {metric.heading} {metric.form}"]
        columns += ["difference {}"]
    columns += ["CPU s {:.0f}", "seeds {}"]
    base = next((c.runs for c in cells if c.arm.name == REFERENCE), {})
    lines = [_line(study, c, base) for c in cells]
    title = f"## Width {width}, {length * options.steps} steps (x{length})"
    return f"{title}\n\n{table(columns, lines)}"


def _line(study: RefitStudy, which: Cell, base: Runs) -> list:
    line = [which.arm.label, _rate(which)]
    for metric in metrics(study):
        cut = over_seeds(study.cut.get((which.arm.name, which.width), {}), metric)
        line += [cut, over_seeds(which.runs, metric), marked(difference(which.runs, base, metric))]
    cpu = spread([run["cpu_s"] for run in which.runs.values()])
    return [*line, cpu, len(which.runs)]


def _tasks_part(study: RefitStudy, width: str, task: str, options: Options) -> str:
    """What the exports of the shortest runs come to after fine-tuning on the task."""
    tuned = {
        c.arm.name: c.tuned for c in study.at(width, LENGTHS[0]) if any(task in s["test"] for s in c.tuned.values())
    }
    if not tuned:
        return ""
    base, form = tuned.get(REFERENCE, {}), TASKS[task].form
    lines = [
        [REFIT_ARMS[name].label, over_seeds(runs, task), marked(difference(runs, base, task)), len(runs)]
        for name, runs in tuned.items()
    ]
    title = f"## Fine-tuned: {TASKS[task].heading}, width {width}"
    about = (
        f"Exports of the x{LENGTHS[0]} runs, learning rate {options.task_rate:g}, one fine-tuning per seed; higher is "
        f"better."
    )
    return f"{title}\n\n{about}\n\n{table(['form', f'score {form}', 'difference {}', 'seeds {}'], lines)}"


def _rate(which: Cell) -> str:
    is_end = which.rate in (min(which.validation), max(which.validation))
    return cell(which.rate, "{:g}") + (" (end)" if is_end else "")


def _refused(study: RefitStudy) -> str:
    lines = "\n".join(f"* {name}: {reason}" for name, reason in study.refused.items())
    return f"## Not available\n\n{lines}" if lines else ""


def _left_out(study: RefitStudy) -> str:
    lines = "\n".join(f"* {what}" for what in study.left_out)
    return f"## Selected, and not there yet\n\n{lines}" if lines else ""


def rows(study: RefitStudy, config: dict) -> Rows:
    """`x` is width and stage (`half x4`, `half cut alone`); `values` has a number per seed, `seeds` whose they are."""
    made = Rows("quality_refit", config)
    for (arm, width), runs in study.cut.items():
        _add(made, study, arm, f"{width} {CUT}", runs, {})
    for which in study.cells:
        about = {"rate": which.rate, "pace": "gradual" if is_gradual(which.arm) else "one-shot"}
        about["validation"] = {f"{rate:g}": loss for rate, loss in which.validation.items()}
        about["parameters"] = next((run["parameters"] for run in which.runs.values()), None)
        _add(made, study, which.arm.name, f"{which.width} x{which.length}", which.runs, about)
        for task, metric in TASKS.items():
            scores = {seed: tuned["test"][task] for seed, tuned in which.tuned.items() if task in tuned["test"]}
            if scores:
                made.add(which.arm.name, task, metric.unit, f"{which.width} fine-tuned", list(scores.values()), **about)
                made[-1] |= {"values": list(scores.values()), "seeds": list(scores)}
    return made


def _add(made: Rows, study: RefitStudy, arm: str, x: str, runs: Runs, about: dict) -> None:
    for name, metric in metrics(study).items() if runs else ():
        numbers = [run["test"][name] for run in runs.values()]
        made.add(arm, name, metric.unit, x, numbers, **about)
        made[-1] |= {"values": numbers, "seeds": list(runs)}
    if runs:
        made.add(arm, "cpu_s", "s", x, [run["cpu_s"] for run in runs.values()], **about)
