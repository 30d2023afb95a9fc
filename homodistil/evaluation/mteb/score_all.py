"""Every checkpoint on every task, and the table after each score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from homodistil.evaluation import progress
from homodistil.evaluation.mteb.benchmark import score
from homodistil.evaluation.mteb.checkpoints import Checkpoint
from homodistil.evaluation.mteb.first_stage import FirstStage
from homodistil.evaluation.mteb.result_table import Scores, write_table


def score_all(
    checkpoints: Mapping[str, Checkpoint],
    first_stage: FirstStage | None,
    tasks: Sequence[Any],
    batch_size: int,
    out: Path,
) -> str:
    """Returns the table. It is written into `out` after each score, so that what is finished is kept.

    Args:
        checkpoints: by name, a column each; rerankers or embedders.
        first_stage: for rerankers; it has the last column.

    Raises:
        UserError: the data of a task cannot be had.
    """
    columns = {name: checkpoint.identity for name, checkpoint in checkpoints.items()}
    scores = Scores(columns | ({first_stage.name: first_stage.embedder.identity} if first_stage else {}))
    table = ""
    for task in tasks:
        if first_stage and first_stage.is_for(task):
            with progress.doing(f"{first_stage.name} on {task.metadata.name}"):
                scores.add(first_stage.name, first_stage.find(task, batch_size))
        for name, checkpoint in checkpoints.items():
            with progress.doing(f"{name} on {task.metadata.name}"):
                scores.add(name, score(checkpoint, task, batch_size))
            table = write_table(scores, out)
        task.unload_data()
    return table
