"""The objective: L = MLM + a1 KL + a2 sum_k hidden_k + a3 sum_k attention_k + a4 embedding (HomoDistil, equation of
the seed). Every layer of the student is compared with the same layer of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from homodistil.config import LossConfig
from homodistil.data.masking import Batch
from homodistil.distill import losses
from homodistil.distill.teacher import TeacherOutput
from homodistil.models.taps import Tapped


class LossTerms(NamedTuple):
    total: Tensor
    """Weighted sum, a scalar with a graph."""
    terms: dict[str, Tensor]
    """Detached fp32 scalars, unweighted: mlm, kl, hidden, attention, embedding, and hidden/layer.0 and so on."""


class Objective:
    """Weights and options of the terms; holds no parameters."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.weights = {
            name: weight
            for name in ("mlm", "kl", "hidden", "attention", "embedding")
            if (weight := float(getattr(config, name))) > 0
        }

    @property
    def needs_logits(self) -> bool:
        return "mlm" in self.weights or "kl" in self.weights

    def __call__(
        self,
        student: Tapped,
        logits: Tensor | None,
        teacher: TeacherOutput | None,
        batch: Batch,
        projections: Mapping[str, nn.Linear],
        head_maps: list[Tensor],
    ) -> LossTerms:
        """All terms with a weight above 0.

        Args:
            student: taps of the student.
            logits: (rows, V) of the student on the rows of `kl_positions`.
            teacher: its output on the same batch; None leaves MLM alone (teacher correction).
            batch: with `counts` = means over all micro-batches of the step on all ranks.
            projections: `embedding`, `layer_0`, ... (see `Student`).
            head_maps: per layer the teacher head of each student head, int64 (N_student,).
        """
        terms: dict[str, Tensor] = {}
        if "mlm" in self.weights:
            terms["mlm"] = losses.mlm(self._masked(logits, batch), batch.masked_labels) / batch.counts.masked_rows
        if teacher is not None:
            self._distillation_terms(terms, student, logits, teacher, batch, projections, head_maps)
        total = torch.stack([weight * terms[name] for name, weight in self.weights.items() if name in terms]).sum()
        return LossTerms(total, {name: term.detach() for name, term in terms.items()})

    def _masked(self, logits: Tensor, batch: Batch) -> Tensor:
        """The rows with a label: all of `logits`, or a selection when it covers every valid token."""
        if self.config.kl_positions == "masked":
            return logits
        row_of_position = batch.attention_mask.flatten().cumsum(0) - 1
        return logits.index_select(0, row_of_position[batch.masked_index])

    def _distillation_terms(self, terms, student, logits, teacher, batch, projections, head_maps) -> None:
        counts, tapped = batch.counts, teacher.tapped
        if "kl" in self.weights:
            rows = counts.masked_rows if self.config.kl_positions == "masked" else counts.tokens
            terms["kl"] = losses.logit_kl(logits, teacher.logits, self.config.kl_temperature) / rows
        if "hidden" in self.weights:
            pairs = zip(student.layers, tapped.layers, strict=True)
            per_layer = [self._mse(s, t, batch, projections[f"layer_{i}"]) for i, (s, t) in enumerate(pairs)]
            _add_layers(terms, "hidden", per_layer)
        if "embedding" in self.weights:
            terms["embedding"] = self._mse(student.embedding, tapped.embedding, batch, projections["embedding"])
        if "attention" in self.weights:
            per_layer = [self._attention(i, student, tapped, batch, heads) for i, heads in enumerate(head_maps)]
            _add_layers(terms, "attention", per_layer)

    def _mse(self, student: Tensor, teacher: Tensor, batch: Batch, projection: nn.Linear) -> Tensor:
        teacher = teacher.to(student.dtype)
        if self.config.projection == "student":
            student = projection(student)
        else:
            teacher = projection(teacher)
        return losses.hidden_mse(student, teacher, batch.attention_mask) / batch.counts.tokens

    def _attention(self, i: int, student: Tapped, teacher: Tapped, batch: Batch, heads: Tensor) -> Tensor:
        ours = losses.attention_scores(student.queries[i], student.keys[i], student.scale)
        queries, keys = teacher.queries[i], teacher.keys[i]
        if len(heads) < queries.shape[1]:
            # Pruned heads are gone from the student: compare each survivor with the teacher head that it came from.
            heads = heads.to(queries.device, non_blocking=True)
            queries, keys = queries.index_select(1, heads), keys.index_select(1, heads)
        theirs = losses.attention_scores(queries, keys, teacher.scale)
        target = self.config.attention_target
        return losses.attention_mse(ours, theirs, batch.attention_mask, target) / batch.counts.pairs


def _add_layers(terms: dict[str, Tensor], name: str, per_layer: list[Tensor]) -> None:
    terms[name] = torch.stack(per_layer).sum()
    terms |= {f"{name}/layer.{i}": value for i, value in enumerate(per_layer)}
