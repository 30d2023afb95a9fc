"""The harness itself: which tasks are meant, and their scores of a checkpoint. Nothing here computes a score."""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from homodistil.data.tokenizer import check_ids, read_tokenizer
from homodistil.errors import UserError
from homodistil.evaluation.glue.checkpoint import FIELD, checkpoint_identity, readable
from homodistil.evaluation.trainer_arguments import on_cpu
from homodistil.models import FAMILIES
from homodistil.models.checkpoint_files import first_line
from homodistil.models.config_file import read_config

Results = dict[str, Any]
"""What `lm_eval.simple_evaluate` returns, without its samples."""


class Tasks(NamedTuple):
    specs: list[str]
    """Names and paths, as the manager loads them."""
    manager: Any
    """An `lm_eval.tasks.TaskManager`."""


def check_installed() -> None:
    """Raise `UserError` where the harness is not installed. It is an extra: training and export do without it."""
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise UserError(
            f"lm-eval: EleutherAI's harness cannot be imported ({first_line(error)}); install it with "
            f"pip install 'lm_eval>=0.4.13,<0.5'"
        ) from None


def check_checkpoint(folder: str) -> None:
    """Raise `UserError` for a model that predicts no next token, or whose tokenizer cannot be read."""
    config = read_config(folder, FIELD)
    family = FAMILIES.get(config.model_type)
    if family is not None and not family.is_causal:
        raise UserError(
            f"{FIELD}: {folder!r} is a {config.model_type}, a masked language model, and lm-eval scores causal ones; "
            f"use homodistil glue or homodistil squad"
        )
    check_ids(read_tokenizer(folder, FIELD), config.vocab_size, f"{FIELD}: the tokenizer of {folder!r}")


def open_tasks(names: Sequence[str]) -> Tasks:
    """Load all tasks and their data once, so that what is missing is known before any model is.

    Args:
        names: of tasks that the harness knows, task files, or folders of task files.

    Raises:
        UserError: no such task, or its data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every metric whose aggregation is the default
    specs = [spec for name in names for spec in _files(name)]
    # Reading the harness's own list takes seconds.
    manager = TaskManager(include_defaults=not all(map(_is_file, specs)))
    for spec in specs:
        try:
            manager.load([spec])
        except Exception as error:  # of YAML, of the harness, of datasets and the hub client
            raise UserError(
                f"--tasks: cannot load {spec!r} ({type(error).__name__}: {first_line(error)}); give a name of "
                f"`lm-eval ls tasks` where its data can be fetched, or a task file with data_files of its own"
            ) from None
    return Tasks(specs, manager)


def _files(name: str) -> list[str]:
    """A folder's task files; everything else as it is."""
    if _is_file(name) and not Path(name).is_file():
        raise UserError(f"--tasks: there is no file {name!r}; give an existing task file, a folder of such, or a name")
    if not Path(name).is_dir():
        return [name]
    files = [str(path) for path in sorted(Path(name).glob("*.y*ml")) if not path.name.startswith("_")]
    if not files:
        raise UserError(f"--tasks: the folder {name!r} has no task file; give one with .yaml files")
    return files


def _is_file(spec: str) -> bool:
    return spec.endswith((".yaml", ".yml"))


def score(folder: str, tasks: Tasks, arguments: argparse.Namespace) -> Results:
    """The harness's results for a checkpoint, in its own form; beside them `identity`, a hash of the checkpoint.

    Args:
        arguments: num_fewshot, limit, batch_size, dtype, device.

    Raises:
        UserError: the checkpoint cannot be loaded.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    device = "cpu" if on_cpu(arguments.device) else "cuda"
    with readable(folder):
        model = HFLM(pretrained=folder, device=device, dtype=arguments.dtype, batch_size=arguments.batch_size)
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks.specs),
        task_manager=tasks.manager,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        log_samples=False,
    )
    return results | {"identity": checkpoint_identity(folder)}
