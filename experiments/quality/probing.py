"""Probes of frozen features (homodistil/evaluation/probe) on exported students and on the teacher."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.quality.jobs import EvaluateTeacher, Job, Train
from experiments.quality.specs import content_hash
from homodistil.training.teacher_checks import cache_dir

if TYPE_CHECKING:
    from homodistil.evaluation.probe.examples import Examples

MAX_TOKENS = 128


@dataclass(frozen=True)
class Probe(Job):
    """One checkpoint. Nothing is drawn: there is no seed."""

    of: Train | EvaluateTeacher
    limit: int | None = None
    """At most so many examples of each set (None: all that probes take)."""

    @property
    def label(self) -> str:
        return f"{self.of.label}, probes"

    def folder(self, work: Path) -> Path:
        return work / "probes" / content_hash([str(self.of.folder(work).relative_to(work)), self.limit, MAX_TOKENS])

    def execute(self, context, folder: Path) -> dict:
        # homodistil.evaluation is slow to import, and needed in workers only.
        from homodistil.evaluation.probe.features import SentenceFeatures
        from homodistil.evaluation.probe.scores import probe

        start = time.process_time()
        features = SentenceFeatures(str(self.of.checkpoint(context.work)), MAX_TOKENS, context.device)
        scores = probe(features, _examples(cache_dir(self.of.spec.config()), self.limit))
        return {"scores": scores._asdict(), "cpu_s": time.process_time() - start}


@functools.lru_cache(maxsize=1)
def _examples(cache: Path, limit: int | None) -> Examples:
    from homodistil.evaluation.probe.examples import load_examples

    return load_examples(cache, limit)
