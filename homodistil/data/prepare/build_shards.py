"""Makes the missing shards of something large: in this process, in worker processes, or as one of several array tasks.

A process that makes a shard holds its file lock, which the system releases if the process dies. Any number of jobs can
thus share the work, take shards that are free without waiting, and be started again after they were killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from filelock import FileLock, Timeout

from homodistil.data.cache import as_user_error, set_aside
from homodistil.distributed.graceful_stop import ignore_in_worker
from homodistil.errors import UserError

_POLL_S = 0.2


class ShardMaker(Protocol):
    """Knows the shards, and how one is made. The same in all processes that make shards."""

    what: str
    """What is done, for the bar of progress."""
    unit: str
    """Of `sizes`."""

    @property
    def sizes(self) -> Sequence[int]:
        """The work of each shard."""

    def make(self, folder: Path, index: int, advance: Callable[[int], None]) -> None:
        """Write shard `index` to `folder`, which does not exist yet, at once and as a whole. The caller holds the lock
        of the shard.

        Args:
            advance: called repeatedly with the work that has been done since the last call.
        """

    def damage(self, folder: Path, index: int, with_checksums: bool = False) -> str | None:
        """What is missing, truncated or (perhaps only with checksums) changed in a finished shard; None: nothing."""


M = TypeVar("M", bound=ShardMaker)


class Preparation(Generic[M]):
    """The shards of one corpus, or of a teacher's outputs for it, in `folder`.

    Args:
        folder: <cache_dir>/parts/<plan>; made if necessary, deleted once what the shards are for exists.
        maker: of the shards.
        is_over: returns whether that exists already, so that no shard is needed any more.
    """

    def __init__(self, folder: Path, maker: M, is_over: Callable[[], bool]) -> None:
        self.folder, self.maker, self._is_over = folder, maker, is_over

    def shard_folder(self, index: int) -> Path:
        return self.folder / f"{index:05d}"

    def unfinished(self, with_checksums: bool = False) -> list[int]:
        """Numbers of the shards that are missing or damaged. Without checksums, changed bytes are not noticed."""
        return [index for index in range(len(self.maker.sizes)) if self._damage(index, with_checksums)]

    def _damage(self, index: int, with_checksums: bool = False) -> str | None:
        return self.maker.damage(self.shard_folder(index), index, with_checksums)

    def whole(self, workers: int) -> list[Path]:
        """Folder of each shard, once all of them are finished and have their checksums. Arguments and errors as of
        `make`."""
        wanted = list(range(len(self.maker.sizes)))
        while wanted:
            self.make(wanted, workers)
            wanted = self.set_aside_altered()
        return [self.shard_folder(index) for index in range(len(self.maker.sizes))]

    def set_aside_altered(self) -> list[int]:
        """Delete shards that are damaged, judged by their checksums, with a warning. Returns their numbers."""
        altered = self.unfinished(with_checksums=True)
        for index in altered:
            with self._lock(index):
                if reason := self._damage(index, with_checksums=True):
                    set_aside(self.shard_folder(index), reason)
        return altered

    def make(self, wanted: Iterable[int], workers: int) -> None:
        """Make the shards with the numbers `wanted`; returns once all are finished, by this or other processes.

        Args:
            workers: maximum number of worker processes; 0 or 1: none.

        Raises:
            UserError: a source cannot be read, the disk is full, or a worker process was killed.
        """
        missing = [index for index in wanted if self._damage(index)]
        total = sum(self.maker.sizes[index] for index in missing)
        with as_user_error(self.folder), _progress(total, self.maker.what, self.maker.unit) as advance:
            self.folder.mkdir(parents=True, exist_ok=True)
            if min(workers, len(missing)) > 1:
                _in_processes(lambda count: self._make_free(missing, count), min(workers, len(missing)), advance)
            else:
                self._make_free(missing, advance)
            for index in missing:  # wait for those that other processes are making
                self._finish(index, advance, timeout=-1)

    def _make_free(self, missing: list[int], advance: Callable[[int], None]) -> None:
        with as_user_error(self.folder):
            for index in missing:
                self._finish(index, advance, timeout=0)

    def _finish(self, index: int, advance: Callable[[int], None], timeout: float) -> None:
        if self._is_over():
            return
        try:
            with self._lock(index, timeout):
                if not self._is_over():
                    self._make_one(index, advance)
        except Timeout:
            return
        except FileNotFoundError:
            if not self._is_over():  # otherwise its folder has just been deleted
                raise

    def _make_one(self, index: int, advance: Callable[[int], None]) -> None:
        folder = self.shard_folder(index)
        if not (reason := self._damage(index)):
            return
        if folder.exists():
            set_aside(folder, reason)
        self.maker.make(folder, index, advance)

    def _lock(self, index: int, timeout: float = -1):
        return FileLock(self.folder / f".{index:05d}.lock").acquire(timeout=timeout)

    def give_up(self) -> None:
        """Delete the shards once what they are for is there."""
        retired = self.folder.with_name(f".{self.folder.name}.retired")
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(self.folder, retired)
            shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def _progress(total: int, what: str, unit: str) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    is_quiet = os.environ.get("RANK", "0") != "0" or not total
    with tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=is_quiet, mininterval=1.0) as bar:
        yield bar.update


def _in_processes(work: Callable, num: int, advance: Callable[[int], None]) -> None:
    """Run `work(count)` in `num` forked processes. The first failure ends all of them."""
    context = multiprocessing.get_context("fork")
    counter = context.Value("q", 0)
    pipes = [context.Pipe(duplex=False) for _ in range(num)]
    processes = [
        context.Process(target=_worker, args=(work, counter, sender, os.getpid()), daemon=True) for _, sender in pipes
    ]
    seen = 0
    try:
        for process in processes:
            process.start()
        while alive := [process for process in processes if process.is_alive()]:
            wait([process.sentinel for process in alive], timeout=_POLL_S)
            done, seen = counter.value - seen, counter.value
            advance(done)
            for process, (receiver, _) in zip(processes, pipes, strict=True):
                _raise_failure(process, receiver)
        for process, (receiver, _) in zip(processes, pipes, strict=True):
            _raise_failure(process, receiver)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _raise_failure(process: multiprocessing.Process, receiver: Connection) -> None:
    if not process.exitcode:
        return
    if receiver.poll():
        raise UserError(receiver.recv())
    if process.exitcode < 0:
        raise UserError(
            f"data.workers: a worker process was ended by signal {-process.exitcode} (out of memory?); use fewer "
            f"workers and run again: finished shards are kept"
        )
    raise RuntimeError(f"a worker process failed with exit code {process.exitcode}; its traceback is above")


def _worker(work: Callable, counter, sender: Connection, parent: int) -> None:
    ignore_in_worker()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per worker

    def advance(num_bytes: int) -> None:
        if os.getppid() != parent:  # the parent was killed, so the work is no longer needed
            os._exit(1)
        with counter.get_lock():
            counter.value += num_bytes

    try:
        work(advance)
    except UserError as error:
        sender.send(str(error))
        os._exit(2)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
