"""The experiment as a page and as rows; whole at any time: what has not been measured is a dash."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page
from benchmarks.harness.table import Mean, table
from experiments.gpu_quality.arms import PEER, PREDICTIONS, REACHED, Prediction
from experiments.gpu_quality.sizes import Sizes
from experiments.gpu_quality.study import TASK, Findings
from experiments.quality.comparison import Entry
from experiments.quality.comparison_tables import METRICS, PROBES, TASKS, failures, rates_section, values
from experiments.quality.options import Options
from experiments.quality.statistics import difference, marked, spread

_SCORES = METRICS | PROBES | {TASK: TASKS[TASK]}
_COLUMNS = ["arm", "parameters {:,}", "lr {:g}", "seeds {}", *(f"{m.heading} {m.form}" for m in _SCORES.values())]
_COLUMNS += ["tokens {:,}", "wall s {:.0f}"]


def report(findings: Findings, options: Options, sizes: Sizes, errors: Mapping[str, str]) -> str:
    parts = [_width_part(findings, width) for width in options.widths]
    parts += [
        _differences(findings),
        _saved(findings),
        rates_section(_rated(findings)),
        _left_out(findings),
        failures(errors),
    ]
    return page("Compensated cuts at length, on one GPU", _how(options, sizes), *parts)


def _how(options: Options, sizes: Sizes) -> str:
    size = "full size" if sizes.is_whole else "REDUCED size: the figures show that it runs, and nothing else"
    return (
        f"{size}. Every run: {sizes.steps:,} steps of {sizes.sequences} x 128 tokens, the same batches and masks for "
        f"every arm (by seed); one teacher, corrected by {sizes.correction_steps:,} steps, for all arms and seeds; "
        f"attention_target=probabilities_kl. Learning rates: each arm's own best of "
        f"{', '.join(f'{rate:g}' for rate in options.rates)} in runs of {sizes.rate_steps} steps at "
        f"{options.widths[0]} width (B has A's; other widths the same), by the MLM loss on one half of the held-out "
        f"blocks. Reported: the other half, mean +- standard deviation over seeds. Frozen: homodistil probe. "
        f"Fine-tuned: {TASKS[TASK].heading}, one run per seed."
    )


def _width_part(findings: Findings, width: str) -> str:
    lines = [_teacher_line(findings), *(_line(entry) for entry in findings.entries if entry.width == width)]
    return f"## {width.capitalize()} width\n\n{table(_COLUMNS, lines)}"


def _teacher_line(findings: Findings) -> list:
    test, parameters = findings.teacher.get("test", {}), findings.teacher.get("parameters")
    scores = [test.get(name) for name in METRICS] + [spread(findings.teacher_probes.get(name, [])) for name in PROBES]
    return ["teacher (corrected)", parameters, None, "-", *scores, None, None, None]


def _line(entry: Entry) -> list:
    runs = list(entry.runs.values())
    parameters, tokens = (next((run[name] for run in runs), None) for name in ("parameters", "tokens"))
    scores = [spread(values(entry, name)) for name in _SCORES]
    return [
        entry.arm.label,
        parameters,
        entry.rate,
        str(len(runs) or "-"),
        *scores,
        tokens,
        spread([run["wall_s"] for run in runs]),
    ]


def _differences(findings: Findings) -> str:
    columns = ["difference", "width", "held-out MLM loss {}", "predicted {}", "KL to teacher {}", "seeds {}"]
    how = (
        "Paired by seed; a star: more than twice its standard deviation. Predicted before the experiment, for full "
        "size. If A - C is above -0.02 at a quarter, the compensated cut is a better start and nothing more."
    )
    return f"## Differences\n\n{how}\n\n{table(columns, [_difference(findings, each) for each in PREDICTIONS])}"


def _difference(findings: Findings, predicted: Prediction) -> list[str]:
    ours, base = (findings.entry(arm, predicted.width).runs for arm in (predicted.arm, predicted.base))
    changes = [difference(ours, base, metric) for metric in ("mlm_loss", "kl_to_teacher")]
    loss, kl = (marked(change) for change in changes)
    num_seeds = changes[0].num if isinstance(changes[0], Mean) else 0
    expected = f"{predicted.low:+.2f} .. {predicted.high:+.2f}"
    return [f"{predicted.arm} - {predicted.base}", predicted.width, loss, expected, kl, str(num_seeds)]


def _saved(findings: Findings) -> str:
    if not findings.saved:
        return ""
    (reach,) = findings.saved
    lengths = "; ".join(f"{length} x: {loss:.3f}" for length, loss in sorted(reach.losses.items()))
    return (
        f"## Tokens saved\n\n{PEER} needs {reach.in_words} times the tokens of {REACHED} to reach its held-out loss of "
        f"{reach.target:.3f} ({reach.tokens:,} tokens; first seed, {reach.entry.width} width). Loss of {PEER} by "
        f"length: {lengths}."
    )


def _rated(findings: Findings) -> list[Entry]:
    return [entry for entry in findings.entries if entry.validation]


def _left_out(findings: Findings) -> str:
    lines = "\n".join(f"* {title}" for title in findings.left_out)
    return f"## Left out, for the time was over\n\n{lines}" if lines else ""


def rows(findings: Findings, config: dict) -> Rows:
    """One row per arm, width and metric: `x` is the width, `values` has a number per seed."""
    made = Rows("gpu_quality", config)
    for entry in findings.entries:
        for name, metric in _SCORES.items():
            if numbers := values(entry, name):
                row = made.add(entry.arm.name, name, metric.unit, entry.width, numbers, rate=entry.rate)
                row["values"] = numbers
    for name, metric in METRICS.items() if findings.teacher else ():
        made.add("teacher", name, metric.unit, "teacher", findings.teacher["test"][name])
    for name, scores in findings.teacher_probes.items():
        made.add("teacher", name, "fraction", "teacher", scores)
    for reach in findings.saved:
        value = reach.factor if reach.factor is not None else max(reach.losses)
        row = made.add(reach.entry.arm.name, f"tokens to reach {REACHED}", "times its", reach.entry.width, value)
        row |= {"is_reached": reach.factor is not None, "losses": {str(k): loss for k, loss in reach.losses.items()}}
    return made
