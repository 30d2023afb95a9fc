"""Fine-tuning of exported students and of the teacher on the packaged tasks, by `homodistil.evaluation.glue`."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from experiments.quality.jobs import EvaluateTeacher, Job, Train
from experiments.quality.specs import content_hash
from homodistil.training.teacher_checks import cache_dir

if TYPE_CHECKING:
    from homodistil.evaluation.glue.fine_tuning import Encoded


class TaskColumn(NamedTuple):
    """A task of the glue package, and what the table says of it."""

    title: str
    metric: str
    epochs: int


TASKS = {"stsb": TaskColumn("STS-B Spearman", "spearman", 3), "movie": TaskColumn("movie accuracy", "accuracy", 1)}
# The same for every model: what is compared is where fine-tuning starts from.
RATE, BATCH_SIZE, MAX_TOKENS = 1e-3, 32, 64


@dataclass(frozen=True)
class FineTune(Job):
    """One checkpoint on one task with one seed."""

    of: Train | EvaluateTeacher
    task: str
    seed: int
    quick: bool = False
    rate: float = RATE

    @property
    def label(self) -> str:
        return f"{self.of.label}, {self.task}"

    def folder(self, work: Path) -> Path:
        address = [
            str(self.of.folder(work).relative_to(work)),
            self.task,
            self.seed,
            self.quick,
            self.rate,
            TASKS[self.task].epochs,
        ]
        return work / "tuned" / content_hash(address)

    def execute(self, context, folder: Path) -> dict:
        source, start = self.of.checkpoint(context.work), time.process_time()
        metrics = self._fine_tune(source, cache_dir(self.of.spec.config()))
        return {"score": metrics[TASKS[self.task].metric], "metrics": metrics, "cpu_s": time.process_time() - start}

    def _fine_tune(self, checkpoint: Path, cache: Path) -> dict[str, float]:
        from homodistil.evaluation.glue.fine_tuning import Settings, train
        from homodistil.evaluation.glue.tasks import find_task

        epochs = TASKS[self.task].epochs
        settings = Settings(lr=self.rate, batch_size=BATCH_SIZE, epochs=epochs, seed=self.seed, max_length=MAX_TOKENS)
        encoded = _encoded(_Tokenizer(checkpoint), self.task, self.quick, cache)
        return train(checkpoint, find_task(self.task), encoded, settings)


# homodistil.evaluation.glue is slow to import, and needed in workers only.


class _Tokenizer:
    """That of a checkpoint. Two with the same files are the same."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        files = sorted(checkpoint.glob("*token*")) + sorted(checkpoint.glob("vocab*"))
        self._key = tuple((path.name, path.read_bytes()) for path in files)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tokenizer) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


@functools.lru_cache(maxsize=len(TASKS))
def _encoded(tokenizer: _Tokenizer, task: str, quick: bool, cache: Path) -> Encoded:
    """The task as model inputs, from the job before if its student had the same tokenizer, as all of a study have."""
    from homodistil.evaluation.glue.fine_tuning import encode
    from homodistil.evaluation.glue.sources import TaskData, load_task
    from homodistil.evaluation.glue.tasks import find_task

    data = load_task(find_task(task), "embedded", cache)
    if quick:
        splits = (data.train, *data.dev.values())
        train, *dev = (split._replace(texts=split.texts[:64], labels=split.labels[:64]) for split in splits)
        data = TaskData(train, dict(zip(data.dev, dev, strict=True)))
    return encode(tokenizer.checkpoint, find_task(task), data, MAX_TOKENS)
