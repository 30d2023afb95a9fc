"""Groups of ranks that share a machine or a cache folder, and running an action once per group.

leaders = cache_leaders(cache_dir)                    # by rank: the leader of its group
corpus = once(leaders, lambda: prepare_corpus(...))   # may take hours: no rank waits inside a collective
hand_over(leaders, folder)                            # copies rank 0's folder into the caches of other groups
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from torch import distributed

from homodistil.distributed import plain_data, ranks
from homodistil.errors import UserError
from homodistil.files import writing

T = TypeVar("T")
Leaders = list[int]
"""By rank: the leader of its group, which is the lowest rank of the group."""

MACHINE = "HOMODISTIL_MACHINE"
"""Environment variable that names the machine, to simulate several machines on one in tests and benchmarks."""
CHUNK_BYTES = 1 << 24
FIRST_WAIT_S, LONGEST_WAIT_S = 0.05, 2.0
_calls = itertools.count()


def machine() -> str:
    """Name of this machine, unique in the job: host name and boot id, because containers may share one of them."""
    if name := os.environ.get(MACHINE):
        return name
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"


def machine_groups() -> Leaders:
    """One group per machine. Every rank calls it."""
    names = ranks.gather(machine())
    return [names.index(name) for name in names]


def cache_leaders(folder: Path) -> Leaders:
    """One group for all machines that share the file system of `folder`, detected with marker files in it.

    Every rank calls it.

    Raises:
        UserError: `folder` cannot be written on some machine.
    """
    of_machine, rank = machine_groups(), ranks.rank()
    token = ranks.on_rank_zero(lambda: secrets.token_hex(8))
    is_leader = of_machine[rank] == rank
    with _marker(folder / f".seen-{token}-{rank}") if is_leader else contextlib.nullcontext() as trouble:
        raise_any(trouble)  # also a barrier, after which all markers exist
        # The leader is the lowest rank whose marker is visible.
        seen = min(int(path.name.rpartition("-")[2]) for path in folder.glob(f".seen-{token}-*")) if is_leader else None
        leader_of = ranks.gather(seen)  # also a barrier, after which the markers may be removed
    return [leader_of[leader] for leader in of_machine]


@contextlib.contextmanager
def _marker(path: Path) -> Iterator[str | None]:
    """A file `path` that exists inside this context. Yields the error message if it cannot be made, else None."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        trouble = None
    except OSError as error:
        trouble = (
            f"data.cache_dir: cannot write to {path.parent} on {socket.gethostname()} ({error.strerror}); "
            f"set data.cache_dir to a writable folder with free space"
        )
    try:
        yield trouble
    finally:
        with contextlib.suppress(OSError):  # it does not exist if it could not be made
            path.unlink()


def raise_any(problem: str | None) -> None:
    """Raise `UserError` on every rank if any rank has a `problem`; the lowest such rank gives the text.

    Every rank calls it; None: no problem on this rank.
    """
    if texts := [text for text in ranks.gather(problem) if text is not None]:
        raise UserError(texts[0])


def once(leaders: Leaders, action: Callable[[], T]) -> T:
    """Run `action` on each leader, and return its result on all ranks of its group. Every rank calls it.

    The result must be plain data (plain_data.py). Waiting ranks poll the store of the job, so that no timeout of a
    collective runs; the watchdog detects a leader that dies.

    Raises:
        UserError: on every rank, once all leaders have finished, if any leader raised one.
    """
    if ranks.world_size() == 1:
        return action()
    store, call = distributed.distributed_c10d._get_default_store(), next(_calls)
    rank = ranks.rank()
    if leaders[rank] == rank:
        store.set(f"once/{call}/{rank}", plain_data.encode(ranks.outcome(action)))
    for leader in sorted(set(leaders)):
        _wait_for(store, f"once/{call}/{leader}")
    result, trouble = plain_data.decode(store.get(f"once/{call}/{leaders[rank]}"))
    raise_any(trouble)
    return result


def _wait_for(store, key: str) -> None:
    wait_s = FIRST_WAIT_S
    while not store.check([key]):
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def hand_over(leaders: Leaders, folder: Path) -> None:
    """Copy the `folder` of rank 0 to every group that lacks it, by broadcasts in chunks of 16 MiB.

    The copy is published atomically. Every rank calls it with the path on its machine.

    Raises:
        UserError: on every rank, if the copy cannot be written on some machine.
    """
    rank = ranks.rank()
    lacks = leaders[rank] == rank and not folder.is_dir()
    if not any(ranks.gather(lacks)):
        return
    files = ranks.on_rank_zero(lambda: sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()))
    work = folder.with_name(f".{folder.name}.{os.getpid()}")
    trouble = None
    for name in files:
        for offset in itertools.count(0, CHUNK_BYTES):
            data = ranks.bytes_from_first(b"" if rank else _read(folder / name, offset))
            if lacks and trouble is None:
                trouble = _append(work / name, data)
            if len(data) < CHUNK_BYTES:
                break
    if lacks and trouble is None:
        os.replace(work, folder)
    shutil.rmtree(work, ignore_errors=True)
    raise_any(trouble)


def _read(path: Path, offset: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(CHUNK_BYTES)


def _append(path: Path, data: bytes) -> str | None:
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                file.write(data)
    except UserError as error:
        return str(error)
