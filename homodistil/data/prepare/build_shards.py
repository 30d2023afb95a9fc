"""Makes the missing shards of a plan: in this process, in worker processes, or as one of several array tasks.

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
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path

from filelock import FileLock, Timeout

from homodistil.data.cache import as_user_error, set_aside
from homodistil.data.prepare.shard_plan import Plan
from homodistil.data.prepare.shards import Recipe, damage, make_shard
from homodistil.distributed.graceful_stop import ignore_in_worker
from homodistil.errors import UserError

_POLL_S = 0.2


class Preparation:
    """The shards of one corpus in `folder`.

    Args:
        folder: <cache_dir>/parts/<plan>; made if necessary, deleted once the corpus exists.
        plan: the same in all processes that make shards.
        recipe: how a shard is made.
        is_over: returns whether the corpus exists already, so that no shard is needed any more.
    """

    def __init__(self, folder: Path, plan: Plan, recipe: Recipe, is_over: Callable[[], bool]) -> None:
        self.folder, self.plan, self.recipe, self._is_over = folder, plan, recipe, is_over

    def shard_folder(self, index: int) -> Path:
        return self.folder / f"{index:05d}"

    def unfinished(self, with_checksums: bool = False) -> list[int]:
        """Numbers of the shards that are missing or damaged. Without checksums, changed bytes are not noticed."""
        numbers = range(len(self.plan.shards))
        return [index for index in numbers if damage(self.shard_folder(index), with_checksums)]

    def set_aside_altered(self) -> list[int]:
        """Delete shards that are damaged, judged by their checksums, with a warning. Returns their numbers."""
        altered = self.unfinished(with_checksums=True)
        for index in altered:
            with self._lock(index):
                if reason := damage(self.shard_folder(index), with_checksums=True):
                    set_aside(self.shard_folder(index), reason)
        return altered

    def make(self, wanted: Iterable[int], workers: int) -> None:
        """Make the shards with the numbers `wanted`; returns once all are finished, by this or other processes.

        Args:
            workers: maximum number of worker processes; 0 or 1: none.

        Raises:
            UserError: a source cannot be read, the disk is full, or a worker process was killed.
        """
        missing = [index for index in wanted if damage(self.shard_folder(index))]
        total = sum(self.plan.shards[index].num_bytes for index in missing)
        with as_user_error(self.folder), _progress(total) as advance:
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
        if not (reason := damage(folder)):
            return
        if folder.exists():
            set_aside(folder, reason)
        make_shard(folder, self.plan.shards[index], self.recipe, advance)

    def _lock(self, index: int, timeout: float = -1):
        return FileLock(self.folder / f".{index:05d}.lock").acquire(timeout=timeout)

    def give_up(self) -> None:
        """Delete the shards once the corpus is there."""
        retired = self.folder.with_name(f".{self.folder.name}.retired")
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(self.folder, retired)
            shutil.rmtree(retired, ignore_errors=True)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    is_quiet = os.environ.get("RANK", "0") != "0" or not total
    with tqdm(total=total, desc="tokenising", unit="B", unit_scale=True, disable=is_quiet, mininterval=1.0) as bar:
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
