"""One fine-tuning run: one checkpoint, one task, one setting, one seed, by Hugging Face's Trainer. Leaves no files."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from homodistil.errors import UserError
from homodistil.evaluation.glue.checkpoint import load_classifier, load_tokenizer
from homodistil.evaluation.glue.metrics import compute
from homodistil.evaluation.glue.sources import TaskData
from homodistil.evaluation.glue.tables import Split
from homodistil.evaluation.glue.tasks import Task, find_task, metric_name

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ONLY_DEV = "dev"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one run is trained: AdamW, linear warm-up and decay."""

    lr: float = 5e-5
    batch_size: int = 32
    epochs: int = 3
    seed: int = 0
    max_length: int = 128
    """Tokens a pair; the longer sentence is cut first."""
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    patience: int | None = None
    """Stop after so many epochs without a better dev score, and report the best epoch. None: train all epochs and
    report the last one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights and optimizer stay fp32."""


class Encoded(NamedTuple):
    """The examples of a task as model inputs: dicts of input_ids, attention_mask, ..., labels."""

    train: list[dict[str, Any]]
    dev: Mapping[str, list[dict[str, Any]]]
    tokenizer: PreTrainedTokenizerBase


def fine_tune(checkpoint: str | Path, task: Task | str, data: TaskData, settings: Settings) -> dict[str, float]:
    """Fine-tune and evaluate on dev. Sets the random state of torch, numpy and Python.

    Args:
        checkpoint: folder or hub name of any Hugging Face encoder, such as our export.
        task: or its name.
        data: see `sources.load_task`.

    Returns:
        The task's metrics (fractions; `Task.result_names`), `score` (their mean on the first dev set), `epoch` (which
        the metrics are of), `steps` (done in all), `seconds` (training and evaluation), `parameters` (with the head).

    Raises:
        UserError: the checkpoint cannot be loaded, or `max_length` is beyond its positions.
    """
    task = find_task(task) if isinstance(task, str) else task
    return train(checkpoint, task, encode(checkpoint, task, data, settings.max_length), settings)


def encode(checkpoint: str | Path, task: Task, data: TaskData, max_length: int) -> Encoded:
    """Tokenised once for all runs of a checkpoint on a task. Similarities get mean 0 and variance 1 over train.

    Raises:
        UserError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(str(checkpoint), max_length)
    if task.is_regression:
        data = _standardised(data)
    dev = {key or _ONLY_DEV: _encode(split, tokenizer, max_length) for key, split in data.dev.items()}
    return Encoded(_encode(data.train, tokenizer, max_length), dev, tokenizer)


def train(checkpoint: str | Path, task: Task, data: Encoded, settings: Settings) -> dict[str, float]:
    """As `fine_tune`, on examples that are encoded already."""
    start = time.perf_counter()
    with alone(), quiet(), tempfile.TemporaryDirectory() as folder:
        set_seed(settings.seed)
        model = load_classifier(str(checkpoint), task)
        stopper = [] if settings.patience is None else [EarlyStoppingCallback(settings.patience)]
        trainer = Trainer(
            model=model,
            args=_arguments(folder, data, settings),
            train_dataset=data.train,
            eval_dataset=dict(data.dev),
            data_collator=DataCollatorWithPadding(data.tokenizer),
            compute_metrics=lambda prediction: compute(task, prediction.predictions, prediction.label_ids),
            callbacks=stopper,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = trainer.state.log_history if stopper else [trainer.evaluate() | {"epoch": trainer.state.epoch}]
        best = _best(task, history)
        num_parameters = sum(p.numel() for p in model.parameters())
    took = {"steps": trainer.state.global_step, "seconds": time.perf_counter() - start}
    return best | took | {"parameters": num_parameters}


def _arguments(folder: str, data: Encoded, settings: Settings) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=max(64, settings.batch_size),
        learning_rate=settings.lr,
        num_train_epochs=settings.epochs,
        warmup_steps=settings.warmup_fraction,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        use_cpu=on_cpu(settings.device),
        bf16=settings.precision == "bf16",
        eval_strategy="no" if settings.patience is None else "epoch",
        metric_for_best_model=f"eval_{next(iter(data.dev))}_score",
        greater_is_better=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        # Batches of like lengths: padding costs as much as text.
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu(settings.device),
    )
    # Trainer would spread every batch over all GPUs it sees, and make it that much larger.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def on_cpu(device: str) -> bool:
    """Whether `Settings.device` means the CPU here. Raises `UserError` for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: found cuda, but torch sees no GPU here; allowed: auto, cpu; or install a GPU build")
    return device == "cpu" or not torch.cuda.is_available()


def _standardised(data: TaskData) -> TaskData:
    # A fresh head gives about 0. AdamW moves its bias by at most lr a step: on the way to the mean of 2.7 a narrow
    # model's few other weights are bent instead. Correlations do not see the scale.
    mean, deviation = statistics.fmean(data.train.labels), statistics.pstdev(data.train.labels) or 1.0

    def change(split: Split) -> Split:
        return split._replace(labels=[(label - mean) / deviation for label in split.labels])

    return TaskData(change(data.train), {key: change(split) for key, split in data.dev.items()})


def _encode(split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    columns = [list(column) for column in zip(*split.texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    rows = zip(*encoded.values(), split.labels, strict=True)
    return [dict(zip((*encoded, "labels"), row, strict=True)) for row in rows]


def _best(task: Task, history: list[dict[str, float]]) -> dict[str, float]:
    """The metrics of the epoch with the best score on the first dev set. Trainer logs each dev set on its own."""
    epochs: dict[float, dict[str, float]] = {}
    for entry in history:
        epochs.setdefault(entry["epoch"], {}).update(entry)
    first = next(iter(task.dev)) or _ONLY_DEV
    key = f"eval_{first}_score"
    best = max((entry for entry in epochs.values() if key in entry), key=lambda entry: entry[key])
    values = {
        metric_name(metric, name): best[f"eval_{name or _ONLY_DEV}_{metric}"]
        for name in task.dev
        for metric in task.metrics
    }
    return values | {"score": best[key], "epoch": best["epoch"]}


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hide the process group of a surrounding job: Trainer would join it."""
    hidden = {name: os.environ.pop(name) for name in _RANK_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's remarks on how it is used."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
