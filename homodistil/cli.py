"""The command `homodistil`: what it can do, and how each of its commands starts and ends.

    homodistil train teacher.name=/models/bert data.sources=[/data/wiki] run.dir=/runs/half
    homodistil recipes quickstart

The scripts in launcher/ call `run` with the same names. Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from homodistil.distributed.graceful_stop import handle_signals


class Command(NamedTuple):
    """One subcommand."""

    summary: str
    place: str
    """module:function; the function takes the arguments behind the subcommand."""


COMMANDS = {
    "train": Command("distil a student, or several, from a teacher", "homodistil.cli:train"),
    "check": Command("say what would go wrong with a run, and try one step; trains nothing", "homodistil.cli:check"),
    "plan": Command("memory, time, energy and cost of a run before it starts", "homodistil.planning.options:main"),
    "prepare-data": Command("tokenise and cache the corpus ahead of a run", "homodistil.training.prepare_data:main"),
    "glue": Command("fine-tune a checkpoint on GLUE and write its table", "homodistil.evaluation.glue.command:main"),
    "squad": Command("fine-tune a checkpoint on SQuAD", "homodistil.evaluation.squad.command:main"),
    "mteb": Command("score sentence embedders on tasks of MTEB", "homodistil.evaluation.mteb.command:main"),
    "lm-eval": Command("score decoders on tasks of EleutherAI's harness", "homodistil.evaluation.lm_eval.command:main"),
    "probe": Command("what frozen features know of sentences", "homodistil.evaluation.probe.command:main"),
    "export": Command("a checkpoint as ONNX, int8 ONNX or OpenVINO", "homodistil.training.export_command:main"),
    "latency": Command("how fast checkpoints are in torch and ONNX", "homodistil.training.latency_command:main"),
    "report": Command("the HTML page of a run, or one that compares many", "homodistil.report.command:main"),
    "recipes": Command("list the shipped recipes; with a name, print one", "homodistil.cli:recipes"),
    "axes": Command("print what each axis of a teacher couples", "homodistil.training.show_axes:main"),
}
WITH_RANKS = ("train", "check", "plan")
"""Commands that take --ranks N."""


def main() -> None:
    """Entry point of the installed command."""
    handle_signals()  # first of all: what follows takes seconds
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name == "--version":
        from homodistil import __version__

        print(__version__)
    else:
        run(name, arguments)


def run(name: str, arguments: list[str]) -> None:
    """Carry out the command `name`; what it ends with is one line and an exit code (distributed/script_exit.py)."""
    from homodistil.distributed.script_exit import exit_with_code

    with exit_with_code():
        if name not in COMMANDS:
            _refuse(name)
        num_ranks = 1
        if name in WITH_RANKS:
            from homodistil.distributed.start_ranks import split_ranks

            num_ranks, arguments = split_ranks(arguments)
        module, _, function = COMMANDS[name].place.partition(":")
        action = getattr(importlib.import_module(module), function)
        if name in WITH_RANKS:
            action(arguments, num_ranks)
        else:
            _print_to_pipe(action, arguments)


def _print_to_pipe(action: Callable[[list[str]], None], arguments: list[str]) -> None:
    """`homodistil recipes | head` ends quietly: nobody reads on, and that is no error."""
    try:
        action(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what the interpreter flushes at its end


def usage() -> str:
    """The text of `homodistil --help`."""
    longest = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(longest)}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: homodistil COMMAND [ARGUMENTS]",
            "",
            "Make a small Transformer out of a big one, a little at a time.",
            "",
            *lines,
            "",
            "homodistil COMMAND --help explains a command's arguments; homodistil --version prints the version.",
        ]
    )


def _refuse(name: str) -> NoReturn:
    from homodistil.errors import UserError, nearest

    raise UserError(
        f"homodistil: found {name[:40]!r}, allowed: {', '.join(COMMANDS)}{nearest(name, COMMANDS)}; "
        f"homodistil --help explains them"
    )


def train(arguments: list[str], num_ranks: int = 1) -> None:
    """The command `homodistil train`, and with --check `homodistil check`."""
    from homodistil.config.command_line import parse_job
    from homodistil.distributed.rank_log import tag_lines
    from homodistil.metrics.progress import doing

    tag_lines()
    job = parse_job(arguments)
    if num_ranks > 1:
        _start_ranks(num_ranks)
    with doing("loading torch, DeepSpeed and Transformers"):  # not needed for --help and config errors
        if job.is_check:
            from homodistil.preflight import check as carry_out_check
        else:
            from homodistil.train import run as carry_out
    if job.is_check:
        sys.exit(carry_out_check(job))
    carry_out(job)


def check(arguments: list[str], num_ranks: int = 1) -> None:
    """The command `homodistil check`."""
    train([*arguments, "--check"], num_ranks)


def _start_ranks(num_ranks: int) -> NoReturn:
    from homodistil.distributed.start_ranks import start_ranks

    start_ranks(num_ranks)


def recipes(arguments: list[str]) -> None:
    """The command `homodistil recipes [NAME]`."""
    from homodistil.config.one_line_parser import OneLineParser
    from homodistil.config.shipped import recipe_names, recipe_path, recipe_summary

    parser = OneLineParser(description="List the shipped recipes, or print one as YAML.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to print")
    name = parser.parse_args(arguments).name
    if name is not None:
        print(recipe_path(name).read_text(encoding="utf-8"), end="")
        return
    longest = max(map(len, recipe_names()))
    for name in recipe_names():
        print(f"{name.ljust(longest)}  {recipe_summary(name)}")


if __name__ == "__main__":
    main()
