"""The student before the first step: the teacher's copy, some of the teacher's layers, or fresh weights.

student = build_student(config.student, config.pruning, config.loss, seed, ...)   # fp32, on the CPU, alike on all ranks
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from homodistil.config.schema import LossConfig, PruningConfig, StudentConfig
from homodistil.distill.layer_map import LayerMap, starting_layers
from homodistil.distill.student import Student
from homodistil.models import family_of
from homodistil.models.activations import attention_implementation
from homodistil.models.axes import Widths
from homodistil.models.family_heads import HeadKind


def build_student(
    student: StudentConfig,
    pruning: PruningConfig,
    loss: LossConfig,
    seed: int,
    teacher_config,
    layer_map: LayerMap,
    target: Widths,
    load_teacher: Callable[[], nn.Module],
    head: HeadKind = "lm",
) -> Student:
    """The student with its projections.

    Args:
        seed: of weights that are drawn (train.seed).
        teacher_config: the teacher's Hugging Face configuration.
        layer_map: from `layer_map_of`.
        target: the student's final widths, with which fresh weights start.
        load_teacher: a copy of the teacher with tapped attention and the student's dropout, fp32.
        head: which one the student has; `load_teacher` gives it one of this kind.
    """
    with torch.random.fork_rng(devices=[]):  # what is random here is a matter of the seed, not of what ran before
        torch.manual_seed(seed)
        if student.init == "random":
            model = fresh_model(teacher_config, target, student.dropout, head)
        else:
            model = load_teacher()
            family = family_of(model.config.model_type)
            family.keep_layers(model, starting_layers(student, pruning, teacher_config.num_hidden_layers))
        return Student(model, loss, layer_map=layer_map)


def fresh_model(teacher_config, target: Widths, dropout: float, head: HeadKind = "lm") -> nn.Module:
    """A stock model of the target size, initialised as Hugging Face does; its softmax scale is its own."""
    family = family_of(teacher_config.model_type)
    shape = family.student_config(teacher_config, target)
    family.set_dropout(shape, dropout)
    model = family.empty(shape, head)
    model.set_attn_implementation(attention_implementation(family))
    return model
