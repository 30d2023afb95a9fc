"""What the decoder study will do, printed before any of it is done: methods, runs, minutes, what is not available."""

from __future__ import annotations

from transformers import PretrainedConfig

from benchmarks.harness.table import table
from experiments.quality.availability import outlook
from experiments.quality.comparison import EXTENDED_SHARE, Entry, spec
from experiments.quality.decoder_study import CORRECTION, EXTENSIONS, DecoderStudy, peers, plan, teacher_overrides
from experiments.quality.estimate import Estimator
from experiments.quality.options import Options
from experiments.quality.tokens_saved import LENGTHS
from homodistil.data.sources.assets import TEACHERS
from homodistil.distill.teacher import load_config
from homodistil.models.known_configs import known_config
from homodistil.training.resolve import ResolvedRun

COLUMNS = ["method/size", "parameters {:,}", "learning rates", "runs {:g}", "minutes a run {:.1f}", "minutes {:.0f}"]


def listing(options: Options) -> str:
    """The list as Markdown. Nothing is fetched or made where the teacher is a packaged one."""
    teacher, is_whole = _shape(options)
    start = teacher_overrides(options, options.teacher if is_whole else "the first layers")
    study = plan(options, start, teacher)
    runs = {entry.label: _resolved(options, entry, teacher) for entry in study.entries}
    lines = [[label, None, "not available", 0, None, 0] for label in study.refused]
    if runs:
        estimator = Estimator(options.deepspeed, options.eval_blocks, next(iter(runs.values())))
        lines = [_line(options, study, entry, runs[entry.label], estimator) for entry in study.entries] + lines
    total = _total(options, sum(line[-1] for line in lines))
    parts = [_head(options, study, teacher, is_whole), table(COLUMNS, lines), total, _refused(study)]
    return "\n\n".join(filter(None, parts))


def _resolved(options: Options, entry: Entry, teacher: PretrainedConfig) -> ResolvedRun:
    return outlook(spec(options, entry, options.rates[0], options.seeds[0]), teacher).resolved


def _shape(options: Options) -> tuple[PretrainedConfig, bool]:
    """The configuration of the teacher at its depth, and whether that is all of it."""
    package = TEACHERS.get(options.teacher)
    config = known_config(package.base_model) if package else load_config(options.teacher)
    is_whole = options.layers >= config.num_hidden_layers
    if not is_whole:
        config.num_hidden_layers = options.layers
    return config, is_whole


def _head(options: Options, study: DecoderStudy, teacher: PretrainedConfig, is_whole: bool) -> str:
    depth = f"{teacher.num_hidden_layers} layers" if is_whole else f"its first {options.layers} layers, {CORRECTION[0]}"
    default = [entry.label for size in options.widths if (entry := study.default(size))]
    return (
        f"Teacher {options.teacher}, {depth}; {options.steps} steps; seeds {', '.join(map(str, options.seeds))}. Our "
        f"default: {', '.join(default) or 'not available'}. Every method at its best of three rates (and up to "
        f"{EXTENSIONS} beyond the end); peers also at {' and '.join(map(str, LENGTHS))} times the tokens until they "
        f"reach its loss."
    )


def _line(options: Options, study: DecoderStudy, entry: Entry, resolved: ResolvedRun, estimator: Estimator) -> list:
    grid = options.grid(entry.arm, entry.width)
    runs = len(grid) + len(options.seeds) - 1
    lengths = LENGTHS if entry in peers(study, entry.width) else ()
    runs += 0 if entry.arm.is_untrained else EXTENDED_SHARE
    once = estimator.seconds(resolved) / 60
    minutes = runs * once + sum(estimator.seconds(resolved, length) / 60 for length in lengths)
    rates = "not trained" if entry.arm.is_untrained else " ".join(f"{rate:g}" for rate in grid)
    return [entry.label, study.parameters[entry.label], rates, runs + len(lengths), once, minutes]


def _total(options: Options, minutes: float) -> str:
    return (
        f"About {minutes / 60:.1f} hours of a process with one thread, {minutes / 60 / options.workers:.1f} hours with "
        f"{options.workers} processes, on a machine that does nothing else; results that are in {options.work} are not "
        f"made again."
    )


def _refused(study: DecoderStudy) -> str:
    lines = "\n".join(f"* {label}: {reason}" for label, reason in study.refused.items())
    return f"Not available:\n\n{lines}" if lines else ""
