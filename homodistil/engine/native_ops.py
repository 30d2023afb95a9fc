"""Loads DeepSpeed's compiled ops so that a killed job cannot make every later one wait for ever.

torch builds and loads an op behind a lock file that stays when its holder is killed, and waits for it without end or
word. Here ranks of a machine load one after the other behind a lock of the kernel's, which ends with its holder; a lock
file that exists although no process on this machine holds it was left by a process that has died.

What `make setup` has built is found by who types the command by hand, too: without TORCH_EXTENSIONS_DIR, and with an
environment that is not activated.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from homodistil.errors import UserError

OF_SETUP = Path(__file__).parents[2] / ".torch_extensions"
"""Where the Makefile has ops built: beside the package, in a checkout."""
SILENT_S = 3.0
"""An op that is there already is loaded in less."""
STALE_AFTER_S = 20.0
"""A holder on another machine (a shared home folder) cannot be seen: it gets this long to finish."""
POLL_S = 0.2


def load_op(builder_name: str) -> None:
    """Build (on first use) and load the op of `builder_name`, for example "CPUAdamBuilder"; again costs nothing."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not builder.is_compatible(verbose=False):  # DeepSpeed does without, or says why it cannot
        return
    _find_ninja()
    root = _build_root()
    with _alone(root), _said(builder.name, is_there=(root / builder.name / f"{builder.name}.so").is_file()):
        for lock in root.rglob(f"{builder.name}/lock"):
            _wait_or_remove(lock)
        builder.load()


@contextlib.contextmanager
def without_op(name: str) -> Iterator[None]:
    """Inside, DeepSpeed takes the op of this name (`deepspeed_shm_comm`) for one that this machine cannot have."""
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
    """torch asks it even for an op that is there. The one beside the interpreter comes first, whether PATH names it or
    not: another version does not read its log, and builds everything again."""
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
    """A line about the minute that the compiler takes. An op that is there may have to be built again (new torch)."""
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
    """One process per machine at a time. A folder that cannot be written to has nothing to wait for either."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(root / ".homodistil", "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait_or_remove(lock: Path) -> None:
    """Return once `lock` is gone: released by a living holder, or removed because it has none."""
    seen_s = time.monotonic()
    while lock.exists():
        if _is_held_here(lock):
            seen_s = time.monotonic()
        elif time.monotonic() - seen_s > STALE_AFTER_S:
            print(f"warning: {lock} was left by a process that is no more; removed", file=sys.stderr, flush=True)
            lock.unlink(missing_ok=True)
            return
        time.sleep(POLL_S)


def _is_held_here(lock: Path) -> bool:
    """Whether a process of this machine has the file open, as torch does while it holds it (Linux)."""
    target = str(lock.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            if os.readlink(descriptor) == target:
                return True
    return False
