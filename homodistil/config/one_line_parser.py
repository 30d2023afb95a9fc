"""The argparse parser of all commands: errors are one-line `UserError`s, and usage shows the command as typed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from homodistil.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """Raises `UserError` instead of printing the usage and exiting."""

    def __init__(self, **options: object) -> None:
        super().__init__(prog=program(), **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; --help names the options")


def program() -> str:
    """The program name in usage lines: `homodistil train` for the installed command, else the name of the script."""
    name = Path(sys.argv[0]).name
    if name == "cli.py":  # python -m homodistil.cli
        name = "homodistil"
    return " ".join([name, *sys.argv[1:2]]) if name == "homodistil" else name
