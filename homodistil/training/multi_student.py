"""Several students of one teacher in one job: each micro-batch runs through the teacher once, for all of them.

Every student keeps its own engine, schedule, optimizer, recorder and checkpoints (trainer.py), and ends bitwise where a
job of its own with teacher.lock_step=false would have: what they share is the batch and the teacher's pass over it.

A killed job may leave them at different steps. The students with fewer steps then train alone until all have
done the same number; a finished student takes no part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from homodistil.config.schema import RunConfig
from homodistil.data.batch import Batch
from homodistil.data.prefetch import BatchPrefetcher
from homodistil.distill.teacher import Teacher
from homodistil.distill.teacher_outputs import TeacherOutputs
from homodistil.distributed import graceful_stop, ranks
from homodistil.distributed.fault_injection import fault_point
from homodistil.files import write_atomically, writing
from homodistil.training.inputs import RunInputs
from homodistil.training.run import DistillationRun
from homodistil.training.trainer import Trainer

TIME_FILE = "teachers_once.json"


def student_runs(
    students: Sequence[RunConfig], folders: Sequence[Path], engine_config: dict, run_inputs: RunInputs, command: str
) -> list[DistillationRun]:
    """A run for each student, in its folder, with one teacher for all."""
    runs: list[DistillationRun] = []
    for config, folder in zip(students, folders, strict=True):
        first = runs[0] if runs else None
        runs.append(DistillationRun(config, engine_config, run_inputs, folder, command, teacher_of=first))
    return runs


def train_together(runs: Sequence[DistillationRun], folder: Path) -> list[dict]:
    """Train, export and evaluate all of them, from their last checkpoints on; returns their rows.

    Args:
        folder: of the job: what the teacher's passes have taken since this start of it is written there.
    """
    rows = [run.finished_row() for run in runs]
    left = [run for run, row in zip(runs, rows, strict=True) if row is None]
    with contextlib.ExitStack() as stack:
        trainers = [stack.enter_context(run.training()) for run in left]
        if trainers:
            together = MultiStudentTrainer(trainers, left[0].teacher, trainers[0].prefetcher)
            together.train()
            ranks.on_rank_zero(lambda: together.time.write(folder / TIME_FILE))
        results = iter([run.finish(trainer) for run, trainer in zip(left, trainers, strict=True)])
    return [next(results) if row is None else row for row in rows]


@dataclass
class SharedTime:
    """Seconds of this rank, for what sharing has saved (on a GPU without waiting for it: then only whole steps say)."""

    teacher_s: float = 0.0
    """In the teacher's forward passes."""
    all_s: float = 0.0
    num_passes: int = 0
    num_uses: int = 0
    """Students that were compared with them, all passes together."""

    def write(self, path: Path) -> None:
        with writing(path):
            write_atomically(path, json.dumps(dataclasses.asdict(self)) + "\n")


class MultiStudentTrainer:
    """Trains several students on one teacher pass per micro-batch.

    Args:
        trainers: of students with the same data, batches and number of steps.
        teacher: of all of them; None: none of them needs one.
        feed: gives the batches.
    """

    def __init__(self, trainers: Sequence[Trainer], teacher: Teacher | None, prefetcher: BatchPrefetcher) -> None:
        self.trainers, self.teacher, self.prefetcher = list(trainers), teacher, prefetcher
        self.time = SharedTime()

    def train(self) -> None:
        """To the last step of every student."""
        try:
            with graceful_stop.at_step_boundaries(self.prefetcher.device) as stop_agreed:
                while behind := self._behind():
                    self.train_step(behind)
                    for trainer in behind:
                        trainer.between_steps()
                    if number := stop_agreed():
                        self.leave(number)
        except BaseException:
            for trainer in self.trainers:
                trainer.checkpoints.settle()
            raise
        for trainer in self.trainers:
            trainer.checkpoints.wait()

    def _behind(self) -> list[Trainer]:
        """Trainers with the fewest steps done; none once all are done."""
        left = [trainer for trainer in self.trainers if not trainer.is_done]
        first = min((trainer.state.step for trainer in left), default=0)
        return [trainer for trainer in left if trainer.state.step == first]

    def train_step(self, trainers: Sequence[Trainer]) -> None:
        """One step of each, which all have done equally many."""
        fault_point("train.step")
        start = time.perf_counter()
        batches = self.prefetcher.micro_batches(trainers[0].state.consumed_samples)
        for batch in batches:
            targets = self._targets(batch, [trainer.teacher is not None for trainer in trainers])
            for trainer in trainers:
                trainer.train_micro_batch(batch, targets.pop(0))
        for trainer in trainers:
            trainer.end_step(batches)
        self.time.all_s += time.perf_counter() - start

    def _targets(self, batch: Batch, needed: Sequence[bool]) -> list[TeacherOutputs | None]:
        """Each student's side of one pass of the teacher; None for those that need none."""
        if not any(needed):
            return [None for _ in needed]
        start = time.perf_counter()
        outputs = self.teacher.for_several(batch, sum(needed))
        self.time.teacher_s += time.perf_counter() - start
        self.time.num_passes, self.time.num_uses = self.time.num_passes + 1, self.time.num_uses + sum(needed)
        return [outputs.pop() if is_needed else None for is_needed in needed]

    def leave(self, number: int) -> None:
        """Stop on request (signal `number`), with everything on disk that resuming needs."""
        for trainer in self.trainers:
            trainer.save_and_wait()
        steps = ", ".join(f"{t.config.run.name} {t.state.step} of {t.config.train.steps}" for t in self.trainers)
        text = f"stopped by {signal.Signals(number).name} at step {steps}; run.resume=auto goes on from the checkpoints"
        raise graceful_stop.stopped(number, text + graceful_stop.go_on_with())
