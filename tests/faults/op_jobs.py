"""Loading DeepSpeed's compiled op as somebody who has activated nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from homodistil.distributed.script_exit import exit_with_code
from homodistil.engine import native_ops

OP = "CPUAdamBuilder"


def load() -> None:
    native_ops.load_op(OP)
    print("loaded", flush=True)


def load_without_environment(built: str) -> None:
    """`built` stands for the folder of the checkout, which a test run need not have."""
    os.environ.pop("TORCH_EXTENSIONS_DIR", None)
    os.environ["PATH"] = "/usr/bin:/bin"
    native_ops.OF_SETUP = Path(built)
    load()


def load_without_ninja(empty: str) -> None:
    os.environ["PATH"], sys.executable = empty, f"{empty}/python"
    with exit_with_code():
        load()
