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
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
    for batch in batches:
        tokens, batch = batch.counts.tokens, batch.to(device)
        terms = student.compare(batch, teacher(batch), objective).terms
        sums += tokens * torch.stack([*(terms[name].double() for name in names), sums.new_ones(())])
    *values, tokens = ranks.total(sums).tolist()
    return {f"{name}_distance": value / tokens for name, value in zip(names, values, strict=True)} | {
        "evaluated_tokens": tokens
    }
