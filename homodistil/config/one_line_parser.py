"""The argparse parser of our commands: a mistake is a `UserError` of one line, and usage names the command as typed."""

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
    """What usage lines begin with: `homodistil train` for the installed command, else the script's name."""
    name = Path(sys.argv[0]).name
    if name == "cli.py":  # python -m homodistil.cli
        name = "homodistil"
    return " ".join([name, *sys.argv[1:2]]) if name == "homodistil" else name
