"""What a run will make, a line per subject: task, target, layers, losses, rate, cuts. Known before any cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from homodistil.config.schema import LossConfig, RunConfig
from homodistil.data.prepare.texts import NO_PROMPT
from homodistil.distill.layer_map import copied_layers
from homodistil.distill.losses.active import active_terms
from homodistil.distill.teacher_sharding import num_parameters
from homodistil.metrics.term_labels import term_label
from homodistil.models.axes import Widths, first_layers, layer_widths, num_layers
from homodistil.models.stock_shape import is_grouped
from homodistil.pruning.schedule_protocol import Schedule
from homodistil.training.resolve import ResolvedRun


def run_summary(resolved: ResolvedRun) -> dict[str, str]:
    """Subject -> what is known of it: task, student, layers, parameters, losses, learning rate, pruning."""
    config, family, target = resolved.config, resolved.family, resolved.target
    if config.pruning.schedule == "none":
        target = first_layers(resolved.initial, num_layers(target))
    with torch.device("meta"):
        shape = family.student_config(resolved.teacher_config, target)
        student = family.empty(shape, resolved.task.head)
    start = "fresh weights" if config.student.init == "random" else f"from a copy of {config.teacher.name}"
    before, after = resolved.teacher_parameters, num_parameters(student)
    return {
        "task": _task(resolved),
        "student": f"{_shape(target, num_layers(resolved.target))}; {start}",
        "layers": _layers(resolved),
        "parameters": f"{before:,} (teacher) -> {after:,} ({after / before:.0%})",
        "losses": _losses(config.loss, resolved.task.name),
        "learning rate": _learning_rate(resolved),
        "pruning": _pruning(config, resolved.make_schedule(), resolved.initial, target),
    }


def _task(resolved: ResolvedRun) -> str:
    data, task = resolved.config.data, resolved.task
    if task.has_labels and data.pair_columns:
        first, second = data.pair_columns
        return f"{task.name}; logits of pairs ({first}, {second}) of at most {data.seq_len} tokens ({data.truncation})"
    if task.has_single_texts:
        prompt = f", each behind {data.prompt!r}" if data.prompt != NO_PROMPT else ""
        what = "logits of the tokens" if task.has_token_labels else "vectors" if task.has_vectors else "logits"
        return f"{task.name}; {what} of single texts ({data.texts}) of at most {data.seq_len} tokens{prompt}"
    if not task.has_lm_head:
        return f"{task.name}; nothing is masked or predicted"
    short = f"; blocks are split in {data.short_steps:.0%} of the steps" if data.short_steps else ""
    predicted = f"{task.target_rows(data):g} tokens of each block of {data.seq_len} are predicted, on average"
    return f"{task.name}; {predicted}{short}"


def _losses(loss: LossConfig, task: str) -> str:
    """Weights, and what terms compare that may compare more than one thing."""
    spaces = {"hidden": loss.hidden_space, "embedding": loss.hidden_space, "attention": loss.attention_target}
    compared = {name: f" ({space})" for name, space in spaces.items() if space != "auto"}
    return ", ".join(
        f"{term_label(name, task)} x {weight:g}{compared.get(name, '')}" for name, weight in loss.weights.items()
    )


def _learning_rate(resolved: ResolvedRun) -> str:
    origin = "" if "train.lr" in resolved.config.given else f", for a hidden size of {resolved.last_hidden} (train.lr)"
    return f"{resolved.learning_rate:g} at its peak{origin}"


def _shape(widths: Widths, layers: int) -> str:
    width = layer_widths(widths, 0)
    groups = f" in {_count(width.num_kv_heads, 'group')}" if is_grouped(widths) else ""
    return (
        f"{_count(layers, 'layer')}, hidden {widths['hidden']}, ffn {width.intermediate_size}, "
        f"{_count(width.num_heads, 'head')} of {width.qk_dim}{groups}"
    )


def _layers(resolved: ResolvedRun) -> str:
    """Where each layer comes from, and what it is compared with; in the teacher's numbers, from 0."""
    config, num_teacher_layers = resolved.config, resolved.teacher_config.num_hidden_layers
    compared = resolved.layer_map.layers
    copied = () if config.student.init == "random" else copied_layers(config.student, num_teacher_layers)
    origin = f"copies of {_teachers(copied, num_teacher_layers)}" if copied else "fresh weights"
    if resolved.depth.table:
        count = num_layers(resolved.target)
        stay = f"{count} by block influence" if resolved.depth.final is None else ", ".join(map(str, copied))
        origin = f"copies of all {num_teacher_layers} of the teacher's, of which {stay} stay; the others leave "
        origin += resolved.depth.describe()
        origin += ", and what they did is refitted" if config.pruning.compensation != "none" else ""
    by_layer = [term.name for term in active_terms(config.loss) if term.needs & {"hidden", "queries_keys"}]
    if not by_layer:
        return f"{origin}; no loss compares them with the teacher's"
    if resolved.depth.table:
        return f"{origin}; compared ({', '.join(by_layer)}) with the last one before the next that stays"
    with_which = "their own" if copied == compared else _teachers(compared, num_teacher_layers)
    return f"{origin}; compared ({', '.join(by_layer)}) with {with_which}"


def _teachers(layers: Sequence[int], num_teacher_layers: int) -> str:
    if len(layers) == num_teacher_layers:
        return f"all {num_teacher_layers} of the teacher's"
    return f"the teacher's {', '.join(map(str, layers))}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _pruning(config: RunConfig, schedule: Schedule, initial: Widths, target: Widths) -> str:
    pruning, steps = config.pruning, config.train.steps
    if all(initial[axis] == width for axis, width in target.items()):
        return f"nothing is cut in {steps} steps"
    return f"{pruning.schedule}, {schedule.describe()} (of {steps}); compensation {pruning.compensation}"
