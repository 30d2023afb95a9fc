"""What rerankers need beside the tasks: an embedder that finds the texts whose order they decide."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from homodistil.errors import UserError
from homodistil.evaluation.glue.checkpoint import FIELD
from homodistil.evaluation.mteb.benchmark import score
from homodistil.evaluation.mteb.checkpoints import Checkpoint

_OPTION = "--first-stage"
_RETRIEVAL = "Retrieval"
_KINDS = (_RETRIEVAL, "Reranking")
"""Types of tasks that rerankers are scored on. One of Reranking brings the texts whose order is asked for."""


@dataclass(frozen=True)
class FirstStage:
    name: str
    """As given on the command line."""
    embedder: Checkpoint
    top_k: int
    """How many texts of a query the rerankers order again."""

    def __post_init__(self) -> None:
        """Raise `UserError` for a reranker, which has no vectors to search by."""
        if self.embedder.is_reranker:
            raise UserError(f"{_OPTION}: found {self.name!r}, which is a reranker; name an embedder")

    def is_for(self, task: Any) -> bool:
        """Whether rerankers need it on `task`."""
        return task.metadata.type == _RETRIEVAL

    def find(self, task: Any, batch_size: int) -> dict[str, Any]:
        """From here on `task` asks for the order of the texts that the embedder ranks highest for each query.

        Returns the embedder's own result (`score`). Raises as that.
        """
        with tempfile.TemporaryDirectory() as folder:
            result = score(self.embedder, task, batch_size, prediction_folder=folder)
            task.convert_to_reranking(folder, self.top_k)
        return result


def check_kinds(checkpoints: Mapping[str, Checkpoint], tasks: Sequence[Any], first_stage: str | None) -> None:
    """Raise `UserError` where checkpoints, tasks and first stage do not fit each other."""
    rerankers = [name for name, checkpoint in checkpoints.items() if checkpoint.is_reranker]
    embedders = [name for name in checkpoints if name not in rerankers]
    if rerankers and embedders:
        raise UserError(
            f"{FIELD}: {rerankers[0]!r} is a reranker and {embedders[0]!r} an embedder; score them in two calls, the "
            f"rerankers with {_OPTION} EMBEDDER"
        )
    if first_stage and not rerankers:
        raise UserError(f"{_OPTION}: found {first_stage!r}, but there is no reranker in {FIELD}; leave it out")
    for task in tasks if rerankers else ():
        _check_task(task, rerankers[0], first_stage)


def _check_task(task: Any, reranker: str, first_stage: str | None) -> None:
    name, kind = task.metadata.name, task.metadata.type
    if kind not in _KINDS:
        raise UserError(
            f"--tasks: {name!r} is of type {kind}, allowed with the reranker {reranker!r} are {', '.join(_KINDS)}; "
            f"leave it out"
        )
    if kind == _RETRIEVAL and not first_stage:
        raise UserError(
            f"{_OPTION}: missing; on {name!r} the reranker {reranker!r} orders what an embedder has found: name that "
            f"embedder"
        )
