"""The terms over the vocabulary: MLM and KL, on the masked rows alone or (KL) on every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from homodistil.data.masked_lm import Batch
from homodistil.distill.teacher_outputs import TeacherOutputs, wanted_rows
from homodistil.kernels.masked_lm import linear_masked_lm_losses, masked_lm_losses

if TYPE_CHECKING:
    from homodistil.distill.objective import Objective
    from homodistil.distill.student import Student


class VocabularyTerms(NamedTuple):
    total: Tensor
    """Weighted sum, with a graph."""
    terms: dict[str, Tensor]
    """Detached, unweighted: mlm, kl."""


def vocabulary_terms(
    objective: Objective, student: Student, last: Tensor, batch: Batch, targets: TeacherOutputs | None
) -> VocabularyTerms | None:
    """`last`: output of the student's last layer (B, T, D). None when no term needs logits."""
    if not objective.needs_logits:
        return None
    if targets is not None and objective.positions == "all":
        return _on_all_tokens(objective, student, last, batch, targets)
    return _on_masked_rows(objective, student, last, batch, targets)


def _on_masked_rows(objective: Objective, student: Student, last, batch: Batch, targets) -> VocabularyTerms:
    weights, config, rows = objective.weights, objective.config, batch.counts.target_rows
    logits = student.mlm_logits(wanted_rows(last, batch, "masked"))
    theirs = targets.logits("masked") if targets is not None and "kl" in weights else None
    # The logits are ours alone: backward may write their gradient over them.
    ce, kl = masked_lm_losses(logits, theirs, batch.target_ids, config.kl_temperature, config.kernels, overwrite=True)
    found = {"mlm": ce / rows} | ({"kl": kl / rows} if kl is not None else {})
    found = {name: value for name, value in found.items() if name in weights}
    total = torch.stack([weights[name] * value for name, value in found.items()]).sum()
    return VocabularyTerms(total, {name: value.detach() for name, value in found.items()})


def _on_all_tokens(
    objective: Objective, student: Student, last, batch: Batch, targets: TeacherOutputs
) -> VocabularyTerms:
    """KL on every token, MLM on the labelled ones, chunk by chunk: all logits at once would take gigabytes."""
    weights, config, counts = objective.weights, objective.config, batch.counts
    ours = student.family.mlm_transform(student.model)(wanted_rows(last, batch, "all"))
    theirs, their_decoder = targets.before_decoder("all")
    factors = (weights.get("mlm", 0.0) / counts.target_rows, weights["kl"] / counts.tokens)

    def losses(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return linear_masked_lm_losses(
            rows,
            decoder.weight,
            decoder.bias,
            theirs,
            their_decoder.weight,
            their_decoder.bias,
            _labels(batch),
            *(torch.as_tensor(factor, dtype=torch.float32, device=rows.device) for factor in factors),
            temperature=config.kl_temperature,
            implementation=config.kernels,
        )

    decoder = student.family.decoder(student.model)
    total, ce, kl = _called_as(decoder, losses, ours)
    found = {"mlm": ce / counts.target_rows, "kl": kl / counts.tokens}
    return VocabularyTerms(total, {name: value for name, value in found.items() if name in weights})


def _labels(batch: Batch) -> Tensor:
    """Label of every valid token, in order; -100 where nothing is to be predicted. int64 (tokens,)."""
    labels = torch.full_like(batch.attention_mask, -100).flatten()
    labels.index_copy_(0, batch.target_index, batch.target_ids)
    return labels.index_select(0, batch.token_index)


def _called_as(module: nn.Module, function: Callable, rows: Tensor) -> tuple[Tensor, ...]:
    """`function(rows)` as the forward of `module`: under ZeRO-3 its weight exists only inside its own call."""
    module.forward = function
    try:
        return module(rows)
    finally:
        del module.forward
