"""What the peers that bring no training loop of their own have in common: models, precision, optimizer, the step."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM, get_constant_schedule

from benchmarks.peers import objective
from benchmarks.peers.workload import Files, Task

SETTINGS = {"fp32": ["fp32"], "bf16": ["autocast", "bf16 weights"]}
"""Precision of the run -> settings that a user of a peer can choose between; the faster one is compared with.
autocast: fp32 weights, products in bf16; bf16 weights: no fp32 copy of them anywhere, which a long training would not
survive, but which is what `.bfloat16()` gives."""


def load_model(folder: Path) -> BertForMaskedLM:
    """With eager attention, the only one that returns its probabilities."""
    return BertForMaskedLM.from_pretrained(folder, attn_implementation="eager")


def student_in(setting: str, *modules: nn.Module) -> None:
    if setting == "bf16 weights":
        for module in modules:
            module.bfloat16()


def teacher_in(setting: str, teacher: nn.Module) -> nn.Module:
    """Frozen; its weights in bf16 wherever the run is: nothing updates them."""
    teacher = teacher.eval().requires_grad_(False)
    return teacher if setting == "fp32" else teacher.bfloat16()


def computing_in(setting: str) -> contextlib.AbstractContextManager:
    """Around forward passes and losses."""
    return torch.autocast("cpu", torch.bfloat16) if setting == "autocast" else contextlib.nullcontext()


class StockPeer:
    """A stock student in a loop by hand.

    Args:
        setting: one of SETTINGS.
        student: with `hidden` dims in its residual stream.
    """

    terms: dict[str, Tensor]
    """Of the last step."""

    def __init__(self, task: Task, files: Files, setting: str, student: BertForMaskedLM, hidden: int) -> None:
        self.task, self.setting, self.student, self.keep = task, setting, student, files.keep()
        self.teacher = teacher_in(setting, load_model(files.teacher))
        self.projections = objective.selections(task.layers + 1, self.keep["hidden"], task.hidden, hidden)
        student_in(setting, student, self.projections)
        self.optimizer = objective.adamw([student, self.projections])
        self.schedule = get_constant_schedule(self.optimizer)
        self.batches = itertools.cycle(files.batches())

    def step(self) -> None:
        batch = next(self.batches)
        with computing_in(self.setting):
            self.terms = self.losses(batch)
            total = torch.stack(list(self.terms.values())).sum()
        objective.update(total, self.optimizer, self.schedule)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError

    def heads_kept(self, attentions: tuple[Tensor, ...]) -> list[Tensor]:
        """Attention (B, N, T, T) per layer of the teacher's heads that the student has."""
        return [layer[:, self.keep[f"layer.{i}.heads"]] for i, layer in enumerate(attentions)]

    def compared(
        self, student, teacher, student_logits: Tensor, teacher_logits: Tensor, maps: list, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The terms.

        Args:
            student, teacher: outputs with `hidden_states`.
            student_logits, teacher_logits: (R, V) of the rows that the loss needs (`rows`).
            maps: attention of student and teacher, the same heads of both.
        """
        mask, labels, projections = batch["attention_mask"], batch["labels"], self.projections
        mlm, kl = objective.vocabulary_terms(student_logits, teacher_logits, labels[self.rows(batch)])
        mine, wanted = student.hidden_states, teacher.hidden_states
        return {
            "mlm": mlm,
            "kl": kl,
            "hidden": objective.hidden_term(mine[1:], wanted[1:], projections[1:], mask),
            "embedding": objective.hidden_term(mine[:1], wanted[:1], projections[:1], mask),
            "attention": objective.attention_term(*maps, mask),
        }

    def rows(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T), bool: the positions of the KL."""
        return batch["attention_mask"].bool() if self.task.kl_positions == "all" else batch["labels"] != -100
