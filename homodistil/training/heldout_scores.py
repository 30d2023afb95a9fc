"""How good student and teacher are on held-out text, in the numbers of their task."""

from __future__ import annotations

import functools

from torch import Tensor

from homodistil.config.schema import RunConfig
from homodistil.data.task import task_of
from homodistil.data.token_bytes import token_bytes
from homodistil.distill.student import Student
from homodistil.distill.teacher import Teacher
from homodistil.evaluation.distances import evaluate_distances, measured_distances
from homodistil.evaluation.heldout import evaluate
from homodistil.evaluation.labels import compared_to_labels
from homodistil.evaluation.next_tokens import evaluate_next_tokens
from homodistil.evaluation.scores import evaluate_scores, scores_of_itself, teacher_logits
from homodistil.evaluation.token_scores import evaluate_token_scores, teacher_to_labels, token_scores_of_itself
from homodistil.evaluation.vectors import evaluate_vectors
from homodistil.models.classifier import logit_kind, problem_type
from homodistil.models.family import ModelFamily
from homodistil.training.inputs import RunInputs


class HeldoutScores:
    """Every rank calls each method. `limit`: on the first so many blocks (None: all)."""

    def __init__(self, config: RunConfig, run_inputs: RunInputs, family: ModelFamily) -> None:
        self.config, self.run_inputs, self.family = config, run_inputs, family

    def of_student(self, student: Student, teacher: Teacher | None, limit: int | None = None) -> dict[str, float]:
        """`teacher`: for the KL; None leaves it out. Without a language-modelling head it must be there."""
        if self.run_inputs.sentence_modules is not None:
            return self._vectors(student, teacher, limit)
        if self.run_inputs.head == "classifier":
            return self._scores(student, teacher, limit)
        if not self.run_inputs.with_head:
            batches = self.run_inputs.heldout(self.config, limit)
            return evaluate_distances(student, teacher, batches, self.run_inputs.device)
        if not self.family.is_causal:
            return self._masked(student.predict, teacher and teacher.predict, limit)
        return self._causal(student, functools.partial(student.lm_losses, teacher=teacher), teacher is not None, limit)

    def of_teacher(self, teacher: Teacher, limit: int | None = None) -> dict[str, float]:
        """Its distance to itself is 0."""
        if self.run_inputs.sentence_modules is not None:
            return {"vector_cosine": 1.0, "recall_at_10": 1.0}
        if self.run_inputs.head == "classifier":
            of_itself = token_scores_of_itself if self._has_token_labels else scores_of_itself
            return of_itself(logit_kind(teacher.model.config)) | self._teacher_to_labels(teacher, limit)
        if not self.run_inputs.with_head:
            return dict.fromkeys(measured_distances(self.config.loss), 0.0)
        if not self.family.is_causal:
            measured = self._masked(teacher.predict, None, limit)
        else:
            measured = self._causal(teacher, teacher.lm_losses, False, limit)
        return measured | {"kl_to_teacher": 0.0}

    def loss_of(self, student: Student, limit: int | None = None) -> float:
        """Cross-entropy of what the task predicts, nats."""
        return language_loss(self.of_student(student, None, limit))

    def _vectors(self, student: Student, teacher: Teacher, limit: int | None) -> dict[str, float]:
        positions, total = self.run_inputs.heldout_positions(self.config, limit)
        return evaluate_vectors(student, teacher, self.run_inputs.heldout(self.config, limit), positions, total)

    def _scores(self, student: Student, teacher: Teacher, limit: int | None) -> dict[str, float]:
        positions, total = self.run_inputs.heldout_positions(self.config, limit)
        batches = self.run_inputs.heldout(self.config, limit)
        if self._has_token_labels:
            return evaluate_token_scores(student, teacher, batches, total)
        to_labels = functools.partial(self._to_labels, teacher, limit)
        return evaluate_scores(student, teacher, batches, positions, total, to_labels)

    def _teacher_to_labels(self, teacher: Teacher, limit: int | None) -> dict[str, float]:
        if self.run_inputs.corpus.labels is None:
            return {}
        if self._has_token_labels:
            return teacher_to_labels(teacher, self.run_inputs.heldout(self.config, limit))
        positions, total = self.run_inputs.heldout_positions(self.config, limit)
        logits = teacher_logits(teacher, self.run_inputs.heldout(self.config, limit), positions, total)
        return self._to_labels(teacher, limit, logits)

    def _to_labels(self, teacher: Teacher, limit: int | None, logits: Tensor) -> dict[str, float]:
        """Measures of logits (texts, L) by ground-truth labels; {} where there are none."""
        labels = self.run_inputs.heldout_labels(limit)
        if labels is None:
            return {}
        return compared_to_labels(logits, labels, problem_type(teacher.model.config))

    @property
    def _has_token_labels(self) -> bool:
        return task_of(self.config.data).has_token_labels

    def _masked(self, predict, teacher, limit: int | None) -> dict[str, float]:
        return evaluate(predict, teacher, self.run_inputs.heldout(self.config, limit), self.run_inputs.device)

    def _causal(self, model: Student | Teacher, losses, has_teacher: bool, limit: int | None) -> dict[str, float]:
        batches = self.run_inputs.heldout(self.config, limit)
        sizes = self._token_bytes(model.model.config.vocab_size)
        return evaluate_next_tokens(losses, has_teacher, batches, sizes, self.run_inputs.device)

    @functools.cache  # noqa: B019 - one object lives as long as its run
    def _token_bytes(self, vocab_size: int) -> Tensor:
        return token_bytes(self.run_inputs.tokenizer, vocab_size)


def language_loss(measured: dict[str, float]) -> float:
    """The cross-entropy among held-out results, nats: of masked tokens, or of the next ones."""
    return measured["mlm_loss"] if "mlm_loss" in measured else measured["lm_loss"]
