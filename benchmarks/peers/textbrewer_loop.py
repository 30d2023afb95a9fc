"""(b) TextBrewer's GeneralDistiller and its own training loop, set up as its documentation shows, with a narrower stock
student.

Its loop asks its data loader for the next batch when a step is done: the loader hands control back to the benchmark
there, so nothing inside the library is touched. Its KD loss is the cross-entropy between teacher and student, which is
the KL plus the teacher's entropy, a constant without gradient: `terms` subtracts it. Its projections have a bias, 0 at
first. Pre-softmax scores are not available to it; `logits_mask` keeps the KL to the wanted rows.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator

import torch
from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from torch import Tensor

from benchmarks.peers import objective
from benchmarks.peers.stock_peer import computing_in, load_model, student_in, teacher_in
from benchmarks.peers.workload import CLIPPING, Files, Task

FOREVER = 10**9


class Turns:
    """A data loader that gives one batch for every `step` of the benchmark."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self._batches = itertools.cycle(batches)
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            self._go.acquire()
            self.batch = next(self._batches)
            # Without labels the teacher does not compute a loss that nobody wants.
            inputs = {name: self.batch[name] for name in ("input_ids", "attention_mask")}
            yield {"teacher": inputs, "student": self.batch}
            self._done.release()

    def fail(self, error: BaseException) -> None:
        self.error = error
        self._done.release()

    def step(self) -> None:
        self._go.release()
        self._done.acquire()
        if self.error is not None:
            raise self.error


class _Distiller(GeneralDistiller):
    """With a precision for one step, and a look at the terms."""

    setting: str
    losses: dict[str, Tensor]
    teacher_entropy: Tensor | None = None
    """Of the first batch."""

    def train_on_batch(self, batch, args):
        with computing_in(self.setting):  # once a step: autocast keeps its bf16 copies of weights until it is left
            total, self.losses = super().train_on_batch(batch, args)
        return total, self.losses

    def compute_loss(self, results_S, results_T):
        if self.teacher_entropy is None:
            rows = results_T["logits"][0][results_T["logits_mask"][0].bool()].float().log_softmax(-1)
            self.teacher_entropy = -(rows.exp() * rows).sum(-1).mean()
        return super().compute_loss(results_S, results_T)


class Peer:
    """Args: setting: one of stock_peer.SETTINGS."""

    def __init__(self, task: Task, files: Files, setting: str, options: dict) -> None:
        self.task, self.setting, self.turns = task, setting, Turns(files.batches())
        logging.getLogger("Distillation").setLevel(logging.ERROR)
        self.teacher = teacher_in(setting, load_model(files.teacher))
        self.student = load_model(files.student).train()
        keep = files.keep()
        self.heads = [keep[f"layer.{i}.heads"] for i in range(task.layers)]
        self.distiller = _Distiller(
            TrainingConfig(device="cpu", log_dir=None, output_dir=str(files.folder), ckpt_steps=FOREVER),
            DistillationConfig(
                temperature=1, kd_loss_type="ce", hard_label_weight=1, intermediate_matches=self._matches()
            ),
            self.teacher,
            self.student,
            self._teacher_adaptor,
            self._student_adaptor,
        )
        self.distiller.setting = setting
        selected = objective.selections(1, keep["hidden"], task.hidden, task.student_hidden)[0].weight
        for projection in filter(None, self.distiller.projs):
            projection.weight.data.copy_(selected.data)
        student_in(setting, self.student, *filter(None, self.distiller.projs))
        threading.Thread(target=self._train, daemon=True).start()

    def _train(self) -> None:
        try:
            optimizer = objective.adamw([self.student])  # the distiller adds its projections
            wanted = {"output_attentions": True, "output_hidden_states": True}
            with self.distiller:
                self.distiller.train(optimizer, self.turns, num_steps=FOREVER, max_grad_norm=CLIPPING, **wanted)
        except BaseException as error:
            self.turns.fail(error)

    def _matches(self) -> list[dict]:
        task, matches = self.task, []
        project = ["linear", task.student_hidden, task.hidden]
        for i in range(task.layers + 1):
            layer = {"layer_T": i, "layer_S": i, "weight": 1}
            matches.append(layer | {"feature": "hidden", "loss": "hidden_mse", "proj": list(project)})
            if i < task.layers:
                matches.append(layer | {"feature": "attention", "loss": "attention_mse"})
        return matches

    def _teacher_adaptor(self, batch: dict, output) -> dict:
        maps = [layer[:, heads] for layer, heads in zip(output.attentions, self.heads, strict=True)]
        return self._adapted(output) | {"attention": maps}

    def _student_adaptor(self, batch: dict, output) -> dict:
        return self._adapted(output) | {"losses": output.loss, "attention": output.attentions}

    def _adapted(self, output) -> dict:
        batch = self.turns.batch
        rows = batch["attention_mask"] if self.task.kl_positions == "all" else batch["labels"] != -100
        hidden = {"hidden": output.hidden_states, "inputs_mask": batch["attention_mask"]}
        return hidden | {"logits": output.logits, "logits_mask": rows}

    def step(self) -> None:
        self.turns.step()

    @property
    def terms(self) -> dict[str, Tensor]:
        losses = {name.removeprefix("unweighted_"): value for name, value in self.distiller.losses.items()}
        hidden = [losses[f"hidden_hidden_mse_{i}_{i}"] for i in range(self.task.layers + 1)]
        attention = [losses[f"attention_attention_mse_{i}_{i}"] for i in range(self.task.layers)]
        return {
            "mlm": losses["hard_label_loss"],
            "kl": losses["kd_loss"] - self.distiller.teacher_entropy,
            "hidden": torch.stack(hidden[1:]).sum(),
            "embedding": hidden[0],
            "attention": torch.stack(attention).sum(),
        }
