"""How near the vectors of a student are to those of its teacher, on held-out texts: cosine, and neighbours."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from homodistil.data.batch import Batch
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distributed import ranks

MAX_TEXTS = 2048
"""Held-out texts that are looked at: all pairs of them are compared."""
NEIGHBOURS = 10


@torch.no_grad()
def evaluate_vectors(
    student: Student, teacher: Teacher, batches: Iterable[Batch], positions: np.ndarray, num_texts: int
) -> dict[str, float]:
    """Measures over the texts of all ranks. Every rank calls it.

    Args:
        batches: this rank's share (`fixed_batches`).
        positions: number of each of its texts among all `num_texts`, (texts,) int64. Rows of `batches` behind these
            are of no text: a rank that has none in the last round takes part with one.

    Returns:
        vector_cosine (mean cosine of both vectors of a text), unless the student has a space of its own; recall_at_10
        (`recall`), of two texts or more; evaluated_texts (count).
    """
    pairs = [(student.embed(here, teacher.sentence_head), teacher.embed(here)) for here in moved(batches, teacher)]
    ours, theirs = (
        of_all_ranks(torch.cat(vectors)[: len(positions)], positions, num_texts) for vectors in zip(*pairs, strict=True)
    )
    measured = {"evaluated_texts": float(num_texts)}
    if ours.shape == theirs.shape:
        measured["vector_cosine"] = functional.cosine_similarity(ours, theirs, dim=-1).mean().item()
    return measured | ({"recall_at_10": recall(ours, theirs)} if num_texts > 1 else {})


def recall(ours: Tensor, theirs: Tensor, num: int = NEIGHBOURS) -> float:
    """Of the `num` nearest other texts by the teacher's vectors, the share that is among those by the student's: the
    mean over texts, each of which asks for its neighbours among all others.

    Args:
        ours: (N, Es). theirs: (N, Et). At least two texts; of N - 1 others or fewer all are neighbours.
    """
    mine, wanted = (_nearest(vectors, min(num, len(vectors) - 1)) for vectors in (ours, theirs))
    hits = (mine.unsqueeze(2) == wanted.unsqueeze(1)).any(2)
    return hits.double().mean().item()


def _nearest(vectors: Tensor, num: int) -> Tensor:
    """Numbers of the texts with the largest cosines to each text, without itself, int64 (N, num)."""
    unit = functional.normalize(vectors.double(), dim=-1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).topk(num, dim=-1).indices


def moved(batches: Iterable[Batch], teacher: Teacher) -> Iterable[Batch]:
    """`batches` on the device of `teacher`."""
    return (batch.to(teacher.device) for batch in batches)


def of_all_ranks(vectors: Tensor, positions: np.ndarray, num_texts: int) -> Tensor:
    """(num_texts, E), the same on every rank: each row comes from one rank, and all others add 0."""
    rows = vectors.new_zeros(num_texts, vectors.shape[1])
    rows[torch.from_numpy(positions).to(rows.device)] = vectors
    return ranks.total(rows)
