"""(c) A plain Hugging Face loop: narrower stock student, attentions and hidden states asked of the models, logits on
all positions, torch's AdamW (a new one at each prune, as Torch-Pruning leaves it; here the width stands still)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from transformers import BertForMaskedLM, get_constant_schedule

from benchmarks.peers import objective
from benchmarks.peers.settings import computing_in, student_in, teacher_in
from benchmarks.peers.workload import Files, Task


class Peer:
    """Args: setting: one of settings.SETTINGS."""

    def __init__(self, task: Task, files: Files, setting: str, options: dict) -> None:
        self.task, self.setting = task, setting
        eager = {"attn_implementation": "eager"}  # the only one that returns attention
        self.teacher = teacher_in(setting, BertForMaskedLM.from_pretrained(files.teacher, **eager))
        self.student = BertForMaskedLM.from_pretrained(files.student, **eager).train()
        keep = files.keep()
        self.heads = [keep[f"layer.{i}.heads"] for i in range(task.layers)]
        self.projections = objective.selections(task.layers + 1, keep["hidden"], task.hidden, task.student_hidden)
        student_in(setting, self.student, self.projections)
        self.optimizer = objective.adamw([self.student, self.projections])
        self.schedule = get_constant_schedule(self.optimizer)
        self.batches = itertools.cycle(files.batches())

    def step(self) -> None:
        batch = next(self.batches)
        with computing_in(self.setting):
            self.terms = self.losses(batch)
            total = torch.stack(list(self.terms.values())).sum()
        objective.update(total, self.optimizer, self.schedule)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        wanted = {"output_attentions": True, "output_hidden_states": True}
        with torch.no_grad():
            teacher = self.teacher(**inputs, **wanted)
        student = self.student(**inputs, **wanted)
        mask, labels = batch["attention_mask"], batch["labels"]
        rows = mask.bool() if self.task.kl_positions == "all" else labels != -100
        mlm, kl = objective.vocabulary_terms(student.logits[rows], teacher.logits[rows], labels[rows])
        own, theirs, projections = student.hidden_states, teacher.hidden_states, self.projections
        maps = [layer[:, heads] for layer, heads in zip(teacher.attentions, self.heads, strict=True)]
        return {
            "mlm": mlm,
            "kl": kl,
            "hidden": objective.hidden_term(own[1:], theirs[1:], projections[1:], mask),
            "embedding": objective.hidden_term(own[:1], theirs[:1], projections[:1], mask),
            "attention": objective.attention_term(student.attentions, maps, mask),
        }
