"""`--task N --tasks M` of launcher/prepare_data.py: the index of this array task, and the number of array tasks."""

from __future__ import annotations

import argparse

from homodistil.errors import UserError


def split_task(argv: list[str]) -> tuple[tuple[int, int], list[str]]:
    """((task, tasks), all other arguments); (0, 1) if neither option is given.

    Raises:
        UserError: only one option is given, a value is not a number, or not 0 <= task < tasks.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task")
    parser.add_argument("--tasks")
    try:
        options, rest = parser.parse_known_args(argv)
    except (argparse.ArgumentError, SystemExit):
        raise UserError("--task: expected a number after it, for example --task 0 --tasks 4") from None
    if options.task is None and options.tasks is None:
        return (0, 1), rest
    return _checked(options.task, options.tasks), rest


def _checked(task: str | None, tasks: str | None) -> tuple[int, int]:
    if task is None or tasks is None:
        missing = "--task" if task is None else "--tasks"
        raise UserError(f"{missing}: missing; give both, for example --task 0 --tasks 4")
    if not (task.isdecimal() and tasks.isdecimal() and int(task) < int(tasks)):
        raise UserError(
            f"--task: found {task} of --tasks {tasks}, allowed are 0 .. --tasks - 1; number array tasks from 0 "
            f"(sbatch --array=0-7 goes with --tasks 8)"
        )
    return int(task), int(tasks)
