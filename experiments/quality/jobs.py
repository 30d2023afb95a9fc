"""What a worker can be asked to do. A job knows where its result lies; a result that is there is not made again."""

from __future__ import annotations

import enum
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.quality.context import Context
from experiments.quality.specs import RunSpec, content_hash
from homodistil.files import write_atomically

RESULT_FILE = "result.json"
ERROR_FILE = "error.txt"
EXPORT = "export"


@dataclass(frozen=True)
class Job:
    """Base of all jobs."""

    @property
    def kind(self) -> str:
        """Jobs of a kind take about equally long."""
        return type(self).__name__

    @property
    def label(self) -> str:
        raise NotImplementedError

    def folder(self, work: Path) -> Path:
        raise NotImplementedError

    def execute(self, context: Context, folder: Path) -> dict:
        """In a worker. `folder` is there and empty."""
        raise NotImplementedError

    def result(self, work: Path) -> dict | None:
        """None: not done yet (or the last attempt failed)."""
        path = self.folder(work) / RESULT_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def run(self, context: Context) -> dict:
        folder = self.folder(context.work)
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that did not end
        folder.mkdir(parents=True)
        start = time.monotonic()
        result = self.execute(context, folder)
        result["wall_s"] = time.monotonic() - start
        write_atomically(folder / RESULT_FILE, json.dumps(result) + "\n")
        return result


class Keep(enum.Enum):
    """Whether the exported student stays on disk."""

    NO = "no"
    IF_NEW = "if new"
    """It may be needed: kept when the run is made now, not missed when it was made before without."""
    YES = "yes"
    """It will be needed: a run that left none is made again."""


@dataclass(frozen=True)
class Train(Job):
    """A run of the product."""

    spec: RunSpec
    keep: Keep = Keep.NO
    eval_blocks: int | None = None
    """At most so many held-out blocks a half (None: all)."""

    @property
    def label(self) -> str:
        return self.spec.label

    def folder(self, work: Path) -> Path:
        return work / "runs" / content_hash([self.spec.key, self.eval_blocks])

    def export(self, work: Path) -> Path:
        return self.folder(work) / EXPORT

    def checkpoint(self, work: Path) -> Path:
        """Folder of the exported student; it is there where `keep` said so."""
        return self.export(work)

    def result(self, work: Path) -> dict | None:
        is_missing = self.keep is Keep.YES and not (self.export(work) / "config.json").is_file()
        return None if is_missing else super().result(work)

    def execute(self, context: Context, folder: Path) -> dict:
        measured = context.train(self.spec.config(), folder, self.eval_blocks)
        gone = ("checkpoints", "tensorboard", *((EXPORT,) if self.keep is Keep.NO else ()))
        for name in gone:
            shutil.rmtree(folder / name, ignore_errors=True)
        return measured


@dataclass(frozen=True)
class EvaluateTeacher(Job):
    """The corrected teacher on both halves; `spec` is any run that starts from it."""

    spec: RunSpec
    eval_blocks: int | None = None

    @property
    def label(self) -> str:
        return "teacher"

    def folder(self, work: Path) -> Path:
        config = self.spec.config()
        return (
            work / "teachers" / content_hash([config.to_dict()["teacher"], config.to_dict()["data"], self.eval_blocks])
        )

    def checkpoint(self, work: Path) -> Path:
        """Folder of the corrected teacher, once it has been evaluated."""
        return Path(self.result(work)["folder"])

    def execute(self, context: Context, folder: Path) -> dict:
        return context.evaluate_teacher(self.spec.config(), self.eval_blocks)
