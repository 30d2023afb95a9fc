"""All runs of a command: tasks x learning rates x batch sizes x epochs x seeds, with one JSON file per finished run.

An interrupted command continues where it stopped: runs that have a file are not repeated. A file of another checkpoint,
other data or other settings is an error, and is never overwritten.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from homodistil.errors import UserError
from homodistil.evaluation import progress
from homodistil.evaluation.glue.checkpoint import (
    checkpoint_folder,
    checkpoint_identity,
    load_classifier,
    load_tokenizer,
)
from homodistil.evaluation.glue.fine_tuning import Settings, encode, train
from homodistil.evaluation.glue.sources import TaskData, load_task
from homodistil.evaluation.glue.tasks import Task, find_task
from homodistil.evaluation.trainer_arguments import Settings as TrainerSettings
from homodistil.evaluation.trainer_arguments import on_cpu
from homodistil.files import to_json, write_atomically

Record = dict[str, Any]
"""One finished run: task, checkpoint (as given), identity, setting (lr, batch_size, epochs, seed), result."""

_VARIED = ("lr", "batch_size", "epochs", "seed")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values of the hyperparameters that vary, and the settings that all runs share."""

    lrs: Sequence[float]
    batch_sizes: Sequence[int]
    epochs: Sequence[int]
    seeds: Sequence[int]
    shared: Settings

    @classmethod
    def of(cls, arguments: argparse.Namespace, shared: Settings) -> Grid:
        """The grid of the arguments of a command (`command_line.fine_tuning_parser`)."""
        return cls(
            lrs=arguments.lr,
            batch_sizes=arguments.batch_size,
            epochs=arguments.epochs,
            seeds=arguments.seeds,
            shared=shared,
        )

    def settings(self) -> Iterator[Settings]:
        """The settings of all runs; the seed varies fastest."""
        values = itertools.product(self.lrs, self.batch_sizes, self.epochs, self.seeds)
        for value in dict.fromkeys(values):
            yield dataclasses.replace(self.shared, **dict(zip(_VARIED, value, strict=True)))


def run_grid(
    checkpoint: str, tasks: list[Task], source: str, grid: Grid, out: Path, cache_dir: Path, say: Callable[[str], None]
) -> list[Record]:
    """Do all runs that are not finished yet, and return all records in `out`.

    Checkpoint, data and `out` are checked before the first run.

    Args:
        checkpoint: folder, hub name or embedded:NAME.
        source: see `sources.load_task`.
        out: folder for the records.
        cache_dir: folder for packaged data and models.
        say: called with one line per task, and two per run, when it begins and when it has finished.

    Raises:
        UserError: checkpoint or data cannot be used, or `out` holds results of another checkpoint, data or settings.
    """
    on_cpu(grid.shared.device)  # raises if there is no such device
    folder = checkpoint_folder(checkpoint, cache_dir)
    data = {task.name: load_task(task, source, cache_dir) for task in tasks}
    load_classifier(folder, tasks[0])
    load_tokenizer(folder, grid.shared.max_length, max(len(task.texts) for task in tasks))
    identity = checkpoint_identity(folder)
    identities = {task.name: _identity(identity, data[task.name], grid.shared) for task in tasks}
    finished = _read_all(out, identity, identities)
    check_out(out)
    for task in tasks:
        todo = [s for s in grid.settings() if _file(out, task, s) not in finished]
        say(f"{task.title}: {len(todo)} runs to do, {len(list(grid.settings())) - len(todo)} finished before")
        with progress.doing(f"{task.title}: tokenising {data[task.name].num_examples:,} examples"):
            encoded = encode(folder, task, data[task.name], grid.shared.max_length) if todo else None
        for number, settings in enumerate(todo, start=1):
            label = run_label(task.title, number, len(todo), settings)
            say(label)
            with progress.doing(label):
                result = train(folder, task, encoded, settings)
            record = {"task": task.name, "checkpoint": checkpoint, "identity": identities[task.name]}
            record |= {"setting": {name: getattr(settings, name) for name in _VARIED}, "result": result}
            file = _file(out, task, settings)
            write_output(file, to_json(record) + "\n")
            finished[file] = record
            say(f"{task.title}: {file.stem}: " + ", ".join(f"{n} {result[n]:.4f}" for n in task.result_names))
    return [finished[file] for file in sorted(finished)]


def run_label(title: str, number: int, num_runs: int, settings: TrainerSettings) -> str:
    """A line that identifies one run of a command."""
    epochs = f"{settings.epochs} epoch{'s'[: settings.epochs != 1]}"
    where = f"lr {settings.lr:g}, batch size {settings.batch_size}, {epochs}, seed {settings.seed}"
    return f"{title}: run {number} of {num_runs}, {where}"


def check_out(out: Path) -> None:
    """Make the folder for results. Raises `UserError` if it cannot be written to."""
    probe = out / f".writable-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--out: cannot write to {str(out)!r} ({error.strerror or error}); give a folder that can be written, with "
            f"free space"
        ) from None


def check_new(out: Path, file: str) -> None:
    """Raise `UserError` where `out` cannot be written to, or has `file`, which is never overwritten."""
    check_out(out)
    if (out / file).exists():
        raise UserError(f"--out: {str(out / file)!r} has the results of another call; give another --out")


def write_output(file: Path, text: str) -> None:
    """Write `text` to `file` atomically. Raises `UserError` if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be written ({error.strerror or error}); free disk space or give another --out, and run "
            f"the command again: finished runs are kept"
        ) from None


def _identity(checkpoint: str, data: TaskData, shared: Settings) -> dict[str, Any]:
    """Everything that affects a result and is not in the file name, except the device."""
    fixed = {name: value for name, value in dataclasses.asdict(shared).items() if name not in (*_VARIED, "device")}
    return {"checkpoint": checkpoint, "data": data.fingerprint, **fixed}


def _file(out: Path, task: Task, settings: Settings) -> Path:
    name = f"lr{settings.lr:g}-batch{settings.batch_size}-epochs{settings.epochs}-seed{settings.seed}.json"
    return out / task.name / name


def _read_all(out: Path, checkpoint: str, identities: dict[str, dict]) -> dict[Path, Record]:
    """File -> record of all finished runs. Records of tasks that are not requested now must only have the same
    checkpoint."""
    records = {}
    for file in sorted(out.glob("*/lr*.json")):
        record = read_record(file, lambda record: find_task(record["task"]).result_names)
        identity = record["identity"]
        expected = identities.get(record["task"], identity | {"checkpoint": checkpoint})
        if differing := [name for name, value in expected.items() if identity.get(name) != value]:
            shown = ", ".join(f"{n}: found {_short(identity.get(n))}, now {_short(expected[n])}" for n in differing)
            raise UserError(f"{file}: result of another run ({shown}); give another --out, or delete the old results")
        records[file] = record
    return records


def read_record(file: Path, names: Callable[[Record], Iterable[str]]) -> Record:
    """Read the record of a finished run.

    Args:
        names: record -> names of the numbers that its result must have.

    Raises:
        UserError: the file is not a complete record.
    """
    try:
        if not file.is_file():  # reading a pipe could wait for ever
            raise ValueError("no regular file")
        record = json.loads(file.read_text(encoding="utf-8"))
        setting, result = record["setting"], record["result"]
        for value in [*(setting[n] for n in _VARIED), *(result[n] for n in ("parameters", *names(record)))]:
            float(value)
        dict(record["identity"]), str(record["checkpoint"])
        return record
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{file}: found no result of a run; delete the file, or give another --out") from None


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
