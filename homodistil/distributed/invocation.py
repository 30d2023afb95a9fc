"""The command that the user typed to start this script (with any launcher), and the command that continues the run.

The command line of a rank is made by its launcher. The command as it was typed is that of the outermost ancestor
process whose arguments include the script; it is read from /proc. Without /proc, or if the launcher runs on another
machine, the command line of the rank is used instead.
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
    """Read the typed command. Scripts call it at their start, because launchers may have ended when they end."""
    global _typed
    handed_on = os.environ.get(TYPED_VARIABLE)
    _typed = shlex.split(handed_on) if handed_on else _shortened(_outermost())


def typed() -> list[str]:
    """Words of the typed command; those of this process if it was not started by a script of this package."""
    return _typed if _typed is not None else [sys.executable, *sys.argv]


def own() -> str:
    """Command line of this process; just "python" if it is not a script of this package (a notebook, say)."""
    interpreter = Path(sys.executable).name
    return shlex.join([interpreter, *sys.argv]) if _typed is not None else interpreter


def resuming() -> str | None:
    """The command that continues this run; None if it was not started by a script of this package."""
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
    """`deepspeed ...` for `/env/bin/python3 /env/bin/deepspeed ...`, if PATH leads to the same program."""
    if len(line) > 1 and Path(line[0]).name.startswith("python") and Path(line[1]).parent == Path(line[0]).parent:
        line = line[1:]
    name = Path(line[0]).name
    return [name if shutil.which(name) == line[0] else line[0], *line[1:]]
