"""The study `decoder`: SmolLM2-135M, or its first layers, to 0.7 and 0.5 of its parameters, against peers of today.

Rates and seeds are as in the study `main`: chosen by the loss on the VALIDATION half, on the first seed; what is
reported is the TEST half. A grid whose best rate is at an end goes on up to three times, for what is selected wants
rates far above those of what is cut in closed form. Then every peer is trained longer until it reaches our loss
(tokens_saved.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PretrainedConfig

from experiments.quality import tokens_saved
from experiments.quality.availability import Outlook, outlook
from experiments.quality.block_influence import BlockInfluence
from experiments.quality.comparison import Entry, run_seeds, spec, try_rates
from experiments.quality.decoder_arms import (
    BY_DEPTH,
    DECODER_ARMS,
    DECODER_BASE,
    DEFAULT_ORDER,
    NARROW,
    depth_overrides,
    size_overrides,
)
from experiments.quality.jobs import EvaluateTeacher
from experiments.quality.options import Options
from experiments.quality.pool import Pool
from experiments.quality.shallow_teacher import first_layers
from homodistil.config import command_line
from homodistil.distill.teacher import load_config
from homodistil.pruning.block_influence import most_influential
from homodistil.training.teacher_checks import cache_dir, found_teacher

CORRECTION = ("teacher.correction_steps=400", "teacher.correction_lr=6e-4")
"""Of a teacher whose last layers are left out."""
EXTENSIONS = 3
"""How many rates a grid may get beyond its end: up to 8 times its highest."""
NEAR = 0.1
"""How far the parameters of a student of fewer layers may be from those of a narrower one, as a share."""


@dataclass
class DecoderStudy:
    """All that the tables are made of."""

    entries: list[Entry]
    refused: dict[str, str] = field(default_factory=dict)
    """method/size -> why it is not available."""
    parameters: dict[str, int] = field(default_factory=dict)
    """method/size -> parameters of the student."""
    teacher: dict = field(default_factory=dict)
    """What `Context.evaluate_teacher` gives."""
    saved: list[tokens_saved.Reach] = field(default_factory=list)

    def default(self, size: str) -> Entry | None:
        """Our method as the product has it by default."""
        ours = {entry.arm.name: entry for entry in self.entries if entry.width == size}
        return next((ours[name] for name in DEFAULT_ORDER if name in ours), None)


def run(pool: Pool, options: Options) -> DecoderStudy:
    teacher = first_layers(options.teacher, options.layers, pool.work, _cache_dir(options))
    start = teacher_overrides(options, teacher)
    study = plan(options, start, load_config(found_teacher(_config(start, options))))
    _choose_layers(pool, options, start, study)
    if not study.entries:
        return study
    try_rates(pool, options, study.entries, EXTENSIONS)
    run_seeds(pool, options, study.entries)
    some = EvaluateTeacher(spec(options, study.entries[0], options.rates[0], options.seeds[0]), options.eval_blocks)
    study.teacher = pool.run("teacher", [some])[0] or {}
    for size in options.widths:
        if default := study.default(size):
            study.saved += tokens_saved.run(pool, options, peers(study, size), default)
    return study


def peers(study: DecoderStudy, size: str) -> list[Entry]:
    """The methods at this size that are trained and not ours."""
    return [e for e in study.entries if e.width == size and not (e.arm.is_ours or e.arm.is_untrained)]


def teacher_overrides(options: Options, teacher: str) -> tuple[str, ...]:
    """What all runs begin with; a teacher that is not whole is corrected first."""
    is_whole = teacher == options.teacher
    return (*DECODER_BASE, f"teacher.name={teacher}", *(() if is_whole else CORRECTION))


def plan(options: Options, start: tuple[str, ...], teacher: PretrainedConfig) -> DecoderStudy:
    """The methods at every size, each examined before anything is trained.

    Args:
        start: from `teacher_overrides`.
        teacher: its configuration.
    """
    study = DecoderStudy([])
    for size in options.widths:
        narrow = Entry(DECODER_ARMS[NARROW], size, start=(*start, *size_overrides(options.teacher, size)))
        target = _outlook(options, narrow, teacher)
        for name in options.arms:
            entry = Entry(DECODER_ARMS[name], size, start=narrow.start)
            if name in BY_DEPTH and target.resolved:
                entry.start = (*start, *depth_overrides(list(range(_depth(target)))))
            _examine(study, entry, _outlook(options, entry, teacher), target)
    return study


def _outlook(options: Options, entry: Entry, teacher: PretrainedConfig) -> Outlook:
    return outlook(spec(options, entry, options.rates[0], options.seeds[0]), teacher)


def _examine(study: DecoderStudy, entry: Entry, seen: Outlook, target: Outlook) -> None:
    """Take the entry into the study, or note why it is left out."""
    refusal = seen.refusal or target.refusal
    if not refusal and abs(seen.parameters / target.parameters - 1) > NEAR:
        refusal = (
            f"no number of layers comes within {NEAR:.0%} of {target.parameters:,} parameters (nearest: "
            f"{seen.parameters:,}), for embeddings stay"
        )
    if refusal:
        study.refused[entry.label] = refusal
    else:
        study.entries.append(entry)
        study.parameters[entry.label] = seen.parameters


def _depth(target: Outlook) -> int:
    """The number of the teacher's layers whose parameters are nearest to those of the narrower student."""
    total, layers = target.resolved.teacher_parameters, target.resolved.teacher_layers
    return min(range(1, len(layers) + 1), key=lambda n: abs(total - sum(layers[n:]) - target.parameters))


def _choose_layers(pool: Pool, options: Options, start: tuple[str, ...], study: DecoderStudy) -> None:
    """Block influence says which layers stay; how many is known. Where it fails, students of fewer layers are left out.

    Raises nothing: what failed is in `pool.errors`.
    """
    shallow = [entry for entry in study.entries if entry.arm.name in BY_DEPTH]
    if not shallow:
        return
    (measured,) = pool.run("layers", [BlockInfluence(spec(options, shallow[0], options.rates[0], options.seeds[0]))])
    for entry in shallow:
        if measured is None:
            study.entries.remove(entry)
            study.refused[entry.label] = "block influence could not be measured"
        else:
            depth = _config(entry.start, options).student.num_hidden_layers
            entry.start = (*start, *depth_overrides(most_influential(measured["influence"], depth)))


def _config(overrides: tuple[str, ...], options: Options):
    return command_line.parse([*overrides, *options.set])


def _cache_dir(options: Options):
    return cache_dir(_config(DECODER_BASE, options))
