"""Weights & Biases. WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_API_KEY and its other variables are its own.

Import it only where the package is installed (registry.py).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping

import wandb

from homodistil.metrics.trackers.background import FINISH_S
from homodistil.metrics.trackers.run_ids import keep_run_id, kept_run_id
from homodistil.metrics.trackers.tracker import TrackedRun

_STEP = "step"


class WandbTracker:
    """A run of W&B; the one of before, if the run folder knows of one.

    Raises:
        RuntimeError: no API key, and values shall be sent to a server.
        Exception: whatever the client raises (also in the methods).
    """

    def __init__(self, run: TrackedRun) -> None:
        _require_key()
        run_id = kept_run_id(run.folder, "wandb") or uuid.uuid4().hex[:12]
        keep_run_id(run.folder, "wandb", run_id)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "homodistil",
            name=run.name,
            id=run_id,
            resume="allow",
            config={section: dict(fields) for section, fields in run.config.items()},
            dir=os.environ.get("WANDB_DIR") or str(run.folder),
            reinit="create_new",  # students of one job have a run each, in one process
            # The output of this process is not its business, and a server that is gone does not keep it from ending.
            settings=wandb.Settings(console="off", finish_timeout=FINISH_S),
        )
        # W&B drops values of a step below its own counter, which steps that are trained again would be; an x axis of
        # ours leaves the counter to itself.
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({_STEP: step, **values})

    def finish(self, result: Mapping[str, float] | None) -> None:
        self._run.summary.update(dict(result or {}))
        self._run.finish(exit_code=int(result is None))


def _require_key() -> None:
    """W&B would ask for a key on the terminal, and wait."""
    settings = wandb.setup().settings
    if settings.mode in ("online", "shared", "run") and not wandb.login(prompt=False):
        raise RuntimeError("no API key; run `wandb login` once, set WANDB_API_KEY, or WANDB_MODE=offline")
