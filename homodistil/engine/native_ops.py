"""Loads DeepSpeed's compiled ops so that a killed job cannot make all later jobs wait for ever.

torch builds and loads an op under a lock file. The file stays if its holder is killed, and torch then waits for it
without a timeout or a message. Here the ranks of a machine load ops one after the other under an flock, which the
kernel releases when its holder ends; a lock file of torch that no process on this machine has open is then stale.

The ops that `make test` has built are also found without TORCH_EXTENSIONS_DIR and without an activated environment.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from homodistil.errors import UserError

OF_SETUP = Path(__file__).parents[2] / ".torch_extensions"
"""Where `make` builds the ops: next to the package in a checkout of the repository."""
SILENT_S = 3.0
"""Loading an op that has been built takes less than this."""
STALE_AFTER_S = 20.0
"""A holder on another machine (with a shared home folder) cannot be seen, so it gets this much time to finish."""
POLL_S = 0.2


def load_op(builder_name: str) -> None:
    """Build (on first use) and load the op of a builder, for example "CPUAdamBuilder". Repeated calls are cheap.

    Raises:
        UserError: ninja or a C++ compiler is missing.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not builder.is_compatible(verbose=False):  # DeepSpeed works without it, or reports the reason
        return
    _find_ninja()
    root = _build_root()
    with _alone(root), _said(builder.name, is_there=(root / builder.name / f"{builder.name}.so").is_file()):
        for lock in root.rglob(f"{builder.name}/lock"):
            _wait_or_remove(lock)
        builder.cxx_args = functools.partial(_without_debug_info, builder.cxx_args)
        builder.load()


def _without_debug_info(cxx_args: Callable[[], list[str]]) -> list[str]:
    """With it g++ takes half as long again (39 s a file instead of 27), and an op has many times its size."""
    return [argument for argument in cxx_args() if argument != "-g"]


@contextlib.contextmanager
def without_op(name: str) -> Iterator[None]:
    """Inside this context, DeepSpeed treats the op `name` ("deepspeed_shm_comm") as incompatible with this machine."""
    import deepspeed

    compatible = deepspeed.ops.__compatible_ops__
    before = compatible.get(name, False)
    compatible[name] = False
    try:
        yield
    finally:
        compatible[name] = before


def _build_root() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    if not os.environ.get("TORCH_EXTENSIONS_DIR") and OF_SETUP.is_dir():
        os.environ["TORCH_EXTENSIONS_DIR"] = str(OF_SETUP)
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _find_ninja() -> None:
    """Put the ninja of this Python environment first on PATH; torch calls ninja even for an op that has been built.

    Another version of ninja could not read the build log and would build everything again.
    """
    beside = Path(sys.executable).parent
    if (beside / "ninja").is_file():
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    elif shutil.which("ninja") is None:
        raise UserError(
            f"ninja: found neither on PATH nor in {beside}, and torch needs it to build DeepSpeed's ops; install it "
            f"(pip install ninja)"
        )


@contextlib.contextmanager
def _said(name: str, is_there: bool) -> Iterator[None]:
    """Print a line if the op inside this context has to be built, which takes about a minute.

    An op that exists may have to be built again (new version of torch): the line is then printed after `SILENT_S`.
    """
    if not is_there and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))):
        raise UserError("no C++ compiler found (g++), and DeepSpeed's ops must be built; install one (apt install g++)")
    line = f"building DeepSpeed's op {name}: about a minute, once"
    timer = threading.Timer(SILENT_S if is_there else 0.0, print, [line], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Let one process per machine at a time inside. No lock is taken if `root` is read-only: nothing is built there."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(root / ".homodistil", "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait_or_remove(lock: Path) -> None:
    """Return once `lock` no longer exists: its holder released it, or it was stale and is removed here."""
    seen_s = time.monotonic()
    while lock.exists():
        if _is_held_here(lock):
            seen_s = time.monotonic()
        elif time.monotonic() - seen_s > STALE_AFTER_S:
            print(f"warning: {lock} was left by a process that has ended; removed", file=sys.stderr, flush=True)
            lock.unlink(missing_ok=True)
            return
        time.sleep(POLL_S)


def _is_held_here(lock: Path) -> bool:
    """Whether a process of this machine has the file open, as torch does while it holds the lock (Linux only)."""
    target = str(lock.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process has just ended, or belongs to another user
            if os.readlink(descriptor) == target:
                return True
    return False
