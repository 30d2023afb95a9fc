"""The objective: L = MLM + a1 KL + a2 sum_k hidden_k + a3 sum_k attention_k + a4 embedding (HomoDistil, equation of
the seed), and the terms of its rivals: the cosine of the last hidden states (cosine.py), relations (relations.py).

Every layer of the student is compared with its layer of the teacher (layer_map.py), as soon as both are known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from homodistil.config.schema import LossConfig
from homodistil.data.masked_lm import Batch
from homodistil.distill.losses.relations import num_relation_heads, relation_loss
from homodistil.distill.losses.vocabulary import VocabularyTerms
from homodistil.distill.teacher_outputs import TeacherOutputs
from homodistil.kernels.attention_map import attention_map_loss
from homodistil.models.activations import ActivationVisitor, LayerActivations

if TYPE_CHECKING:
    from homodistil.distill.student import Student

TERMS = ("mlm", "kl", "hidden", "attention", "embedding", "cosine", "relations")
"""Each a weight of the config."""


class LossTerms(NamedTuple):
    total: Tensor
    """Weighted sum, a scalar with a graph."""
    terms: dict[str, Tensor]
    """Detached fp32 scalars, unweighted: those of TERMS with a weight, and hidden/layer.0 and so on."""


class Objective:
    """Weights and options of the terms; holds no parameters."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.weights = {name: weight for name in TERMS if (weight := float(getattr(config, name))) > 0}

    @property
    def needs_last_layer(self) -> bool:
        """Whether any term reads what the last layer puts out."""
        return any(name in self.weights for name in ("mlm", "kl", "hidden", "cosine"))

    @property
    def needs_teacher(self) -> bool:
        return any(name != "mlm" for name in self.weights)

    @property
    def needs_logits(self) -> bool:
        return "mlm" in self.weights or "kl" in self.weights

    @property
    def positions(self) -> str:
        """Rows that meet the vocabulary: "masked", or "all" when the KL is taken over every token."""
        return self.config.kl_positions if "kl" in self.weights else "masked"


class Comparison(ActivationVisitor):
    """The terms of one micro-batch, gathered while the student's forward pass goes by.

    Args:
        objective: weights and options.
        student: for its projections, head maps and softmax scale.
        batch: with `counts` = means over all micro-batches of the step on all ranks.
        targets: the teacher's side; None leaves MLM alone (teacher correction).
    """

    def __init__(self, objective: Objective, student: Student, batch: Batch, targets: TeacherOutputs | None) -> None:
        self._objective, self._student, self._batch, self._targets = objective, student, batch, targets
        self._per_layer: dict[str, list[Tensor]] = {"hidden": [], "attention": []}
        self._sums: dict[str, Tensor] = {}

    def before_embedding(self, args: tuple, kwargs: dict) -> None:
        if self._targets:
            self._targets.run_embedding(args, kwargs)

    def embedding(self, output: Tensor) -> None:
        if not self._targets:
            self._student.pass_projection("embedding", output)
        elif self._wants("embedding"):
            self._sums["embedding"] = self._hidden("embedding", output, self._targets.take_embedding())

    def before_layer(self, i: int, args: tuple, kwargs: dict) -> None:
        if self._targets:
            self._targets.run_layer(self._student.layer_map.layers[i], args, kwargs)

    def layer(self, i: int, tap: LayerActivations) -> None:
        if not self._targets:
            self._student.pass_projection(f"layer_{i}", tap.hidden)
            if i + 1 == self._student.num_layers:
                self._student.pass_projection("last", tap.hidden)
            return
        target = self._targets.take_layer(self._student.layer_map.layers[i])
        if self._wants("hidden"):
            self._per_layer["hidden"].append(self._hidden(f"layer_{i}", tap.hidden, target.hidden))
        if self._wants("attention"):
            self._per_layer["attention"].append(self._attention(i, tap, target))
        if i + 1 == self._student.num_layers:
            self._last_layer(tap, target)

    def _last_layer(self, tap: LayerActivations, target: LayerActivations) -> None:
        mask, counts = self._batch.attention_mask, self._batch.counts
        if self._wants("cosine"):
            self._sums["cosine"] = self._student.cosine_to(target.hidden, tap.hidden, mask) / counts.tokens
        if self._wants("relations"):
            config = self._objective.config
            num_heads = num_relation_heads(config, self._student.layer_map.num_heads)
            loss = relation_loss(tap, self._targets.take_relations(), mask, num_heads, config.kernels)
            self._sums["relations"] = loss / counts.tokens

    def finish(self, vocabulary: VocabularyTerms | None) -> LossTerms:
        """All terms, once the forward pass has ended."""
        terms = vocabulary.terms if vocabulary else {}
        weighted = [vocabulary.total] if vocabulary else []
        for name, values in self._per_layer.items():
            if values:
                self._sums[name] = torch.stack(values).sum()
                terms |= {f"{name}/layer.{i}": value.detach() for i, value in enumerate(values)}
        terms |= {name: value.detach() for name, value in self._sums.items()}
        weighted += [self._objective.weights[name] * value for name, value in self._sums.items()]
        return LossTerms(torch.stack(weighted).sum(), terms)

    def _wants(self, name: str) -> bool:
        return self._targets is not None and name in self._objective.weights

    def _hidden(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        mask, counts = self._batch.attention_mask, self._batch.counts
        return self._student.projections[name](student, teacher, mask) / counts.tokens

    def _attention(self, i: int, student: LayerActivations, teacher: LayerActivations) -> Tensor:
        config, counts = self._objective.config, self._batch.counts
        loss = attention_map_loss(
            student.queries,
            student.keys,
            teacher.queries,
            teacher.keys,
            self._student.softmax_scale,
            self._targets.scale,
            self._batch.attention_mask,
            heads=self._student.pruned_heads(i, student.queries.device),
            target=config.attention_target,
            implementation=config.kernels,
        )
        return loss / (counts.tokens if config.attention_target == "probabilities_kl" else counts.pairs)
