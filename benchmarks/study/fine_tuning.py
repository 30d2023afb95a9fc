"""Fine-tuning of exported students and of the teacher on the packaged tasks, by `homodistil.evaluation.glue`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from homodistil.materials import cache_dir
from study.jobs import EvaluateTeacher, Job, Train
from study.specs import content_hash


class TaskColumn(NamedTuple):
    """A task of the glue package, and what the table says of it."""

    title: str
    metric: str
    epochs: int


TASKS = {"stsb": TaskColumn("STS-B Spearman", "spearman", 3), "movie": TaskColumn("movie accuracy", "accuracy", 2)}
# The same for every model: what is compared is where fine-tuning starts from.
RATE, BATCH_SIZE, MAX_TOKENS = 1e-3, 32, 64


@dataclass(frozen=True)
class FineTune(Job):
    """One checkpoint on one task with one seed."""

    of: Train | EvaluateTeacher
    task: str
    seed: int
    quick: bool = False

    @property
    def label(self) -> str:
        return f"{self.of.label}, {self.task}"

    def folder(self, work: Path) -> Path:
        address = [
            str(self.of.folder(work).relative_to(work)),
            self.task,
            self.seed,
            self.quick,
            RATE,
            TASKS[self.task].epochs,
        ]
        return work / "tuned" / content_hash(address)

    def execute(self, context, folder: Path) -> dict:
        work = context.work
        source = self.of.export(work) if isinstance(self.of, Train) else Path(self.of.result(work)["folder"])
        start = time.process_time()
        found = _fine_tune(source, self.task, self.seed, self.quick, cache_dir(self.of.spec.config()))
        return {"score": found[TASKS[self.task].metric], "metrics": found, "cpu_s": time.process_time() - start}


def _fine_tune(checkpoint: Path, task: str, seed: int, quick: bool, cache: Path) -> dict[str, float]:
    # Slow to import, and needed in workers only.
    from homodistil.evaluation.glue.fine_tuning import Settings, fine_tune
    from homodistil.evaluation.glue.sources import TaskData, load_task
    from homodistil.evaluation.glue.tasks import find_task

    data = load_task(find_task(task), "embedded", cache)
    if quick:
        splits = (data.train, *data.dev.values())
        train, *dev = (split._replace(texts=split.texts[:64], labels=split.labels[:64]) for split in splits)
        data = TaskData(train, dict(zip(data.dev, dev, strict=True)))
    epochs = TASKS[task].epochs
    settings = Settings(lr=RATE, batch_size=BATCH_SIZE, epochs=epochs, seed=seed, max_length=MAX_TOKENS, device="cpu")
    return fine_tune(checkpoint, task, data, settings)
