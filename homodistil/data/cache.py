"""Folders that are built once although several processes may need them: a lock, a workspace, an atomic rename."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from homodistil.errors import UserError


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """An empty folder next to `target` for the process that holds the lock of `target`; removed afterwards.

    Files that a killed process has left in it are deleted first; no other process can use them without the lock.

    Raises:
        UserError: the cache cannot be written, or its disk is full.
    """
    folder = target.parent / f".{target.name}.tmp"
    with as_user_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def as_user_error(target: Path, deed: str = "write") -> Iterator[None]:
    """Turn an `OSError` (full disk, no permission) inside this context into a `UserError` that names `target`.

    Args:
        deed: what failed, for the message: "write" or "read".
    """
    try:
        yield
    except Timeout:  # of a lock; also an OSError, but not an error of the disk
        raise
    except NotImplementedError as error:
        if "flock" not in str(error):
            raise
        raise UserError(
            f"data.cache_dir: the file system of {target} has no file locks (flock); set data.cache_dir to one that "
            f"has, or mount it with them (Lustre: -o flock)"
        ) from error
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot {deed} {target} ({error.strerror or error}); "
            f"set data.cache_dir to a writable folder with free space"
        ) from error


def set_aside(folder: Path, reason: str) -> None:
    """Delete a damaged file or folder that will be made again, with a warning."""
    print(f"warning: {folder} is damaged ({reason}); made again", file=sys.stderr, flush=True)
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink()


def build_once(
    target: Path, build: Callable[[Path], None], damage: Callable[[Path], str | None] = lambda _: None
) -> Path:
    """The folder `target`, made by `build(temporary folder)` and an atomic rename unless it exists.

    Args:
        damage: returns what is wrong with an existing `target`, None if nothing is. A damaged one is built again; jobs
            that have its old files open can still read them.

    Returns:
        `target`.

    Raises:
        UserError: `target` cannot be read or written.
    """
    with as_user_error(target, "read"):
        if target.exists() and damage(target) is None:
            return target
    with workspace(target) as folder:
        if target.exists() and (reason := damage(target)):
            set_aside(target, reason)
        if not target.exists():
            build(folder)
            os.replace(folder, target)
    return target
