"""One fine-tuning run (checkpoint, task, setting, seed) with Hugging Face's Trainer. Writes no files."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from homodistil.evaluation.glue.checkpoint import load_classifier, load_tokenizer
from homodistil.evaluation.glue.metrics import compute
from homodistil.evaluation.glue.sources import TaskData
from homodistil.evaluation.glue.tasks import Task, find_task, metric_name
from homodistil.evaluation.glue.tsv import Split
from homodistil.evaluation.trainer_arguments import Settings as TrainerSettings
from homodistil.evaluation.trainer_arguments import TellsProgress, alone, quiet, training_arguments

_ONLY_DEV = "dev"


@dataclass(frozen=True, kw_only=True)
class Settings(TrainerSettings):
    """Hyperparameters of a GLUE run. `max_length` is for both sentences; the longer one is truncated first."""

    patience: int | None = None
    """Epochs without a better dev score after which to stop; the best epoch is reported. None: train all epochs, and
    report the last one."""


class Encoded(NamedTuple):
    """The examples of a task as model inputs: dicts of input_ids, attention_mask, ..., labels."""

    train: list[dict[str, Any]]
    dev: Mapping[str, list[dict[str, Any]]]
    tokenizer: PreTrainedTokenizerBase


def fine_tune(checkpoint: str | Path, task: Task | str, data: TaskData, settings: Settings) -> dict[str, float]:
    """Fine-tune and evaluate on dev. Sets the random state of torch, numpy and Python.

    Args:
        checkpoint: folder or hub name of any Hugging Face encoder, such as an exported student.
        task: a task, or its name.
        data: from `sources.load_task`.

    Returns:
        The metrics of the task (fractions; `Task.result_names`), `score` (their mean on the first dev set), `epoch` (of
        these metrics), `steps` (all that were trained), `seconds` (training and evaluation), `parameters` (with head).

    Raises:
        UserError: the checkpoint cannot be loaded, or `max_length` is beyond its positions.
    """
    task = find_task(task) if isinstance(task, str) else task
    return train(checkpoint, task, encode(checkpoint, task, data, settings.max_length), settings)


def encode(checkpoint: str | Path, task: Task, data: TaskData, max_length: int) -> Encoded:
    """Tokenise the examples, once for all runs of a checkpoint on a task.

    Similarity labels are standardised to mean 0 and variance 1 over the training set.

    Raises:
        UserError: as in `load_tokenizer`.
    """
    tokenizer = load_tokenizer(str(checkpoint), max_length, len(task.texts))
    if task.is_regression:
        data = _standardised(data)
    dev = {key or _ONLY_DEV: _encode(split, tokenizer, max_length) for key, split in data.dev.items()}
    return Encoded(_encode(data.train, tokenizer, max_length), dev, tokenizer)


def train(checkpoint: str | Path, task: Task, data: Encoded, settings: Settings) -> dict[str, float]:
    """The same as `fine_tune`, on examples from `encode`."""
    start = time.perf_counter()
    with alone(), quiet(), tempfile.TemporaryDirectory() as folder:
        set_seed(settings.seed)
        model = load_classifier(str(checkpoint), task)
        stopper = [] if settings.patience is None else [EarlyStoppingCallback(settings.patience)]
        trainer = Trainer(
            model=model,
            args=training_arguments(
                folder,
                settings,
                eval_strategy="no" if settings.patience is None else "epoch",
                metric_for_best_model=f"eval_{next(iter(data.dev))}_score",
                greater_is_better=True,
            ),
            train_dataset=data.train,
            eval_dataset=dict(data.dev),
            data_collator=DataCollatorWithPadding(data.tokenizer),
            compute_metrics=lambda prediction: compute(task, prediction.predictions, prediction.label_ids),
            callbacks=[*stopper, TellsProgress()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        history = trainer.state.log_history if stopper else [trainer.evaluate() | {"epoch": trainer.state.epoch}]
        best = _best(task, history)
        num_parameters = sum(p.numel() for p in model.parameters())
    took = {"steps": trainer.state.global_step, "seconds": time.perf_counter() - start}
    return best | took | {"parameters": num_parameters}


def _standardised(data: TaskData) -> TaskData:
    # The output of a new head is about 0. AdamW moves its bias by at most lr per step, so to reach the mean of 2.7 a
    # narrow model would change its few other weights instead. Correlations do not depend on the scale.
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
    """The metrics of the epoch with the best score on the first dev set. Trainer logs each dev set separately."""
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
