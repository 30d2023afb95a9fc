"""Settings of Hugging Face's Trainer that all fine-tuning shares, and its isolation from a surrounding job."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging

from homodistil.errors import UserError
from homodistil.evaluation import progress

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyperparameters of one fine-tuning run with AdamW, linear warm-up and linear decay."""

    lr: float = 5e-5
    batch_size: int = 32
    epochs: int = 3
    seed: int = 0
    max_length: int = 128
    """Tokens per example; longer examples are truncated."""
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 means autocast: weights and optimizer states stay fp32."""


def training_arguments(folder: str, settings: Settings, **more: Any) -> TrainingArguments:
    """Arguments for a Trainer on one device that saves and reports nothing.

    Args:
        folder: `output_dir`, in which nothing is written.
        more: further arguments that depend on the task.

    Raises:
        UserError: the GPU that `settings.device` asks for does not exist.
    """
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
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        # Examples of similar length form a batch, because padding costs as much time as text.
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu(settings.device),
        **more,
    )
    # Otherwise Trainer would use all visible GPUs, and multiply the batch size by their number.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class TellsProgress(TrainerCallback):
    """Passes the current epoch, step and evaluation batch to `progress`."""

    _num_batches = 0

    def on_step_end(self, args, state, control, **_others) -> None:
        epoch = math.ceil(state.epoch or 0)
        progress.now(f"epoch {epoch} of {args.num_train_epochs:g}, step {state.global_step} of {state.max_steps}")
        self._num_batches = 0

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **_others) -> None:
        self._num_batches += 1
        total = f" of {len(eval_dataloader)}" if eval_dataloader is not None else ""
        progress.now(f"after step {state.global_step}: evaluating, batch {self._num_batches}{total}")

    def on_evaluate(self, args, state, control, **_others) -> None:
        self._num_batches = 0

    def on_predict(self, args, state, control, *_metrics, **_others) -> None:
        self._num_batches = 0


def on_cpu(device: str) -> bool:
    """Whether `Settings.device` selects the CPU on this machine. Raises `UserError` for "cuda" without a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: found cuda, but torch sees no GPU here; allowed: auto, cpu; or install a GPU build")
    return device == "cpu" or not torch.cuda.is_available()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Hide the rank variables of a surrounding job inside this context; Trainer would join its process group."""
    hidden = {name: os.environ.pop(name) for name in _RANK_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of transformers inside this context."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
