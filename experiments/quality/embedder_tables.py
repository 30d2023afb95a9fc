"""The embedder study as a page and as rows."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page
from benchmarks.harness.table import table
from experiments.quality import deeper_teacher
from experiments.quality.comparison import Entry
from experiments.quality.comparison_tables import Metric, failures, mean, rates_section, values
from experiments.quality.embedder_arms import DEFAULT, NUM_LAYERS
from experiments.quality.embedder_study import EmbedderStudy
from experiments.quality.options import Options
from experiments.quality.statistics import spread, verdict

METRICS = {
    "vector_cosine": Metric("cosine to the teacher", "fraction", "{:.3f}", False),
    "recall_at_10": Metric("recall@10", "fraction", "{:.3f}", False),
    "cosine": Metric("STS-B", "fraction", "{:.3f}", False),
}
"""The first two on the TEST half, STS-B by `homodistil probe`."""


def report(study: EmbedderStudy, options: Options, errors: Mapping[str, str]) -> str:
    trained = [entry for entry in study.entries if not entry.arm.is_untrained]
    parts = [_verdicts(study), _results(study), rates_section(trained), failures(errors)]
    return page("Half of a sentence embedder: our method and its rivals", _how(options), *parts)


def _how(options: Options) -> str:
    return (
        f"Teacher: {_teacher(options)}. Every run: {options.steps} steps of 32 sentences of 32 tokens, the "
        f"same for every method (by seed), one process of one thread, {options.deepspeed.name}. Each method at its own "
        f"best of three learning rates, a factor of 2 apart, and of one beyond the end where the best is at an end; "
        f"chosen by the mean cosine to the teacher's vectors on one half of the held-out sentences, seed "
        f"{options.seeds[0]} (in the table of rates: 1 - cosine). Reported: the other half, mean +- standard deviation "
        f"over seeds {', '.join(map(str, options.seeds))}. recall@10: of the teacher's ten nearest sentences the share "
        f"that is among the student's; STS-B: Spearman of the export's cosines on the packaged dev pairs."
    )


def _teacher(options: Options) -> str:
    name = "MiniLM-L6 (embedded:minilm-l6)"
    if options.layers in (0, NUM_LAYERS):
        return name
    return (
        f"an embedder of {options.layers} layers, each of those of {name} {options.layers // NUM_LAYERS} times, "
        f"trained to its vectors for {deeper_teacher.STEPS} steps of {deeper_teacher.BATCH} sentences"
    )


def _results(study: EmbedderStudy) -> str:
    headings = ["method", "parameters {:,}", "lr {:g}", *(f"{m.heading} {m.form}" for m in METRICS.values())]
    itself = [1.0, 1.0, spread(study.teacher_probes.get("cosine", []))]
    teacher = ["teacher", study.teacher_parameters, None, *itself, None, None]
    lines = [teacher, *(_line(entry) for entry in study.entries)]
    notes = "\n".join(f"* {entry.arm.label}: {entry.arm.note}." for entry in study.entries if entry.arm.note)
    return f"## Results\n\n{table([*headings, 'CPU s {:.0f}', 'seeds {}'], lines)}" + (f"\n\n{notes}" if notes else "")


def _line(entry: Entry) -> list:
    parameters = next((run["parameters"] for run in entry.runs.values()), None)
    measured = [spread(scores(entry, name)) for name in METRICS]
    rate = None if entry.arm.is_untrained else entry.rate
    return [entry.arm.label, parameters, rate, *measured, mean(entry, "cpu_s"), len(entry.runs)]


def scores(entry: Entry, metric: str) -> list[float]:
    """One per seed."""
    if metric == "cosine":
        return values(entry, metric)
    return [run["test"][metric] for run in entry.runs.values() if metric in run["test"]]


def _verdicts(study: EmbedderStudy) -> str:
    """Our method against every rival, our fewer layers against layer reduction, and our cut against selection."""
    arms = {entry.arm.name: entry for entry in study.entries if entry.runs}
    pairs = [(DEFAULT, name) for name in arms if not (arms[name].arm.is_ours or arms[name].arm.is_untrained)]
    pairs += [("layers_copied", rival) for rival in ("layers", "layers_refit", "layers_refit_mse")]
    pairs += [("ours_cut", "selection_cut")]
    lines = [
        _verdict(arms[ours], arms[rival], name)
        for ours, rival in pairs
        if ours in arms and rival in arms
        for name in METRICS
    ]
    columns = ["ours", "against", "metric", "difference {:+.3f}", "2 sd of it {:.3f}", "better by more than 2 sd"]
    won = sum(line[-1] == "yes" for line in lines)
    how = f"Ours is better by more than two standard deviations in {won} of {len(lines)} rows."
    return f"## Verdict\n\n{how} Difference: ours - the other.\n\n{table(columns, lines)}" if lines else ""


def _verdict(ours: Entry, rival: Entry, name: str) -> list:
    a, b = spread(scores(ours, name)), spread(scores(rival, name))
    judged = verdict(a, b, lower_is_better=False)
    answer = "yes" if judged.is_better else "no"
    return [ours.arm.label, rival.arm.label, METRICS[name].heading, judged.difference, 2 * judged.deviation, answer]


def rows(study: EmbedderStudy, config: dict) -> Rows:
    """One row per method and metric; `values` has a number per seed."""
    made = Rows("quality_embedder", config)
    for entry in study.entries:
        about = {"rate": entry.rate, "validation": {f"{rate:g}": loss for rate, loss in entry.validation.items()}}
        about |= {"seeds": list(entry.runs), "parameters": [run["parameters"] for run in entry.runs.values()][:1]}
        for name, metric in METRICS.items():
            if numbers := scores(entry, name):
                made.add(entry.arm.name, name, metric.unit, entry.width, numbers, **about)["values"] = numbers
    if numbers := study.teacher_probes.get("cosine"):
        made.add("teacher", "cosine", "fraction", "teacher", numbers)
    return made
