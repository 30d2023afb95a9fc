"""What every peer trains: one teacher, one cut of it, the same batches and the same loss, as files in a folder.

`prepare` writes a random BERT with its tokenizer, a text, the batches that homodistil's loader draws from it, and the
student that a random keep leaves of the teacher, as a stock checkpoint. Random weights: times do not depend on them,
and every term of the loss is far from 0, so a peer that computed another one would be seen.

    L = CE(masked rows) + KL(teacher || student; masked rows) + sum over layers of MSE(W H_s, H_t) over tokens
      + MSE(W E_s, E_t) + sum over layers of MSE(attention probabilities) over heads and pairs of tokens

Each student layer is compared with the same teacher layer, each student head with the teacher head it was. W (learned,
on the student's side) begins as the selection of the surviving dims.
"""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TERMS = ("mlm", "kl", "hidden", "embedding", "attention")
NUM_BATCHES = 8
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, CLIPPING = 1e-4, (0.9, 0.999), 1e-6, 0.01, 1.0
_PROBE_SHARE = 0.4
"""Held-out share of the text: enough for the whole probe of homodistil/evaluation/gap_probe.py."""


@dataclass(frozen=True)
class Task:
    """Sizes of teacher, student and batch; precision of the run."""

    layers: int = 12
    hidden: int = 768
    ffn: int = 3072
    heads: int = 12
    vocabulary: int = 30522
    student_hidden: int = 256
    student_ffn: int = 1024
    student_heads: int = 8
    sequences: int = 8
    tokens: int = 128
    blocks: int = 120
    """Sequences of the corpus; the held-out ones are the probe that homodistil measures at every resize event."""
    precision: str = "bf16"
    """bf16 or fp32."""
    kl_positions: str = "masked"
    """Rows of the KL: masked, or all."""

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.precision]


SIZES = {
    "standard": Task(),
    "quick": Task(layers=4, sequences=4, tokens=64),
    "tiny": Task(2, 48, 96, 4, 211, student_hidden=16, student_ffn=32, student_heads=2, sequences=4, tokens=16),
}


@dataclass(frozen=True)
class Files:
    """The folder that `prepare` filled."""

    folder: Path

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def student(self) -> Path:
        """The cut student as a stock checkpoint."""
        return self.folder / "student"

    @property
    def text(self) -> Path:
        return self.folder / "text.txt"

    def batches(self) -> list[dict[str, Tensor]]:
        """As Hugging Face models take them: input_ids, attention_mask, labels (-100 = not to predict), (B, T) int64."""
        return torch.load(self.folder / "batches.pt")

    def keep(self) -> dict[str, Tensor]:
        """Axis -> what survives of the teacher (homodistil/models/axes.py)."""
        return torch.load(self.folder / "keep.pt")


def arguments(task: Task, files: Files, run_folder: Path) -> list[str]:
    """homodistil's command line for this task: the shipped recipe, with the task's sizes and loss."""
    values = {
        "teacher.name": files.teacher,
        "student.hidden_size": task.student_hidden,
        "student.intermediate_size": task.student_ffn,
        "student.num_attention_heads": task.student_heads,
        "data.sources": f"[{files.text}]",
        "data.text_documents": "paragraph",
        "data.seq_len": task.tokens,
        "data.heldout_fraction": _PROBE_SHARE,
        "data.workers": 0,
        "data.cache_dir": files.folder / "cache",
        "train.global_batch_size": task.sequences,
        "train.micro_batch_size": task.sequences,
        "train.lr": LEARNING_RATE,
        "train.weight_decay": WEIGHT_DECAY,
        "train.gradient_clipping": CLIPPING,
        "loss.kl_positions": task.kl_positions,
        "loss.attention_target": "probabilities",
        "loss.projection": "student",
        "run.dir": run_folder,
    }
    if task.hidden < 128:  # too narrow for the recipe's multiples
        values |= {"pruning.width_multiple": 2, "pruning.ffn_multiple": 4}
    return ["recipe=homobert-small-paper", *(f"{name}={value}" for name, value in values.items())]


def prepare(task: Task, folder: Path) -> Files:
    """Teacher, text, batches, keep and student under `folder`."""
    files = Files(folder)
    teacher = _write_teacher(task, files)
    _write_text(task, files)
    _write_batches(task, files)
    _write_student(task, files, teacher)
    return files


def _write_teacher(task: Task, files: Files):
    from transformers import BertConfig, BertForMaskedLM

    # In functions, here and below: what a peer's process imports counts as its memory.
    from benchmarks.harness.product import word_tokenizer

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=task.hidden,
        num_hidden_layers=task.layers,
        num_attention_heads=task.heads,
        intermediate_size=task.ffn,
        vocab_size=task.vocabulary,
        max_position_embeddings=max(task.tokens, 64),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=1.5 / math.sqrt(task.hidden),  # far from uniform attention and logits
    )
    teacher = BertForMaskedLM(config)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # fresh biases are zeros, which would hide a bias that is cut wrongly
    teacher.save_pretrained(files.teacher)
    word_tokenizer(task.vocabulary).save_pretrained(files.teacher)
    return teacher


def _write_text(task: Task, files: Files) -> None:
    """One document per block, some of them shorter: padding is part of the check."""
    from benchmarks.harness.product import SPECIAL

    draw, documents = random.Random(0), []
    for block in range(task.blocks):
        num_words = task.tokens - 2 if block % 4 else task.tokens // 2
        words = (f"w{draw.randrange(task.vocabulary - len(SPECIAL))}" for _ in range(num_words))
        documents.append(" ".join(words))
    files.text.write_text("\n\n".join(documents) + "\n", encoding="utf-8")


def _write_batches(task: Task, files: Files) -> None:
    from homodistil.config.command_line import parse
    from homodistil.data.loader import BatchLoader
    from homodistil.data.prepare.corpus import prepare_corpus
    from homodistil.distill.teacher import load_config, load_tokenizer

    config = parse(arguments(task, files, files.folder / "unused"))
    tokenizer = load_tokenizer(str(files.teacher), load_config(str(files.teacher)))
    rows = prepare_corpus(config.data, tokenizer).train
    loader = BatchLoader(rows, tokenizer, config.data, config.train.seed, task.sequences, task.sequences, 0, 1)
    batches = [loader.micro_batches(step * task.sequences)[0] for step in range(NUM_BATCHES)]
    torch.save([_with_labels(batch) for batch in batches], files.folder / "batches.pt")


def _with_labels(batch) -> dict[str, Tensor]:
    labels = torch.full_like(batch.input_ids, -100)
    labels.view(-1)[batch.target_index] = batch.target_ids
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def _write_student(task: Task, files: Files, teacher) -> None:
    """Cuts the teacher, then folds the teacher's softmax scale, which training keeps, into the queries."""
    from transformers import BertForMaskedLM

    from benchmarks.harness.workload import narrower
    from homodistil.config.schema import StudentConfig
    from homodistil.models.encoders.bert import BERT as bert
    from homodistil.models.resize_plan import make_plan, slice_module
    from homodistil.models.shapes import target_shape, target_widths

    table = bert.axis_table(teacher)
    shape = StudentConfig(
        hidden_size=task.student_hidden,
        intermediate_size=task.student_ffn,
        num_attention_heads=task.student_heads,
    )
    widths = target_widths(target_shape(shape, table.widths), table.widths)
    keep = narrower(table, widths, seed=0)
    torch.save(keep, files.folder / "keep.pt")
    slice_module(teacher, make_plan(table, keep))
    student = BertForMaskedLM(bert.student_config(teacher.config, widths))
    student.load_state_dict(teacher.state_dict())
    ratio = math.sqrt(task.student_hidden / task.student_heads / (task.hidden / task.heads))
    with torch.no_grad():
        for attention in bert.attentions(student):
            attention.query.weight.mul_(ratio)
            attention.query.bias.mul_(ratio)
    student.save_pretrained(files.student)


def as_dict(task: Task) -> dict:
    return dataclasses.asdict(task)
