"""W of an embedder's vectors, fitted by least squares behind the last step.

Pooled states vary much more in some directions than in others, and along the latter gradient descent has not arrived
at the end of a run; a fit has. It costs two forward passes of a few thousand texts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from homodistil.config.derive import calibration_config
from homodistil.config.schema import RunConfig
from homodistil.distill.losses.pooled import PROJECTION
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.distributed import ranks
from homodistil.engine.engine import TrainingEngine
from homodistil.pruning.compensation.student import VECTORS_WEIGHT
from homodistil.pruning.compensation.vectors import fit_projection
from homodistil.resize import master_weights, write_weights
from homodistil.training.inputs import RunInputs

RIDGE = 1e-3
"""As a share of the mean variance of pooled states; 1e-4 to 1e-2 give the same (LOG.md)."""
CHECKED_SHARE = 8
"""One text in so many is not fitted to, but says whether the fit is better than what training has left."""
Pairs = Sequence[tuple[Tensor, Tensor]]
"""Micro-batches of this rank: pooled states of student (B, d) and teacher (B, D)."""


class Fit(NamedTuple):
    """Mean cosine to the teacher's pooled states on texts that were not fitted to."""

    before: float
    after: float
    seconds: float
    """Wall time."""


def is_fitted(config: RunConfig, student: Student) -> bool:
    """Whether the run ends with a fit: it trains a W of vectors, on as many texts as the fit takes."""
    texts = config.loss.projection_fit_texts
    trained_on = config.train.steps * config.train.global_batch_size
    return config.loss.projection_learned and PROJECTION in student.projections and 0 < texts <= trained_on


def fit_vectors(
    config: RunConfig,
    run_inputs: RunInputs,
    student: Student,
    teacher: Teacher,
    engine: TrainingEngine,
    consumed_samples: int,
) -> Fit:
    """Fit W of a trained student, in its engine, to the teacher's pooled states of texts that come next in training;
    it stays as it is where the fit is no better. Every rank calls it and gets the same bits."""
    start_s = time.perf_counter()
    calibration, _ = calibration_config(config, ranks.world_size(), config.loss.projection_fit_texts)
    batches = run_inputs.loader(calibration, config.train.seed)[consumed_samples]
    moved, pooling = (batch.to(run_inputs.device) for batch in batches), teacher.sentence_head.pooling
    pairs = [(student.pooled_states(batch, pooling), teacher.pooled_states(batch)) for batch in moved]
    num_checked = max(1, len(pairs) // CHECKED_SHARE)
    projection = _as_linear(master_weights(engine.deepspeed)[VECTORS_WEIGHT])
    before = _mean_cosine(projection, pairs[-num_checked:])
    fit_projection(projection, pairs[:-num_checked], RIDGE)
    after = _mean_cosine(projection, pairs[-num_checked:])
    if after > before:
        write_weights(engine.deepspeed, {VECTORS_WEIGHT: projection.weight.detach()})
    return Fit(before, after, time.perf_counter() - start_s)


def _as_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    return linear


@torch.no_grad()
def _mean_cosine(projection: nn.Linear, pairs: Pairs) -> float:
    """Over the texts of all ranks."""
    cosines = [functional.cosine_similarity(projection(states.float()), wanted.float()) for states, wanted in pairs]
    sums = torch.stack([sum(c.double().sum() for c in cosines), cosines[0].new_tensor(sum(map(len, cosines))).double()])
    total, count = ranks.total(sums).tolist()
    return total / count
