"""How far a student without a language-modelling head is from its teacher on held-out text: the terms of its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from homodistil.config.schema import LossConfig
from homodistil.data.batch import Batch
from homodistil.distill.objective import Objective
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distributed import ranks

_TERMS = ("hidden", "attention", "embedding")


def measured_distances(loss: LossConfig) -> list[str]:
    """Names of the results of `evaluate_distances` for a run with these weights, without the count."""
    return [f"{name}_distance" for name in _TERMS if name == "attention" or name in loss.weights]


@torch.no_grad()
def evaluate_distances(
    student: Student, teacher: Teacher, batches: Iterable[Batch], device: torch.device
) -> dict[str, float]:
    """Means over all tokens of all ranks' batches. Every rank calls it.

    Args:
        batches: this rank's share (`fixed_batches`).

    Returns:
        attention_distance, and hidden_distance and embedding_distance where the run trains with these terms (they go
        by its projections): values of the terms, 0 for a copy of the teacher. evaluated_tokens (count).
    """
    objective = Objective(dataclasses.replace(student.objective.config, attention=1.0))
    names = [name.removesuffix("_distance") for name in measured_distances(student.objective.config)]
    sums = torch.zeros(2, len(names) + 1, dtype=torch.float64, device=device)
    for batch in batches:
        batch = _with_least_counts(batch).to(device)
        tokens = sums.new_tensor([*(_tokens(name, batch) for name in names), batch.counts.tokens])
        terms = student.compare(batch, teacher(batch), objective).terms
        values = torch.stack([*(terms[name].double() for name in names), sums.new_ones(())])
        sums += torch.stack([tokens * values, tokens])
    (*values, _), (*tokens, evaluated) = ranks.total(sums).tolist()
    distances = {f"{name}_distance": value / n for name, value, n in zip(names, values, tokens, strict=True)}
    return distances | {"evaluated_tokens": evaluated}


def _tokens(name: str, batch: Batch) -> float:
    """How many the term `name` is a mean over."""
    left_out = name == "hidden" and batch.counts.tokens_behind is not None
    return batch.counts.tokens_behind if left_out else batch.counts.tokens


def _with_least_counts(batch: Batch) -> Batch:
    """A batch of short texts alone may have no token behind those that are left out: its sum is 0, not 0 / 0."""
    counts = batch.counts
    if counts.tokens_behind is None:
        return batch
    return batch._replace(counts=counts._replace(tokens_behind=max(counts.tokens_behind, 1.0)))
