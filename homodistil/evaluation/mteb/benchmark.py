"""MTEB itself: which tasks are meant, and their scores of a checkpoint. Nothing here computes a score."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from homodistil.errors import UserError, nearest
from homodistil.evaluation.mteb.checkpoints import Checkpoint
from homodistil.models.checkpoint_files import first_line

PACKAGES = ("mteb", "sentence_transformers")


def check_installed() -> None:
    """Raise `UserError` where a package is not installed. They are extras: training and export do without them."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"mteb: {package} cannot be imported ({first_line(error)}); install it with "
                f"pip install 'mteb>=2.26' sentence-transformers"
            ) from None


def open_tasks(names: Sequence[str]) -> list[Any]:
    """The tasks (`mteb.abstasks.AbsTask`) of these names and folders, each once, in this order. Only the data of
    folders are read.

    Raises:
        UserError: no such task or benchmark, or a folder that is not in the format of BEIR.
    """
    import mteb

    logging.getLogger("mteb").setLevel(logging.ERROR)  # it warns of every prompt that an embedder has not
    tasks: dict[str, Any] = {}
    for name in names:
        for task in _tasks(mteb, name):
            if task.metadata.modalities != ["text"]:
                raise UserError(f"--tasks: {task.metadata.name!r} of {name!r} is not of texts alone; leave it out")
            if Path(name).is_dir() and task.metadata.name in tasks:
                raise UserError(f"--tasks: {name!r} has the name of another task; rename the folder")
            tasks.setdefault(task.metadata.name, task)
    return list(tasks.values())


def _tasks(mteb, name: str) -> list[Any]:
    if Path(name).is_dir():
        from homodistil.evaluation.mteb.retrieval_data import retrieval_task

        return [retrieval_task(Path(name))]
    benchmarks = {benchmark.name: benchmark for benchmark in mteb.get_benchmarks()}
    if name in benchmarks:
        return list(benchmarks[name].tasks)
    try:
        return [mteb.get_task(name)]
    except KeyError:
        known = [*benchmarks, *(task.metadata.name for task in mteb.get_tasks(exclude_superseded=False))]
        raise UserError(
            f"--tasks: found {name!r}, allowed are names of tasks and benchmarks of MTEB, such as NanoBEIR or "
            f"STSBenchmark, and folders with corpus.jsonl, queries.jsonl and qrels/test.tsv{nearest(name, known)}"
        ) from None


def score(checkpoint: Checkpoint, task, batch_size: int, prediction_folder: str | None = None) -> dict[str, Any]:
    """MTEB's `result` of a task; beside it its main_score (mean over subsets and splits), metric and parameters.

    Args:
        prediction_folder: where MTEB writes what was found for each query of a retrieval task.

    Raises:
        UserError: the data of the task cannot be had.
    """
    import mteb

    _load_data(task)
    results = mteb.evaluate(
        checkpoint.model,
        task,
        co2_tracker=False,
        encode_kwargs={"batch_size": batch_size},
        cache=None,  # its key is a name, which a student may share with its teacher
        prediction_folder=prediction_folder,
        show_progress_bar=False,
    )
    (result,) = results.task_results
    facts = {
        "main_score": result.get_score(),
        "metric": task.metadata.main_score,
        "parameters": checkpoint.num_parameters,
    }
    return facts | {"result": result.model_dump(mode="json")}


def _load_data(task) -> None:
    if task.data_loaded:
        return
    try:
        task.load_data()
    except Exception as error:  # of datasets and the hub client
        raise UserError(
            f"--tasks: cannot load the data of {task.metadata.name!r} ({type(error).__name__}: {first_line(error)}); "
            f"they come from the hub, or its cache: run it where that can be reached once, or leave the task out"
        ) from None
