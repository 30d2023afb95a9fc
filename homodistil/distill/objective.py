"""The objective: the weighted sum of the terms of a run (losses/), each computed during the student's forward pass.

    L = MLM + a1 KL + a2 sum_k hidden_k + a3 sum_k attention_k + a4 embedding      (HomoDistil), and further terms

Every layer of the student is compared with its layer of the teacher (layer_map.py), as soon as both are known.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from homodistil.config.schema import LossConfig
from homodistil.data.batch import Batch
from homodistil.distill.losses.active import active_terms
from homodistil.distill.losses.term import Step, StudentSide
from homodistil.distill.teacher_outputs import TeacherOutputs
from homodistil.models.activations import ActivationVisitor, LayerActivations


class LossTerms(NamedTuple):
    total: Tensor
    """Weighted sum, a scalar with a graph."""
    terms: dict[str, Tensor]
    """Detached fp32 scalars, unweighted: those with a weight, and hidden/layer.0 and so on."""


class Objective:
    """The terms with a weight, and their weights; holds no parameters. Raises as `active_terms`."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.terms = active_terms(config)
        self.weights = config.weights
        self.needs = frozenset().union(*(term.needs for term in self.terms))

    @property
    def needs_last_layer(self) -> bool:
        """Whether any term reads what the last layer puts out."""
        return bool(self.needs & {"logits", "hidden", "last"})

    @property
    def needs_teacher(self) -> bool:
        return any(term.needs_teacher for term in self.terms)

    def num_readers(self, need: str) -> int:
        """Terms that read this of both sides."""
        return sum(need in term.needs for term in self.terms if term.needs_teacher)


class ComparedStudent(StudentSide, Protocol):
    num_layers: int

    def pass_modules(self, moment: str, hidden: Tensor, compared: Collection[str]) -> None:
        """Call the modules of `moment` of all trained terms but the `compared` ones, to keep to the order of calls."""


class Comparison(ActivationVisitor):
    """The terms of one micro-batch, collected during the student's forward pass.

    Args:
        objective: the terms.
        student: the side of the student that terms may read.
        batch: with `counts` = means over all micro-batches of the step on all ranks.
        targets: the teacher's side; None leaves the terms of the student alone (MLM: teacher correction).
    """

    def __init__(
        self, objective: Objective, student: ComparedStudent, batch: Batch, targets: TeacherOutputs | None
    ) -> None:
        self._objective, self._student, self._targets = objective, student, targets
        self._step = Step(student, targets, batch)
        self._compared = {term.name for term in objective.terms} if targets else set()
        self._once: dict[str, Tensor] = {}
        self._by_layer: dict[str, list[Tensor]] = {}
        if targets:
            targets.num_last_readers = objective.num_readers("logits") + objective.num_readers("last")

    def before_embedding(self, args: tuple, kwargs: dict) -> None:
        if self._targets:
            self._targets.run_embedding(args, kwargs)

    def embedding(self, output: Tensor) -> None:
        self._student.pass_modules("embedding", output, self._compared)
        if self._targets and "embedding" in self._objective.needs:
            target = self._targets.take_embedding()
            for term in self._objective.terms:
                if "embedding" in term.needs:
                    self._add(term.name, term.on_embedding(output, target, self._step))

    def before_layer(self, i: int, args: tuple, kwargs: dict) -> None:
        if self._targets:
            self._targets.run_layer(self._student.layer_map.layers[i], args, kwargs)

    def layer(self, i: int, tap: LayerActivations) -> None:
        is_last = i + 1 == self._student.num_layers
        self._student.pass_modules(f"layer_{i}", tap.hidden, self._compared)
        if is_last:
            self._student.pass_modules("last", tap.hidden, self._compared)
        if not self._targets:
            return
        target = self._targets.take_layer(self._student.layer_map.layers[i])
        for term in self._objective.terms:
            if (value := term.on_layer(i, tap, target, self._step)) is not None:
                self._by_layer.setdefault(term.name, []).append(value)
        if is_last:
            self._last_layer(tap, target)

    def _last_layer(self, tap: LayerActivations, target: LayerActivations) -> None:
        with_values = self._targets.take_values() if "values" in self._objective.needs else None
        for term in self._objective.terms:
            theirs = with_values if "values" in term.needs else target
            self._add(term.name, term.on_last_layer(tap, theirs, self._step))

    def finish(self, last: Tensor) -> LossTerms:
        """All terms, once the forward pass has ended. `last`: what the student's backbone puts out (B, T, D)."""
        self._student.pass_modules("end", last, self._compared)
        ends = [end for term in self._objective.terms if (end := term.at_end(last, self._step)) is not None]
        values: dict[str, Tensor] = {}
        for end in ends:
            values |= end.terms
        for name, parts in self._by_layer.items():
            self._once[name] = torch.stack(parts).sum()
            values |= {f"{name}/layer.{i}": part.detach() for i, part in enumerate(parts)}
        values |= {name: value.detach() for name, value in self._once.items()}
        # The order of these sums is part of a run's numbers.
        weighted = [end.total for end in ends]
        weighted += [self._objective.weights.get(name, 0.0) * value for name, value in self._once.items()]
        return LossTerms(torch.stack(weighted).sum(), values)

    def _add(self, name: str, value: Tensor | None) -> None:
        if value is not None:
            self._once[name] = value
