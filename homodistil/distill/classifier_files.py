"""A teacher that is a classifier of texts or tokens: its files, and what its config says of its labels."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PretrainedConfig

from homodistil.distill.teacher import FIELD, load_config, read_whole
from homodistil.errors import UserError
from homodistil.models import family_of
from homodistil.models.checkpoint_files import local_folder, short
from homodistil.models.classifier import OF_TEXTS, OF_TOKENS, label_class
from homodistil.models.weights import check_finite, check_layers, check_present, stored_tensors, tell_unused

_CLASSES = {"scores": OF_TEXTS, "token_scores": OF_TOKENS}
"""Task (data/task.py) -> what its teachers are."""


def task_of_labels(config: PretrainedConfig) -> str | None:
    """The task of a teacher whose config.json names a class with a head of labels; None: it names no such class."""
    return next((task for task, kind in _CLASSES.items() if kind.named_by(config)), None)


def check_classifier(folder: str, allow_pickle: bool = False, say: Callable[[str], None] = lambda line: None) -> None:
    """Read the weights of a classifier once: all of it has to be there, its head too.

    Args:
        folder: of it, or a hub name.
        say: takes a line on tensors that the model does not use.

    Raises:
        UserError: as `load_model`; tensors missing, of another shape, quantised, NaN or infinite.
    """
    shape = load_config(folder)
    family, where, local = family_of(shape.model_type), f"{FIELD}: {folder!r}", local_folder(folder, FIELD)
    check_layers(stored_tensors(local, FIELD, allow_pickle) if local else {}, shape.num_hidden_layers, family, where)
    model, compared = read_whole(folder, allow_pickle, label_class(shape).auto_class)
    check_present(compared, where)
    check_finite(model, where)
    tell_unused(folder, compared, say)


def check_labels(config: PretrainedConfig, teacher: str, task: str = "scores") -> None:
    """Refuse a teacher whose logits cannot be read: the student's are in the same order, under the same names.

    Args:
        config: the teacher's.
        teacher: what the user named it.
        task: data.task: `scores` takes both kinds of classifiers.

    Raises:
        UserError: no such head, a family without one that can be cut, or labels that are not numbered 0, 1, ...
    """
    where, family = f"{FIELD}: {short(repr(teacher))}", family_of(config.model_type)
    kinds = ", ".join(config.architectures or ["no architectures in its config.json"])
    if family.is_causal and task_of_labels(config):
        raise UserError(
            f"{where} is a decoder with a head of labels ({kinds}), supported are those of encoders; give a "
            f"cross-encoder or classifier made of an encoder, or set data.task=causal to leave its head out"
        )
    wanted = (OF_TOKENS,) if task == "token_scores" else (OF_TEXTS, OF_TOKENS)
    if not any(kind.named_by(config) for kind in wanted):
        raise UserError(
            f"{where} has no head of labels that data.task={task} could learn from (found {kinds}, expected "
            f"{' or '.join(f'...{kind.architecture_end}' for kind in wanted)}); give a classifier (or, for "
            f"data.task=scores, a cross-encoder), or another data.task"
        )
    if not family.has_classifiers:
        raise UserError(
            f"{where}: heads of labels of the {family.name} family cannot be cut yet; set data.task=none to leave the "
            f"head out"
        )
    _check_names(config, where)


def _check_names(config: PretrainedConfig, where: str) -> None:
    names, numbers = config.id2label or {}, config.label2id or {}
    where, remedy = f"{where}: config.json", "set both maps as the head was trained"
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(
            f"{where} has id2label with the numbers {short(str(sorted(names)))}, expected 0 .. {len(names) - 1} "
            f"without gaps, one for each output of the head; {remedy}"
        )
    differing = [name for i, name in names.items() if numbers.get(name) != i]
    if len(set(names.values())) < len(names) or differing:
        name = differing[0] if differing else next(n for n in names.values() if list(names.values()).count(n) > 1)
        raise UserError(
            f"{where} has id2label and label2id that contradict each other at {short(repr(name))} (number "
            f"{[i for i, one in names.items() if one == name]} and {numbers.get(name)}); {remedy}"
        )
