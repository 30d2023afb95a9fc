"""The teacher of a study that can have any: what its runs begin with, and students of a factor of its width."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from experiments.quality.arms import BASE, SHAPES
from experiments.quality.decoder_arms import DECODER_BASE
from experiments.quality.decoder_study import CORRECTION
from experiments.quality.options import Options
from experiments.quality.shallow_teacher import first_layers
from experiments.quality.specs import Shape
from homodistil.config import command_line
from homodistil.distill.teacher import load_config
from homodistil.errors import UserError
from homodistil.models import family_of
from homodistil.models.proposed_shapes import in_proportion, possible_heads
from homodistil.training.teacher_checks import cache_dir, found_teacher

BERT_TINY = "embedded:bert-tiny"
FACTORS = {"half": 0.5, "quarter": 0.25, "eighth": 0.125}
"""Of the teacher's hidden size; heads and neurons shrink with it."""
DECODER_EVAL_BLOCKS = 128
"""Held-out blocks a half of a decoder, which is judged at every token."""


@dataclass(frozen=True)
class StudyTeacher:
    name: str
    """As on the command line."""
    config: PretrainedConfig
    start: tuple[str, ...]
    """What all runs begin with."""
    eval_blocks: int | None

    @property
    def is_causal(self) -> bool:
        return family_of(self.config.model_type).is_causal

    def at_width(self, width: str) -> tuple[str, ...]:
        """`start` and the target size of the students. BERT-tiny's are those of the other studies."""
        shape = SHAPES[width] if self.name == BERT_TINY else proportional(self.config, FACTORS[width])
        groups = ("student.num_key_value_heads=null",) if self.is_causal else ()  # the recipe has some of its own
        return (*self.start, *shape.overrides, *groups)


def proportional(teacher: PretrainedConfig, factor: float) -> Shape:
    """The shape at a factor of the teacher's hidden size, with heads in proportion, as all rows were measured.

    Raises nothing: whether it can be cut is for the product.
    """
    family = family_of(teacher.model_type)
    with torch.device("meta"):
        widths = family.axis_table(family.empty_model(teacher)).widths
    hidden_size, num_heads = round(factor * teacher.hidden_size), factor * teacher.num_attention_heads
    counts = possible_heads(hidden_size, widths, family.whole_heads)
    heads = min(counts, key=lambda count: abs(count - num_heads), default=None)
    wanted = {"hidden_size": hidden_size, "intermediate_size": None, "num_attention_heads": heads}
    return Shape(*in_proportion(wanted, widths, family.whole_heads))


def study_teacher(options: Options, work: Path) -> StudyTeacher:
    """The teacher that --teacher and --layers ask for; the first layers of a decoder become a folder in `work`.

    Raises:
        UserError: it cannot be had, or --layers with an encoder.
    """
    config = _shape(options, BASE, options.teacher)
    if not family_of(config.model_type).is_causal:
        if options.layers:
            raise UserError("--layers: only of a decoder; an encoder is taken whole")
        return StudyTeacher(options.teacher, config, (*BASE, f"teacher.name={options.teacher}"), options.eval_blocks)
    name = options.teacher
    if options.layers:
        name = first_layers(name, options.layers, work, cache_dir(command_line.parse([*DECODER_BASE, *options.set])))
    correction = () if name == options.teacher else CORRECTION
    start = (*DECODER_BASE, f"teacher.name={name}", *correction)
    blocks = options.eval_blocks or DECODER_EVAL_BLOCKS
    return StudyTeacher(options.teacher, _shape(options, DECODER_BASE, name), start, blocks)


def _shape(options: Options, base: tuple[str, ...], name: str) -> PretrainedConfig:
    return load_config(found_teacher(command_line.parse([*base, f"teacher.name={name}", *options.set])))
