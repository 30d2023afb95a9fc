"""(c) A plain Hugging Face loop: narrower stock student, attentions and hidden states asked of the models, logits on
all positions, torch's AdamW (a new one at each prune, as Torch-Pruning leaves it; here the width stands still)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.stock_peer import StockPeer, load_model
from benchmarks.peers.workload import Files, Task


class Peer(StockPeer):
    """Args: setting: one of stock_peer.SETTINGS."""

    def __init__(self, task: Task, files: Files, setting: str, options: dict) -> None:
        super().__init__(task, files, setting, load_model(files.student).train(), task.student_hidden)

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        wanted = {"output_attentions": True, "output_hidden_states": True}
        with torch.no_grad():
            teacher = self.teacher(**inputs, **wanted)
        student, rows = self.student(**inputs, **wanted), self.rows(batch)
        maps = [student.attentions, self.heads_kept(teacher.attentions)]
        return self.compared(student, teacher, student.logits[rows], teacher.logits[rows], maps, batch)
