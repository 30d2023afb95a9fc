"""What follows from a run config and its teacher's configuration, worked out once: family, widths, schedule, layers.

    resolved = resolve_run(config, load_config(folder))      # no weights are read
    resolved.teacher_widths, resolved.initial, resolved.target, resolved.make_schedule()

Start-up checks, the summary, the run itself, its plan and the check before it read it from here.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig

from homodistil.config.plugins import load_plugins
from homodistil.config.schema import PruningConfig, RunConfig, StudentConfig
from homodistil.data.sources.teachers import cached_teacher
from homodistil.data.task import Task, task_of
from homodistil.distill.build_student import build_student
from homodistil.distill.layer_map import (
    LayerMap,
    check_student,
    compared_layers,
    copied_layers,
    layer_map_of,
    starts_whole,
)
from homodistil.distill.student import Student
from homodistil.distill.teacher import load_config
from homodistil.distill.teacher_sharding import num_parameters
from homodistil.models import family_of
from homodistil.models.activations import attention_implementation
from homodistil.models.axes import Widths, first_layers, num_layers
from homodistil.models.checkpoint_files import local_folder
from homodistil.models.family import ModelFamily
from homodistil.models.head_dim import check_head_dim
from homodistil.models.known_configs import known_config
from homodistil.models.shapes import check_multiples, check_stock, student_widths
from homodistil.models.size_search import find_shape
from homodistil.models.stock_shape import Shape
from homodistil.pruning.depth_schedule import DepthSchedule, depth_schedule
from homodistil.pruning.milestones import Route, plan_route
from homodistil.pruning.pruner import width_schedule
from homodistil.pruning.schedule_protocol import Schedule
from homodistil.training.embedder import teacher_of_folder
from homodistil.training.rate_choice import rate_of_width
from homodistil.training.schedule_choice import with_schedule
from homodistil.training.vocabulary_size import planned_config, vocabulary_size


@dataclass(frozen=True)
class WidthPhase:
    """Steps between two events."""

    widths: Widths
    first_step: int
    num_steps: int


@dataclass(frozen=True)
class ResolvedRun:
    config: RunConfig
    family: ModelFamily
    """Family of teacher and student (models/)."""
    teacher_config: PretrainedConfig
    """The teacher's Hugging Face configuration. Not to be changed: copy it."""
    teacher: nn.Module
    """Without weights, on the meta device."""
    teacher_widths: Widths
    layer_map: LayerMap
    """Which teacher layer each layer of the student is compared with."""
    initial: Widths
    """Widths of the student before the first event."""
    targets: Widths
    """Final widths of every layer that the student starts with."""
    depth: DepthSchedule
    """When layers leave."""
    route: Route
    """Milestones on the way."""
    table: dict[int, Widths]
    """Step -> widths that are due there, where the schedule knows it beforehand. Axes that do not change are absent."""

    def make_schedule(self) -> Schedule:
        """A new one: the closed loop's has a state."""
        layers = schedule_layers(self.depth, self.initial)
        ends = first_layers(self.initial, layers), first_layers(self.targets, layers)
        return width_schedule(self.pruning, self.config.train.steps, *ends, self.route)

    @property
    def target(self) -> Widths:
        """Final widths of the student."""
        return first_layers(self.targets, len(compared_layers(self.config.student, num_layers(self.teacher_widths))))

    @property
    def pruning(self) -> PruningConfig:
        """The section of the config, with the schedule that `auto` stands for."""
        return with_schedule(self.config)

    @property
    def learning_rate(self) -> float:
        """At its peak: `train.lr`, or what suits the student's final width where that is left open."""
        if self.config.is_set("train.lr"):
            return self.config.train.lr
        return rate_of_width(self.last_hidden, self.family.is_causal or self.task.has_labels)

    @property
    def last_hidden(self) -> int:
        """Hidden size that the student ends with: its first one if nothing is cut."""
        return (self.initial if self.pruning.schedule == "none" else self.target)["hidden"]

    def build_student(self, load_teacher: Callable[[], nn.Module]) -> Student:
        """The student at its first widths. `load_teacher`: as in `distill.build_student`."""
        config = self.config
        sections = config.student, config.pruning, config.loss, config.train.seed
        shapes = self.teacher_config, self.layer_map, self.target
        return build_student(*sections, *shapes, load_teacher, self.task.head)

    @functools.cached_property
    def student(self) -> Student:
        """On the meta device, at its first widths."""
        shape = copy.deepcopy(self.teacher_config)
        shape._attn_implementation = attention_implementation(self.family)
        with torch.device("meta"):
            return self.build_student(lambda: self.family.empty(shape, self.task.head))

    @functools.cached_property
    def teacher_parameters(self) -> int:
        return num_parameters(self.teacher)

    @functools.cached_property
    def teacher_layers(self) -> list[int]:
        """Parameters of each of its layers."""
        return [num_parameters(layer) for layer in self.family.layers(self.teacher)]

    @property
    def teacher_tensors(self) -> int:
        """Number of parameter tensors in all its layers."""
        return sum(1 for layer in self.family.layers(self.teacher) for _ in layer.parameters())

    @property
    def task(self) -> Task:
        """What the models learn to predict."""
        return task_of(self.config.data, self.family.task)

    @property
    def vocab_size(self) -> int:
        return self.teacher_config.vocab_size

    @functools.cached_property
    def phases(self) -> list[WidthPhase]:
        """The widths over all steps. Where the closed loop decides on the way, full width until its end (`note`)."""
        config, table = self.config, self.table
        if self.note:
            table = {round(config.pruning.end_fraction * config.train.steps): self.target}
        steps, widths, phases = config.train.steps, dict(self.initial), []
        changes = {0, steps, *(step for step in (*table, *self.depth.table) if step < steps)}
        for start, end in itertools.pairwise(sorted(changes)):
            widths = first_layers(widths | dict(table.get(start, {})), self.depth.table.get(start, num_layers(widths)))
            phases.append(WidthPhase(dict(widths), start, end - start))
        return phases

    @property
    def note(self) -> str:
        """What `phases` assumes, empty if nothing."""
        if self.config.pruning.schedule == "gap" and not self.table:
            return "pruning.schedule=gap decides on the way: full width is assumed until pruning.end_fraction"
        return ""

    @property
    def vocabulary_note(self) -> str:
        """What is assumed of the vocabulary before text has been counted, empty if nothing."""
        if vocabulary_size(self.config.student) is None:
            return ""
        vocab, pieces = self.config.student.vocab, self.vocab_size
        return f"student.vocab={vocab}: {pieces:,} pieces are assumed; which ones stay is known once text is counted"


def resolve_run(config: RunConfig, teacher_config: PretrainedConfig | None = None) -> ResolvedRun:
    """What `config` makes of a teacher. No weights are read.

    Args:
        teacher_config: of the teacher, where it has been found; None: of the one that `config` names.

    Raises:
        UserError: no such teacher, or a start, target or schedule that it cannot be cut by.
    """
    shape = teacher_config or named_teacher_config(config)
    family = family_of(shape.model_type)
    with torch.device("meta"):
        teacher = family.empty(shape, task_of(config.data, family.task).head)
    widths = family.axis_table(teacher).widths
    pruning = with_schedule(config)
    check_student(config.student, pruning, config.loss, shape.num_hidden_layers)
    check_multiples(pruning, widths)
    check_head_dim(config.student.head_dim, family, shape, widths)
    sized = _sized(config.student, family, teacher)
    begins_whole = starts_whole(config.student, pruning)
    initial, targets = student_widths(config.student, widths, sized, family.whole_heads, begins_whole)
    check_stock(family, targets, widths)
    depth = _depth_schedule(config, shape.num_hidden_layers)
    layers = schedule_layers(depth, initial)
    ends = first_layers(initial, layers), first_layers(targets, layers)
    route = plan_route(config.run, pruning, widths, *ends)
    schedule = width_schedule(pruning, config.train.steps, *ends, route)
    return ResolvedRun(
        config=config,
        family=family,
        teacher_config=shape,
        teacher=teacher,
        teacher_widths=widths,
        layer_map=layer_map_of(config.student, pruning, shape),
        initial=initial,
        targets=targets,
        depth=depth,
        route=route,
        table=dict(schedule.table),
    )


def _depth_schedule(config: RunConfig, num_teacher_layers: int) -> DepthSchedule:
    student, pruning = config.student, config.pruning
    if not starts_whole(student, pruning):
        return DepthSchedule({}, None)
    final, chosen = copied_layers(student, num_teacher_layers), student.layer_choice == "influence"
    return depth_schedule(pruning, config.train.steps, num_teacher_layers, final, chosen)


def schedule_layers(depth: DepthSchedule, initial: Widths) -> int:
    """How many layers the schedule of widths is about: those that are there when the first width falls."""
    return depth.table.get(0, num_layers(initial))


def _sized(student: StudentConfig, family: ModelFamily, teacher: nn.Module) -> Shape | None:
    """The target that student.size or student.parameters lead to; None where neither is set.

    Args:
        teacher: on the meta device.
    """
    if student.size is None and student.parameters is None:
        return None
    layers, depth = family.layers(teacher), student.num_hidden_layers
    # Layers have the same shapes, so that any of them stand for those that stay.
    left = {id(parameter) for layer in layers[depth:] for parameter in layer.parameters()} if depth else set()
    shapes = {name: tuple(p.shape) for name, p in teacher.named_parameters() if id(p) not in left}
    field = "student.parameters" if student.size is None else "student.size"
    wanted = student.size * num_parameters(teacher) if student.parameters is None else student.parameters * 1e6
    whole = f"the teacher with {depth} of its {len(layers)} layers" if left else "the teacher"
    return find_shape(family.axis_table(teacher), shapes, wanted, field, family.whole_heads, whole).shape


def named_teacher_config(config: RunConfig) -> PretrainedConfig:
    """Configuration of `teacher.name`, without its weights; of one that everybody knows without asking the hub.

    With as many pieces as student.vocab says, as far as that is known without text.
    """
    return planned_config(config.student, _whole_teacher_config(config))


def _whole_teacher_config(config: RunConfig) -> PretrainedConfig:
    load_plugins(config.teacher.plugins, "teacher.plugins")
    name = config.teacher.name
    if (folder := cached_teacher(name, Path(config.data.cache_dir).expanduser())) is not None:
        return load_config(str(folder))
    if (known := known_config(name)) is not None:
        return known
    local = local_folder(name, "teacher.name")
    return load_config(name if local is None else str(teacher_of_folder(local)))
