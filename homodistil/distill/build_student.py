"""The student before the first step: the teacher's copy, some of the teacher's layers, or fresh weights.

student = build_student(config, teacher_config, load_teacher)      # fp32, on the CPU, the same on all ranks
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from homodistil.config.schema import RunConfig
from homodistil.distill.layer_map import copied_layers, layer_map_of
from homodistil.distill.student import Student
from homodistil.models import family_of
from homodistil.models.activations import ATTENTION
from homodistil.models.shapes import student_widths


def build_student(config: RunConfig, teacher_config, load_teacher: Callable[[], nn.Module]) -> Student:
    """The student of `config` with its projections.

    Args:
        teacher_config: the teacher's Hugging Face configuration.
        load_teacher: a copy of the teacher with tapped attention and the student's dropout, fp32.

    Raises:
        UserError: the student cannot start like that (`check_student`), or has an impossible size.
    """
    layer_map = layer_map_of(config, teacher_config)
    with torch.random.fork_rng(devices=[]):  # what is random here is a matter of the seed, not of what ran before
        torch.manual_seed(config.train.seed)
        if config.student.init == "random":
            model = fresh_model(config, teacher_config)
        else:
            model = load_teacher()
            family = family_of(model.config.model_type)
            family.keep_layers(model, copied_layers(config.student, teacher_config.num_hidden_layers))
        return Student(model, config.loss, layer_map=layer_map)


def fresh_model(config: RunConfig, teacher_config) -> nn.Module:
    """A stock model of the target size, initialised as Hugging Face does; its softmax scale is its own."""
    family = family_of(teacher_config.model_type)
    with torch.device("meta"):
        teacher_widths = family.axis_table(family.empty_model(teacher_config)).widths
    _, target = student_widths(config.student, teacher_widths)
    shape = family.student_config(teacher_config, target)
    family.set_dropout(shape, config.student.dropout)
    model = family.empty_model(shape)
    model.set_attn_implementation(ATTENTION)
    return model
