"""The main comparison as a page and as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page
from benchmarks.harness.table import DASH, Mean, cell, table
from experiments.quality import fine_tuning, published
from experiments.quality.arms import DEFAULT_ARM
from experiments.quality.comparison import OWN_SHAPE, Comparison, Entry
from experiments.quality.options import Options
from experiments.quality.statistics import spread, verdict

_TUNED = (
    "Frozen: probes of the exports' features (homodistil probe), nothing trained but ridge regressions. Fine-tuned: "
    "the exports of all seeds, dev sets of the packaged tasks."
)
NOT_TUNED = "Probes of frozen features and fine-tuning were left out."


class Metric(NamedTuple):
    heading: str
    unit: str
    form: str
    lower_is_better: bool


METRICS = {
    "mlm_loss": Metric("held-out MLM loss", "nats", "{:.3f}", True),
    "masked_top1": Metric("masked top-1", "fraction", "{:.4f}", False),
    "kl_to_teacher": Metric("KL to teacher", "nats", "{:.3f}", True),
}
TASKS = {name: Metric(column.title, "fraction", "{:.3f}", False) for name, column in fine_tuning.TASKS.items()}
COSTS = {
    "tokens_per_cpu_s": Metric("tokens / CPU s", "tokens/s", "{:,.0f}", False),
    "cpu_s": Metric("CPU s", "s", "{:.0f}", True),
    "flops": Metric("TFLOP", "FLOP", "{:.2f}", True),
}
PROBES = {
    "cosine": Metric("frozen: STS-B cosine", "fraction", "{:.3f}", False),
    "centred_cosine": Metric("frozen: STS-B centred cosine", "fraction", "{:.3f}", False),
    "pairs_ridge": Metric("frozen: STS-B ridge", "fraction", "{:.3f}", False),
    "movie_ridge": Metric("frozen: movie ridge", "fraction", "{:.3f}", False),
}
"""Of `homodistil probe`; the only spread is that of the students."""
_SCALE = {"flops": 1e-12}


def values(entry: Entry, metric: str) -> list[float]:
    """One a seed, on the TEST half."""
    if metric in TASKS:
        return entry.tasks.get(metric, [])
    if metric in PROBES:
        return entry.probes.get(metric, [])
    runs = entry.runs.values()
    return [run["test"][metric] if metric in METRICS else run[metric] * _SCALE.get(metric, 1) for run in runs]


def mean(entry: Entry, metric: str) -> Mean | None:
    return spread(values(entry, metric))


def failures(errors: Mapping[str, str]) -> str:
    """A section about the runs that failed; empty where none has."""
    lines = "\n".join(f"* {label}: {error}" for label, error in errors.items())
    return f"## Runs that failed\n\n{lines}" if errors else ""


def report(study: Comparison, options: Options, errors: Mapping[str, str]) -> str:
    parts = [_width_part(study, width) for width in dict.fromkeys(entry.width for entry in study.entries)]
    parts += [rates_section(study.entries), _published(), failures(errors)]
    return page("Quality: our method and its rivals", _how(options), _verdicts(study), *parts)


def _how(options: Options) -> str:
    return (
        f"Every run: {options.steps} steps of {8 if options.quick else 32} sequences of 64 tokens, the same batches "
        f"and masks for every method (by seed), no dropout, one process of one thread, {options.deepspeed.name}. Each "
        f"method at its own best learning rate of {_grids(options)}, and of one further rate (a factor of 2 beyond the "
        f"end) where the best was the first or the last, for every method alike (all of them are at the end); chosen "
        f"by the MLM loss on one half of the held-out blocks (stretches of 64, by turns), seed {options.seeds[0]}. "
        f"Reported: the other, "
        f"mean +- standard deviation over seeds {', '.join(map(str, options.seeds))}. CPU seconds: of the process "
        f"while it trains (calibration, cut, steps, resize events), without evaluations and the start-up check. "
        f"TFLOP: student and teacher by the runs' own count, calibration of one-shot pruning included, closed-form "
        f"compensation not. " + (_TUNED if options.tune else NOT_TUNED)
    )


def _grids(options: Options) -> str:
    if options.own_rates:
        return "three, a factor of 2 apart, around the method's usual one"
    return ", ".join(f"{rate:g}" for rate in options.rates)


def _width_part(study: Comparison, width: str) -> str:
    entries = [entry for entry in study.entries if entry.width == width]
    columns = METRICS | PROBES | TASKS | COSTS
    headings = ["method", "parameters {:,}", "lr {:g}", *(f"{m.heading} {m.form}" for m in columns.values())]
    lines = [_teacher_line(study)] + [_line(entry, columns) for entry in entries]
    notes = [f"* {entry.arm.label}: {entry.arm.note}." for entry in entries if entry.arm.note]
    hidden = next((run["hidden_size"] for entry in entries for run in entry.runs.values()), None)
    title = "Another parameter count" if width == OWN_SHAPE else f"Width: {width} (hidden {hidden or DASH})"
    return f"## {title}\n\n{table(headings, lines)}" + ("\n\n" + "\n".join(notes) if notes else "")


def _line(entry: Entry, columns: Mapping[str, Metric]) -> list:
    parameters = next((run["parameters"] for run in entry.runs.values()), None)
    return [entry.arm.label, parameters, entry.rate, *(mean(entry, metric) for metric in columns)]


def _teacher_line(study: Comparison) -> list:
    teacher = study.teacher
    line = ["teacher (corrected)", teacher.get("parameters"), None]
    line += [teacher["test"][metric] if teacher else None for metric in METRICS]
    line += [spread(study.teacher_probes.get(probe, [])) for probe in PROBES]
    return [*line, *(spread(study.teacher_tasks.get(task, [])) for task in TASKS), *[None] * len(COSTS)]


def _verdicts(study: Comparison) -> str:
    headings = ["against", "width", "metric", "difference {}", "2 sd of it {}", "better by more than 2 sd"]
    lines = []
    lost: dict[str, list[str]] = {}
    """Column -> the rivals that our default does not beat there."""
    for ours, rival in _pairs(study.entries):
        for name, metric in (METRICS | PROBES | TASKS).items():
            a, b = mean(ours, name), mean(rival, name)
            if a is None or b is None:
                continue
            judged = verdict(a, b, metric.lower_is_better)
            signed = metric.form.replace(":", ":+")
            answer = "yes" if judged.is_better else "no"
            double = cell(2 * judged.deviation, metric.form)
            name_of = rival.arm.label + (" (own form)" if rival.arm.is_ours else "")
            lines.append([name_of, ours.width, metric.heading, signed.format(judged.difference), double, answer])
            if not rival.arm.is_ours:
                against = [] if judged.is_better else [f"{rival.arm.label} at {ours.width} width"]
                lost[metric.heading] = lost.get(metric.heading, []) + against
    if not lines:
        return "## Verdict\n\nNone: our default or every rival is missing."
    note = "Difference: our default - the other; its deviation: sqrt(sd^2 + sd^2)."
    return f"## Verdict\n\n{_summary(lost)}\n\n{note}\n\n{table(headings, lines)}"


def _summary(lost: dict[str, list[str]]) -> str:
    """In words: columns where nobody is left, then whoever is."""
    won = [heading for heading, rivals in lost.items() if not rivals]
    parts = []
    if won:
        parts.append(
            f"Our default is better than every rival of the same parameter count, at every width, by more than two "
            f"standard deviations of the difference, in: {', '.join(won)}."
        )
    if len(won) < len(lost):
        parts.append("It is NOT better by more than two standard deviations of the difference:")
    parts += [f"* in {heading} than: {'; '.join(rivals)}" for heading, rivals in lost.items() if rivals]
    return "\n".join(parts) if parts else "No rival was measured."


def _pairs(entries: Sequence[Entry]) -> list[tuple[Entry, Entry]]:
    """Our default with every other method at its width."""
    defaults = {entry.width: entry for entry in entries if entry.arm.name == DEFAULT_ARM}
    rivals = (entry for entry in entries if entry.arm.name != DEFAULT_ARM)
    return [(defaults[entry.width], entry) for entry in rivals if entry.width in defaults]


def rates_section(entries: Sequence[Entry]) -> str:
    """What every learning rate came to, and which one was chosen."""
    lines = []
    for entry in entries:
        losses = "; ".join(f"{rate:g}: {cell(loss, '{:.3f}')}" for rate, loss in sorted(entry.validation.items()))
        lines.append([entry.label, losses, entry.rate, ", ".join(f"{rate:g}" for rate in entry.extended) or "-"])
    headings = ["method/width", "validation loss by rate (seed of the choice)", "chosen {:g}"]
    return f"## Learning rates\n\n{table([*headings, 'beyond the grid'], lines)}"


def _published() -> str:
    headings = ["model (full scale)", "M parameters {:g}", *(f"{task} {{:.1f}}" for task in published.TASKS)]
    headings += ["measured here", "source"]
    lines = [[r.model, r.parameters_m, *r.figures, "not measured", r.source] for r in published.ROWS]
    return (
        f"## Full scale: not measured here\n\nDev sets, per cent, as published; a dash: no figure that could be read "
        f"at its source. {published.NOTE}\n\n{table(headings, lines)}"
    )


def rows(study: Comparison, config: dict) -> Rows:
    """One row per method, width and metric: `x` is the width, `values` has a number per seed."""
    made = Rows("quality_main", config)
    for entry in study.entries:
        about = {"rate": entry.rate, "validation": {f"{rate:g}": loss for rate, loss in entry.validation.items()}}
        about |= {"seeds": list(entry.runs), "parameters": [run["parameters"] for run in entry.runs.values()][:1]}
        for name, metric in (METRICS | PROBES | TASKS | COSTS).items():
            if numbers := values(entry, name):
                unit = "TFLOP" if name == "flops" else metric.unit
                made.add(entry.arm.name, name, unit, entry.width, numbers, **about)["values"] = numbers
    about = {"parameters": [study.teacher["parameters"]]} if study.teacher else {}
    for name, metric in METRICS.items() if study.teacher else ():
        made.add("teacher", name, metric.unit, "teacher", study.teacher["test"][name], **about)
    for name, scores in (study.teacher_probes | study.teacher_tasks).items():
        made.add("teacher", name, "fraction", "teacher", scores, **about)
    return made
