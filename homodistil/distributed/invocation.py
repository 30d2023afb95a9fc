"""What the user has typed: the command that started this script, through whatever launcher, and the one that continues.

A rank's own command line is what its launcher made of it. The outermost process above it that was given the same script
has the line as it was typed. Reads /proc; elsewhere, and under launchers that run on other machines, it is the rank's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

TYPED_VARIABLE = "HOMODISTIL_COMMAND"
"""Environment variable by which `--ranks N` (start_ranks.py) passes the typed command to the ranks."""
_typed: list[str] | None = None


def remember() -> None:
    """To be called at the start of a script: launchers may be gone when it ends."""
    global _typed
    handed_on = os.environ.get(TYPED_VARIABLE)
    _typed = shlex.split(handed_on) if handed_on else _shortened(_outermost())


def typed() -> list[str]:
    """Words of the command; this process's own where no script of ours was started."""
    return _typed if _typed is not None else [sys.executable, *sys.argv]


def own() -> str:
    """This process's command line; `python` alone where it runs no script of ours (a notebook, a user's program)."""
    interpreter = Path(sys.executable).name
    return shlex.join([interpreter, *sys.argv]) if _typed is not None else interpreter


def resuming() -> str | None:
    """The command that continues with this run; None where no script of ours was started."""
    if _typed is None:
        return None
    arguments, is_value = [], False
    for argument in _typed:
        name, equals, _ = argument.removeprefix("--").partition("=")
        if not is_value and name != "run.resume":
            arguments.append(argument)
        is_value = argument == "--run.resume" and not equals
    return shlex.join([*arguments, "run.resume=auto"])


def _outermost() -> list[str]:
    script, line = sys.argv[0], [sys.executable, *sys.argv]
    if Path(script).name == "cli.py":  # python -m homodistil.cli
        script, line = "homodistil.cli", [sys.executable, "-m", "homodistil.cli", *sys.argv[1:]]
    parent = os.getppid()
    while parent > 1:
        try:
            above = Path(f"/proc/{parent}/cmdline").read_text(errors="replace").split("\0")[:-1]
            parent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
        if script in above and above[0] not in _SHELLS:
            line = above
    return line


_SHELLS = ("sh", "bash", "/bin/sh", "/bin/bash")


def _shortened(line: list[str]) -> list[str]:
    """`deepspeed ...` for `/env/bin/python3 /env/bin/deepspeed ...`, where the shell finds the same one."""
    if len(line) > 1 and Path(line[0]).name.startswith("python") and Path(line[1]).parent == Path(line[0]).parent:
        line = line[1:]
    name = Path(line[0]).name
    return [name if shutil.which(name) == line[0] else line[0], *line[1:]]
