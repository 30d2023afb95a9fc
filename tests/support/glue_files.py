"""Small glue_data folders in the layout of the official files, odd rows included; and a tiny checkpoint to train."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from homodistil.evaluation.glue.tasks import TASKS

# All columns of the official training files, as their first line has them (CoLA's have no such line).
HEADERS = {
    "CoLA": None,
    "SST-2": ["sentence", "label"],
    "MRPC": ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "STS-B": "index genre filename year old_index source1 source2 sentence1 sentence2 score".split(),
    "QQP": ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
    "MNLI": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2 label1 gold_label".split(),
    "QNLI": ["index", "question", "sentence", "label"],
    "RTE": ["index", "sentence1", "sentence2", "label"],
    "WNLI": ["index", "sentence1", "sentence2", "label"],
}
FIRST, SECOND = 'He said "no" and left.', "They're leaving; nobody spoke."
LABELS = {
    "CoLA": ["0", "1"],
    "STS-B": ["0.000", "5.000", "2.500", "3.8"],
    "MNLI": ["neutral", "entailment", "contradiction"],
    "QNLI": ["not_entailment", "entailment"],
    "RTE": ["not_entailment", "entailment"],
}


def row(title: str, number: int, label: str, is_dev: bool) -> list[str]:
    """One official row."""
    one, two = f"{FIRST} {number}", f"{SECOND} {number}"
    if title == "CoLA":
        return ["gj04", label, "*" if label == "0" else "", one]
    if title == "SST-2":
        return [one.lower() + " ", label]
    if title == "MRPC":
        return [label, "702876", "702977", one, two]
    if title == "STS-B":
        return [str(number), "main-captions", "MSRvid", "2012test", "0001", "none", "none", one, two, label]
    if title == "QQP":
        return [str(number), "213221", "213222", one, two, label]
    if title == "MNLI":
        marks = [label] * (5 if is_dev else 1)
        return [str(number), "31193", "31193n", "government", "( a )", "( b )", "(A)", "(B)", one, two, *marks, label]
    return [str(number), one, two, label]


def header(title: str, is_dev: bool) -> list[str] | None:
    """MNLI's dev files show the labels of all five annotators."""
    columns = HEADERS[title]
    if title == "MNLI" and is_dev:
        columns = [*columns[:-2], *(f"label{i}" for i in range(1, 6)), "gold_label"]
    return columns


def write_tsv(file: Path, rows: list[list[str]], end: str = "\n") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes("".join("\t".join(row) + end for row in rows).encode())
    return file


def write_glue(folder: Path, num_train: int = 8, num_dev: int = 6) -> Path:
    """All nine tasks."""
    for task in TASKS.values():
        labels = LABELS.get(task.title, ["0", "1"])
        for name, size in (("train.tsv", num_train), *((dev, num_dev) for dev in task.dev.values())):
            is_dev = name != "train.tsv"
            rows = [row(task.title, i, labels[i % len(labels)], is_dev) for i in range(size)]
            first = header(task.title, is_dev)
            write_tsv(folder / task.title / name, [first, *rows] if first else rows)
    return folder


def write_checkpoint(folder: Path, tokenizer, seed: int = 0) -> Path:
    """A random BERT: one layer, 2 heads of 8, 32 positions, with the real vocabulary."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
