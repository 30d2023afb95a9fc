"""Writes one checkpoint in a background thread on every rank; that of rank 0 publishes it once all ranks have reported.

Ranks report with small files in the part folder, so that these threads need no collectives while training continues. In
`finish` the ranks synchronise, and all of them learn of a failure on any rank.
"""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from homodistil.checkpoint.files import FileRecord, WriteError, write_json, write_tensors
from homodistil.checkpoint.folder import RUN_FILE, RUN_TENSORS_FILE, part_folder, publish
from homodistil.distributed import ranks
from homodistil.distributed.fault_injection import fault_point
from homodistil.errors import UserError

_POLL_S = 0.02


class Snapshot(NamedTuple):
    """Copies on the CPU of everything that one rank writes, so that training may change the originals."""

    step: int
    state: dict[str, Tensor]
    random_state: dict[str, Tensor]
    run: dict | None
    """Content of run.json; None on all ranks except 0."""
    run_tensors: dict[str, Tensor] | None
    """Tensors of run.safetensors; None on all ranks except 0."""


def state_file(rank: int, num_ranks: int) -> str:
    return f"state-{rank:05d}-of-{num_ranks:05d}.safetensors"


def random_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


class Writer:
    """Writes one checkpoint. The constructor starts the thread.

    Args:
        folder: the folder of all checkpoints, in which the empty part folder exists (`start_part`).
        snapshot: the data of this rank.
        keep: number of checkpoints to keep.
    """

    def __init__(self, folder: Path, snapshot: Snapshot, keep: int) -> None:
        self.folder, self.keep, self.step = folder, keep, snapshot.step
        self.part = part_folder(folder, snapshot.step)
        self.rank, self.num_ranks = ranks.rank(), ranks.world_size()
        self._error: str | None = None
        self._given_up = threading.Event()
        self._own_done = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._write_own(snapshot)
            del snapshot
            self._own_done.set()
            if self.rank == 0 and (files := self._files_of_all()) is not None:
                publish(self.folder, self.step, files, self.keep)
        except WriteError as error:
            self._error = str(error)
        except Exception as error:  # any error must reach all ranks (`finish`), not end with this thread
            self._error = f"{self.part}: {type(error).__name__}: {error}"
        finally:
            self._own_done.set()

    def _write_own(self, snapshot: Snapshot) -> None:
        names = {state_file(self.rank, self.num_ranks): snapshot.state, random_file(self.rank): snapshot.random_state}
        if snapshot.run is not None:
            names[RUN_TENSORS_FILE] = snapshot.run_tensors
        files = {name: write_tensors(self.part / name, tensors) for name, tensors in names.items()}
        if snapshot.run is not None:
            files[RUN_FILE] = write_json(self.part / RUN_FILE, snapshot.run)
        fault_point("checkpoint.shard_written")
        report = self._report(self.rank)
        write_json(report.with_suffix(".tmp"), files)
        report.with_suffix(".tmp").rename(report)

    def _report(self, rank: int) -> Path:
        return self.part / f"done-{rank:05d}.json"

    def _files_of_all(self) -> dict[str, FileRecord] | None:
        """Records of the files of all ranks, once all have reported; None if another rank has failed."""
        records: dict[str, FileRecord] = {}
        for rank in range(self.num_ranks):
            report = self._report(rank)
            while not report.is_file():
                if self._given_up.wait(_POLL_S):
                    return None
            reported = json.loads(report.read_text(encoding="utf-8"))
            records |= {name: FileRecord(*record) for name, record in reported.items()}
            report.unlink()
        return records

    def settle(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` for the thread of this rank, without any collective."""
        self._thread.join(timeout_s)

    def finish(self) -> None:
        """Wait until the checkpoint is published. Every rank calls it.

        Raises:
            UserError: on every rank, if any rank could not write; the previous checkpoint is intact.
        """
        self._own_done.wait()
        self._raise_first(ranks.gather(self._error))
        self._thread.join()
        self._raise_first(ranks.gather(self._error))

    def _raise_first(self, errors: list[str | None]) -> None:
        failed = [rank for rank, error in enumerate(errors) if error]
        if not failed:
            return
        self._given_up.set()
        self._thread.join()
        if self.rank == 0:
            shutil.rmtree(self.part, ignore_errors=True)
        raise UserError(
            f"checkpoint: rank {failed[0]} cannot write {errors[failed[0]]}; free disk space or make run.dir writable, "
            f"then run again with run.resume=auto: checkpoints before step {self.step} are intact"
        )
