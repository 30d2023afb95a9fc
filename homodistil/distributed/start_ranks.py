"""`--ranks N`: starts the same command on N ranks of this machine, without typing the command line of a launcher.

This process becomes DeepSpeed's launcher, which starts the script N times. Signals and exit codes are therefore the
same as with the `deepspeed` command.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from homodistil.distributed import invocation
from homodistil.distributed.free_port import free_port
from homodistil.distributed.launcher_env import is_under_launcher
from homodistil.errors import UserError

FLAGS = ("--ranks", "--num-accelerators", "--num_accelerators")
MOST_RANKS = 1024
"""Maximum number of ranks on one machine."""


def split_ranks(argv: list[str]) -> tuple[int, list[str]]:
    """(number of ranks to start, the remaining arguments); the number is 1 if no flag of `FLAGS` is given.

    Raises:
        UserError: the value is not a number from 1 to `MOST_RANKS`, or a launcher has already started the ranks.
    """
    num_ranks, rest, tokens = None, [], iter(argv)
    for token in tokens:
        flag, equals, text = token.partition("=")
        if flag not in FLAGS:
            rest.append(token)
        else:
            num_ranks = _number(flag, text if equals else next(tokens, ""))
    if num_ranks is not None and is_under_launcher():
        raise UserError("--ranks: this process is one of a launcher's ranks already; leave --ranks out")
    return num_ranks or 1, rest


def _number(flag: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MOST_RANKS):
        raise UserError(f"{flag}: found {text[:40]!r}, allowed: 1 .. {MOST_RANKS}; give the number of ranks")
    return int(text)


def start_ranks(num_ranks: int) -> NoReturn:
    """Replace this process by a launcher that starts its script on `num_ranks` ranks, at a free port.

    Raises:
        UserError: fewer GPUs than ranks.
    """
    _check_devices(num_ranks)
    os.environ[invocation.TYPED_VARIABLE] = shlex.join(invocation.typed())
    script = ["--module", "homodistil.cli"] if Path(sys.argv[0]).name == "cli.py" else [sys.argv[0]]
    options = ["--num_accelerators", str(num_ranks), "--master_port", str(free_port()), "--no_local_rank"]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "critical", *options]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*launcher, *script, *split_ranks(sys.argv[1:])[1]])


def _check_devices(num_ranks: int) -> None:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return
    import torch  # takes seconds

    if torch.cuda.is_available() and num_ranks > torch.cuda.device_count():
        raise UserError(
            f"--ranks: found {num_ranks}, this machine has {torch.cuda.device_count()} GPUs; start as many ranks as "
            f"GPUs, or set DS_ACCELERATOR=cpu"
        )
