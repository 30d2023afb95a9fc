"""The decoder study as a page and as rows."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.harness.rows import Rows
from benchmarks.harness.run import page
from benchmarks.harness.table import table
from experiments.quality.comparison import Entry, spec
from experiments.quality.comparison_tables import Metric, failures, rates_section
from experiments.quality.decoder_study import EXTENSIONS, DecoderStudy, peers
from experiments.quality.options import Options
from experiments.quality.statistics import over_seeds, spread, verdict
from experiments.quality.tokens_saved import LENGTHS, Reach

METRICS = {
    "lm_loss": Metric("held-out loss", "nats", "{:.3f}", True),
    "kl_to_teacher": Metric("KL to teacher", "nats", "{:.3f}", True),
    "perplexity": Metric("perplexity", "1", "{:,.1f}", True),
}
_COLUMNS = ["method", "parameters {:,}", "lr {:g}", *(f"{m.heading} {m.form}" for m in METRICS.values())]
_COLUMNS += ["tokens {:,}", "CPU s {:.0f}"]


def report(study: DecoderStudy, options: Options, errors: Mapping[str, str]) -> str:
    parts = [_size_part(study, size) for size in options.widths]
    parts += [_saved(study), rates_section(study.entries), _refused(study), failures(errors)]
    how = _how(study, options)
    return page("Quality of decoders: our method and its peers", how, _verdicts(study, options), *parts)


def _how(study: DecoderStudy, options: Options) -> str:
    batches = ""
    if study.entries:
        config = spec(options, study.entries[0], options.rates[0], options.seeds[0]).config()
        batches = f"of {config.train.global_batch_size} sequences of {config.data.seq_len} tokens, "
    return (
        f"Teacher: {options.teacher}, its first {options.layers} layers (all, if it has no more). Every run: "
        f"{options.steps} steps {batches}the same batches for every method (by seed), one process of one thread, "
        f"{options.deepspeed.name}. Each method at its own best of three learning rates and, while the best is at an "
        f"end, of up to {EXTENSIONS} further ones, chosen by the loss on one half of the held-out blocks, seed "
        f"{options.seeds[0]}. Reported: the other half, mean +- standard deviation over seeds "
        f"{', '.join(map(str, options.seeds))}. Our methods train on 4 x KL + loss, peers on the KL alone, as "
        f"published."
    )


def _size_part(study: DecoderStudy, size: str) -> str:
    entries = [entry for entry in study.entries if entry.width == size]
    lines = [_teacher_line(study), *(_line(study, entry) for entry in entries)]
    notes = [f"* {entry.arm.label}: {entry.arm.note}." for entry in entries if entry.arm.note]
    return "\n\n".join([f"## {size} of the parameters", table(_COLUMNS, lines), *(["\n".join(notes)] if notes else [])])


def _teacher_line(study: DecoderStudy) -> list:
    test = study.teacher.get("test", {})
    return ["teacher", study.teacher.get("parameters"), None, *(test.get(name) for name in METRICS), None, None]


def _line(study: DecoderStudy, entry: Entry) -> list:
    runs = list(entry.runs.values())
    tokens = 0 if entry.arm.is_untrained else next((run["tokens"] for run in runs), None)
    rate = None if entry.arm.is_untrained else entry.rate
    measured = [over_seeds(entry.runs, name) for name in METRICS]
    cpu = spread([run["cpu_s"] for run in runs])
    return [entry.arm.label, study.parameters[entry.label], rate, *measured, tokens, cpu]


def _verdicts(study: DecoderStudy, options: Options) -> str:
    columns = ["size", "against", "metric", "difference {:+.3f}", "2 sd of it {:.3f}", "better by more than 2 sd"]
    lines = [line for size in options.widths for peer in peers(study, size) for line in _against(study, size, peer)]
    default = [entry.arm.label for size in options.widths if (entry := study.default(size))]
    if not lines:
        return "## Verdict\n\nNone: our default or every peer is missing."
    lost = sum(line[-1] == "no" for line in lines)
    answer = "in every row" if not lost else f"in {len(lines) - lost} of {len(lines)} rows"
    how = f"Our default ({default[0]}) is better than its peers by more than two standard deviations {answer}."
    return f"## Verdict\n\n{how} Difference: our default - the peer.\n\n{table(columns, lines)}"


def _against(study: DecoderStudy, size: str, peer: Entry) -> list[list]:
    lines, default = [], study.default(size)
    for name in ("lm_loss", "kl_to_teacher") if default else ():
        ours, theirs = over_seeds(default.runs, name), over_seeds(peer.runs, name)
        if ours and theirs:
            judged = verdict(ours, theirs, METRICS[name].lower_is_better)
            answer = "yes" if judged.is_better else "no"
            lines.append([size, peer.arm.label, METRICS[name].heading, judged.difference, 2 * judged.deviation, answer])
    return lines


def _saved(study: DecoderStudy) -> str:
    if not study.saved:
        return "## Tokens saved\n\nNone: our default or every peer is missing."
    columns = ["size", "peer", "our loss {:.3f}", *(f"at {length} x {{:.3f}}" for length in (1, *LENGTHS))]
    columns += ["tokens to reach ours, times ours", "tokens {:,.0f}"]
    how = (
        "Tokens that a peer needs to reach the held-out loss of our default, on the first seed: longer runs with a "
        "schedule of their own, linear in the logarithm of the length between two."
    )
    return f"## Tokens saved\n\n{how}\n\n{table(columns, map(_saved_line, study.saved))}"


def _saved_line(reach: Reach) -> list:
    losses = [reach.losses.get(length) for length in (1, *LENGTHS)]
    tokens = reach.factor and reach.factor * reach.tokens
    return [reach.entry.width, reach.entry.arm.label, reach.target, *losses, reach.in_words, tokens]


def _refused(study: DecoderStudy) -> str:
    lines = "\n".join(f"* {label}: {reason}" for label, reason in study.refused.items())
    return f"## Not available\n\n{lines}" if lines else ""


def rows(study: DecoderStudy, config: dict) -> Rows:
    """One row per method, size and metric: `x` is the size, `values` has a number per seed; tokens saved by peer."""
    made = Rows("quality_decoder", config)
    for entry in study.entries:
        about = {"rate": entry.rate, "validation": {f"{rate:g}": loss for rate, loss in entry.validation.items()}}
        about |= {"seeds": list(entry.runs), "parameters": study.parameters[entry.label]}
        for name, metric in METRICS.items() if entry.runs else ():
            numbers = [run["test"][name] for run in entry.runs.values()]
            made.add(entry.arm.name, name, metric.unit, entry.width, numbers, **about)["values"] = numbers
    for reach in study.saved:
        about = {"losses": {str(length): loss for length, loss in reach.losses.items()}, "target": reach.target}
        value = reach.factor if reach.factor is not None else max(reach.losses)
        made.add(reach.entry.arm.name, "tokens to reach ours", "times ours", reach.entry.width, value, **about)
        made[-1]["is_reached"] = reach.factor is not None
    for name, metric in METRICS.items() if study.teacher else ():
        made.add("teacher", name, metric.unit, "teacher", study.teacher["test"][name])
    return made
