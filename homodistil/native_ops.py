"""Loads DeepSpeed's compiled ops so that a killed job cannot make every later one wait for ever.

torch builds and loads an op behind a lock file that stays when its holder is killed, and waits for it without end or
word. Here ranks of a machine load one after the other behind a lock of the kernel's, which ends with its holder; a lock
file that is there nevertheless, and that nobody on this machine holds, is left by a process that is no more.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

STALE_AFTER_S = 20.0
"""A holder on another machine (a shared home folder) cannot be seen: it gets this long to finish."""
POLL_S = 0.2


def load_op(builder_name: str) -> None:
    """Build (on first use) and load the op of `builder_name`, for example "CPUAdamBuilder"; again costs nothing."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not builder.is_compatible(verbose=False):  # DeepSpeed does without, or says why it cannot
        return
    root = _build_root()
    with _alone(root):
        for lock in root.rglob(f"{builder.name}/lock"):
            _wait_or_remove(lock)
        builder.load()


def _build_root() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process a machine at a time. A folder that cannot be written to has nothing to wait for either."""
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
