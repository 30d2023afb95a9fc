"""What every fine-tuning shares: arguments of Hugging Face's Trainer, and how it runs beside other jobs."""

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
    """How one run is trained: AdamW, linear warm-up and decay."""

    lr: float = 5e-5
    batch_size: int = 32
    epochs: int = 3
    seed: int = 0
    max_length: int = 128
    """Tokens of an example; what is beyond is cut."""
    warmup_fraction: float = 0.1
    weight_decay: float = 0.01
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights and optimizer stay fp32."""


def training_arguments(folder: str, settings: Settings, **more: Any) -> TrainingArguments:
    """One device, nothing written, nothing reported. `more`: of the task."""
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
        # Batches of like lengths: padding costs as much as text.
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu(settings.device),
        **more,
    )
    # Trainer would spread every batch over all GPUs it sees, and make it that much larger.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class TellsProgress(TrainerCallback):
    """Keeps `progress` informed of epoch, step and evaluated batches."""

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
    """Whether `Settings.device` means the CPU here. Raises `UserError` for a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: found cuda, but torch sees no GPU here; allowed: auto, cpu; or install a GPU build")
    return device == "cpu" or not torch.cuda.is_available()


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
