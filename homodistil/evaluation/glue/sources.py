"""Loads labelled examples from folders of the official TSV files, nyu-mll/glue on the hub, or packaged data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from homodistil.data.sources import assets
from homodistil.errors import UserError
from homodistil.evaluation.glue.tasks import MOVIE, TASKS, Task, find_task
from homodistil.evaluation.glue.tsv import Split, class_number, read_split

HUB = "hub"
HUB_NAME = "nyu-mll/glue"
PACKAGED = {"stsb": "embedded:sts-b", MOVIE.name: "embedded:movie"}


class TaskData(NamedTuple):
    """The examples of one task."""

    train: Split
    dev: Mapping[str, Split]
    """Key of `Task.dev` -> split."""

    @property
    def num_examples(self) -> int:
        return sum(len(split.labels) for split in (self.train, *self.dev.values()))

    @property
    def fingerprint(self) -> str:
        """sha256 over every text and label."""
        digest = hashlib.sha256()
        for split in (self.train, *self.dev.values()):
            for texts, label in zip(split.texts, split.labels, strict=True):
                digest.update("\t".join((*texts, repr(label), "\n")).encode())
        return digest.hexdigest()


def chosen_tasks(names: str, source: str) -> list[Task]:
    """The tasks of a comma-separated list; "all" means every task that the source has.

    Raises:
        UserError: an unknown task or source, or a task that the source does not have.
    """
    available = _available(source)
    if names == "all":
        return [find_task(name) for name in available]
    tasks = [find_task(name.strip()) for name in dict.fromkeys(names.split(","))]
    for task in tasks:
        if task.name not in available:
            raise UserError(
                f"--tasks: found {task.name!r}, --data {source} has {', '.join(available)}; choose one of these, or "
                f"give --data {PACKAGED.get(task.name, 'the glue_data folder')}"
            )
    return tasks


def load_task(task: Task, source: str, cache_dir: Path) -> TaskData:
    """Training and dev examples of a task.

    Args:
        source: folder with TITLE/train.tsv (glue_data), "hub", "embedded", "embedded:sts-b" or "embedded:movie".
        cache_dir: folder for packaged data.

    Raises:
        UserError: a folder, file or split is missing, or has not the layout of the task; or the package or hub cannot
            be reached.
    """
    if source == HUB:
        return _from_hub(task)
    if assets.is_embedded(source):
        return _from_folder(task, assets.labelled_folder(PACKAGED[task.name], cache_dir))
    return _from_folder(task, Path(source).expanduser())


def _available(source: str) -> list[str]:
    if source == assets.EMBEDDED:
        return list(PACKAGED)
    if assets.is_embedded(source):
        assets.check_labelled(source)
        return [name for name, packaged in PACKAGED.items() if packaged == source]
    if source != HUB and not Path(source).expanduser().is_dir():
        raise UserError(
            f"--data: found {source!r}, which is no folder; allowed: the glue_data folder, {HUB}, {assets.EMBEDDED}, "
            f"{', '.join(PACKAGED.values())}"
        )
    return list(TASKS)


def _from_folder(task: Task, folder: Path) -> TaskData:
    files = {name: folder / task.title / name for name in ("train.tsv", *task.dev.values())}
    for name, file in files.items():
        if file.exists() and not file.is_file():
            raise UserError(f"{file}: is not a regular file; give the folder of the official files")
        if not file.is_file():
            where = file.parent if file.parent.is_dir() else folder
            names = ", ".join(sorted(path.name for path in where.iterdir())[:12]) or "nothing"
            raise UserError(
                f"{file}: not found (found in {where}: {names}); {task.title} needs {', '.join(files)} in a folder "
                f"{task.title!r}; add {name}, or leave {task.name} out of --tasks"
            )
    return TaskData(
        read_split(task, files["train.tsv"]), {key: read_split(task, files[name]) for key, name in task.dev.items()}
    )


def _from_hub(task: Task) -> TaskData:
    import datasets

    try:
        splits = datasets.load_dataset(HUB_NAME, task.name)
    except Exception as error:  # datasets and the hub client raise exceptions of many types
        reason = (str(error).strip().splitlines() or ["no message"])[0][:300]
        raise UserError(
            f"--data: cannot load {HUB_NAME}, {task.name}, from the hub ({type(error).__name__}: {reason}); check the "
            f"connection, or give the folder of the official files, or {assets.EMBEDDED}"
        ) from None
    return from_hub_splits(task, splits)


def from_hub_splits(task: Task, splits: Mapping) -> TaskData:
    """Examples from the splits on the hub. Raises `UserError` for a missing split or column, or other label names."""
    wanted = {key: name.removesuffix(".tsv").replace("dev", "validation") for key, name in task.dev.items()}
    for name in ("train", *wanted.values()):
        if name not in splits:
            raise UserError(
                f"{HUB_NAME}, {task.name}: found splits {', '.join(splits)}, needs train, "
                f"{', '.join(wanted.values())}; give the folder of the official files"
            )
    return TaskData(
        _hub_split(task, "train", splits["train"]),
        {key: _hub_split(task, name, splits[name]) for key, name in wanted.items()},
    )


def _hub_split(task: Task, name: str, rows) -> Split:
    where = f"{HUB_NAME}, {task.name}, {name}"
    columns = task.hub_texts or task.texts
    if missing := [column for column in (*columns, "label") if column not in rows.column_names]:
        raise UserError(
            f"{where}: found columns {', '.join(rows.column_names)}, needs {', '.join((*columns, 'label'))} "
            f"(missing: {', '.join(missing)}); give the folder of the official files"
        )
    names = getattr(rows.features["label"], "names", None)
    if task.labels is not None and names != list(task.labels.values()):
        raise UserError(
            f"{where}: found labels {names}, {task.title} allows {list(task.labels.values())} in this order; "
            f"give the folder of the official files"
        )
    # The same check as for files; on the hub, examples without a label have -1.
    spelling = {i: label for i, label in enumerate(task.labels)} if task.labels else {}
    labels = [class_number(task, where, spelling.get(value, str(value))) for value in rows["label"]]
    return Split(list(zip(*(rows[column] for column in columns), strict=True)), labels)
