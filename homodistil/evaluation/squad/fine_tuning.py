"""One fine-tuning run (checkpoint, SQuAD version, setting, seed) with Hugging Face's Trainer."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback

from homodistil.evaluation import progress
from homodistil.evaluation.glue.checkpoint import load_encoder, load_tokenizer
from homodistil.evaluation.squad.answers import answers
from homodistil.evaluation.squad.examples import SquadData
from homodistil.evaluation.squad.features import Windows, check_lengths, windows
from homodistil.evaluation.squad.metrics import score
from homodistil.evaluation.trainer_arguments import Settings as TrainerSettings
from homodistil.evaluation.trainer_arguments import TellsProgress, alone, quiet, training_arguments


@dataclass(frozen=True, kw_only=True)
class Settings(TrainerSettings):
    """Hyperparameters of training and of the choice of answers; lengths are in tokens."""

    epochs: int = 2
    max_length: int = 384
    """Length of a window: question, context and special tokens."""
    stride: int = 128
    """Tokens of context that consecutive windows share."""
    max_answer_tokens: int = 30
    null_threshold: float = 0.0
    """v2.0: the score of "no answer" must exceed that of the best answer by more than this."""


class Encoded(NamedTuple):
    """Training and dev questions as windows."""

    data: SquadData
    train: Windows
    dev: Windows
    tokenizer: PreTrainedTokenizerBase


def fine_tune(checkpoint: str | Path, data: SquadData, settings: Settings) -> tuple[dict[str, float], dict[str, str]]:
    """Fine-tune and evaluate on dev. Sets the random state of torch, numpy and Python.

    Args:
        checkpoint: folder or hub name of any Hugging Face encoder, such as an exported student.

    Returns:
        The metrics (fractions; see `metrics.score`) with `steps`, `seconds` (training and evaluation) and `parameters`
        (with head); and the answers on dev (id -> text), in the format of the official script.

    Raises:
        UserError: the checkpoint cannot be loaded, or the lengths do not fit it.
    """
    return train(checkpoint, encode(checkpoint, data, settings), settings)


def encode(checkpoint: str | Path, data: SquadData, settings: Settings) -> Encoded:
    """Tokenise the questions, once for all runs of a checkpoint.

    Training questions whose first answer is not at its position are left out. Raises `UserError`.
    """
    tokenizer = load_tokenizer(str(checkpoint), settings.max_length, num_texts=2)
    check_lengths(tokenizer, settings.max_length, settings.stride)
    lengths = (tokenizer, settings.max_length, settings.stride)
    trained = [example for example in data.train if not example.answers or example.answers[0].start >= 0]
    return Encoded(data, windows(trained, *lengths, True), windows(data.dev, *lengths, False), tokenizer)


def train(checkpoint: str | Path, encoded: Encoded, settings: Settings) -> tuple[dict[str, float], dict[str, str]]:
    """The same as `fine_tune`, on examples from `encode`."""
    start = time.perf_counter()
    with alone(), quiet(), tempfile.TemporaryDirectory() as folder:
        set_seed(settings.seed)
        trainer = Trainer(
            model=load_reader(str(checkpoint)),
            args=training_arguments(folder, settings),
            train_dataset=encoded.train.inputs,
            data_collator=DataCollatorWithPadding(encoded.tokenizer),
            callbacks=[TellsProgress()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        # Otherwise Trainer would reorder the windows as in training, without returning the order.
        trainer.args.train_sampling_strategy = "sequential"
        start_logits, end_logits = trainer.predict(encoded.dev.inputs).predictions
    progress.now("choosing answers out of all windows")
    threshold = settings.null_threshold if encoded.data.has_unanswerable else None
    dev = encoded.data.dev
    texts = answers(dev, encoded.dev, start_logits, end_logits, settings.max_answer_tokens, threshold)
    about = {"steps": trainer.state.global_step, "seconds": time.perf_counter() - start}
    about["parameters"] = sum(p.numel() for p in trainer.model.parameters())
    return score(dev, texts) | about, texts


def load_reader(folder: str) -> nn.Module:
    """The model in fp32, with a new span head drawn from torch's random state. Raises `UserError`."""
    return load_encoder(AutoModelForQuestionAnswering, folder)
