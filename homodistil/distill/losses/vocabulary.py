"""The terms over the vocabulary: language modelling and KL (loss.mlm, loss.kl).

A masked language model takes them on the masked rows alone, or (KL) on every token; a causal one on every row that is
predicted. Wherever that is nearly every token, logits exist for a chunk of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from homodistil.data.batch import Batch
from homodistil.distill.losses.term import BatchSizes, Step, Term, Weighted
from homodistil.distill.teacher_outputs import wanted_rows
from homodistil.kernels.masked_lm import linear_masked_lm_losses, masked_lm_losses


class Vocabulary(Term):
    """Cross-entropy to the text, and KL(teacher || student): one class, because one kernel makes both of the logits."""

    names = ("mlm", "kl")
    needs = frozenset({"logits"})

    @property
    def needs_teacher(self) -> bool:
        return "kl" in self.weights

    @property
    def positions(self) -> str:
        """Rows on which the KL is taken: "masked", or "all"."""
        return self.loss.kl_positions if "kl" in self.weights else "masked"

    def at_end(self, last: Tensor, step: Step) -> Weighted:
        if step.teacher is not None and self.positions == "all":
            return self._in_chunks(last, step, "all", _labels(step.batch))
        if step.student.family.is_causal:
            return self._in_chunks(last, step, "masked", step.batch.target_ids)
        return self._on_masked_rows(last, step)

    def _on_masked_rows(self, last: Tensor, step: Step) -> Weighted:
        batch, rows = step.batch, step.batch.counts.target_rows
        logits = step.student.lm_logits(wanted_rows(last, batch, "masked"))
        theirs = step.teacher.logits("masked") if step.teacher is not None and self.needs_teacher else None
        # The logits are ours alone: backward may write their gradient over them.
        ce, kl = masked_lm_losses(
            logits, theirs, batch.target_ids, self.loss.kl_temperature, self.loss.kernels, overwrite=True
        )
        return self.weighted({"mlm": ce / rows} | ({"kl": kl / rows} if kl is not None else {}))

    def _in_chunks(self, last: Tensor, step: Step, positions: str, labels: Tensor) -> Weighted:
        """Both on the rows of `positions`, chunk by chunk: all logits at once would take gigabytes.

        Args:
            labels: of these rows, int64 (rows,), negative where a row has none.
        """
        student, batch, counts = step.student, step.batch, step.batch.counts
        decoder = student.family.decoder(student.model)
        ours = student.family.lm_transform(student.model)(wanted_rows(last, batch, positions))
        theirs = None
        if step.teacher is not None and self.needs_teacher:
            theirs = step.teacher.before_decoder(positions)
        kl_rows = counts.tokens if positions == "all" else counts.target_rows
        factors = (self.weights.get("mlm", 0.0) / counts.target_rows, self.weights.get("kl", 0.0) / kl_rows)
        factors = [torch.as_tensor(factor, dtype=torch.float32, device=ours.device) for factor in factors]
        options = {"temperature": self.loss.kl_temperature, "implementation": self.loss.kernels}

        def losses(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return chunked_losses(rows, decoder, theirs, labels, *factors, **options)

        total, ce, kl = called_as(decoder, losses, ours)
        values = {"mlm": ce / counts.target_rows, "kl": kl / kl_rows}
        wanted = self.weights if theirs is not None else {"mlm"} & set(self.weights)
        return Weighted(total, {name: value for name, value in values.items() if name in wanted})

    def head_rows(self, sizes: BatchSizes) -> tuple[float, float]:
        kl_rows = 0
        if "kl" in self.weights:
            kl_rows = sizes.tokens if self.positions == "all" else sizes.target_rows
        return max(sizes.target_rows if "mlm" in self.weights else 0, kl_rows), kl_rows

    def logit_rows(self, sizes: BatchSizes) -> float:
        """In chunks none is kept: gradients are made in the forward, chunk by chunk."""
        return 0 if self.positions == "all" or sizes.architecture.is_causal else sizes.target_rows

    def saved_bytes(self, sizes: BatchSizes) -> float:
        """Logits of both models, and the gradient with which the way back begins."""
        entry = 2 * sizes.student_bytes + (sizes.teacher_bytes if self.needs_teacher else 0)
        return self.logit_rows(sizes) * sizes.vocab_size * entry


def _labels(batch: Batch) -> Tensor:
    """Label of every valid token, in order; -100 where nothing is to be predicted. int64 (tokens,)."""
    labels = torch.full_like(batch.attention_mask, -100).flatten()
    labels.index_copy_(0, batch.target_index, batch.target_ids)
    return labels.index_select(0, batch.token_index)


def chunked_losses(
    rows: Tensor,
    decoder: nn.Linear,
    teacher: tuple[Tensor, nn.Linear] | None,
    labels: Tensor,
    ce_factor: Tensor,
    kl_factor: Tensor,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_masked_lm_losses` of rows that enter `decoder`; `teacher`: its rows and its decoder, None: no KL."""
    their_rows, theirs = teacher if teacher is not None else (None, None)
    ours = (decoder.weight, decoder.bias)
    theirs = (None, None) if theirs is None else (theirs.weight, theirs.bias)
    return linear_masked_lm_losses(rows, *ours, their_rows, *theirs, labels, ce_factor, kl_factor, **options)


def called_as(module: nn.Module, function: Callable, rows: Tensor) -> tuple[Tensor, ...]:
    """`function(rows)` as the forward of `module`: under ZeRO-3 its weight exists only inside its own call."""
    module.forward = function
    try:
        return module(rows)
    finally:
        del module.forward
