"""What is trained, at every width it will have: the student on the meta device, and the schedule; without weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BertConfig

from homodistil.config.schema import RunConfig
from homodistil.data.sources import assets
from homodistil.distill.build_student import build_student
from homodistil.distill.student import Student
from homodistil.distill.teacher import load_config, load_tokenizer
from homodistil.distill.teacher_sharding import num_parameters
from homodistil.models import family_of
from homodistil.models.activations import ATTENTION
from homodistil.models.axes import Widths
from homodistil.models.shapes import student_widths
from homodistil.models.weights import has_weights
from homodistil.pruning.pruner import width_schedule
from homodistil.training.inputs import check_shape, check_teacher, found_teacher

# Hugging Face's `BertConfig()` is bert-base-uncased. A hub that cannot be reached takes its time to say so.
_KNOWN = {"bert-base-uncased", "google-bert/bert-base-uncased"}


@dataclass(frozen=True)
class WidthPhase:
    """Steps between two events."""

    widths: Widths
    first_step: int
    num_steps: int


@dataclass(frozen=True)
class ResolvedRun:
    config: RunConfig
    student: Student
    """On the meta device, at its first widths."""
    teacher_widths: Widths
    teacher_parameters: int
    teacher_layers: list[int]
    """Parameters of each of its layers."""
    teacher_tensors: int
    """Number of parameter tensors in all its layers."""
    vocab_size: int
    stretches: list[WidthPhase]
    note: str
    """What was assumed, empty if nothing was."""


def resolve_run(config: RunConfig) -> ResolvedRun:
    """Raises `UserError`: no such teacher, or a target or schedule that it cannot be cut by."""
    shape = _teacher_shape(config)
    family = family_of(shape.model_type)
    shape._attn_implementation = ATTENTION
    with torch.device("meta"):
        teacher = family.empty_model(shape)
        student = build_student(config, shape, lambda: family.empty_model(shape))
    widths = family.axis_table(teacher).widths
    stretches, note = _stretches(config, widths)
    layers = family.layers(teacher)
    sizes = [num_parameters(layer) for layer in layers]
    num_tensors = sum(1 for layer in layers for _ in layer.parameters())
    return ResolvedRun(
        config, student, widths, num_parameters(teacher), sizes, num_tensors, shape.vocab_size, stretches, note
    )


def check_plannable(config: RunConfig) -> None:
    """Refuse what a run would refuse of this teacher: its weights and tokenizer where they lie in a folder.

    A folder with a config.json and no weights, and a hub name, are judged by their configuration.

    Raises:
        UserError: as `run_inputs.check_teacher` and `load_tokenizer`.
    """
    shape, folder = _teacher_shape(config), Path(found_teacher(config))
    if folder.is_dir() and has_weights(folder):
        check_teacher(config)
        load_tokenizer(str(folder), shape.vocab_size)
    else:
        check_shape(config, shape)


def _teacher_shape(config: RunConfig):
    """Its configuration."""
    name = config.teacher.name
    if assets.is_embedded(name):
        assets.check_teacher(name)
        return load_config(str(assets.teacher_folder(name, Path(config.data.cache_dir).expanduser())))
    return BertConfig() if name in _KNOWN else load_config(name)


def _stretches(config: RunConfig, teacher: Widths) -> tuple[list[WidthPhase], str]:
    initial, target = student_widths(config.student, teacher)
    schedule = width_schedule(config, teacher, initial, target)
    note = ""
    table = schedule.table
    if config.pruning.schedule == "gap" and not table:
        table = {round(config.pruning.end_fraction * config.train.steps): target}
        note = "pruning.schedule=gap decides on the way: full width is assumed until pruning.end_fraction"
    steps, widths, found = config.train.steps, dict(initial), []
    for start, end in itertools.pairwise(sorted({0, steps, *(step for step in table if step < steps)})):
        widths = widths | dict(table.get(start, {}))
        found.append(WidthPhase(dict(widths), start, end - start))
    return found, note
