"""The student of a run on its way out: stock model, what is known about it, checkpoint with model card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from homodistil.config.schema import RunConfig
from homodistil.distill.losses.pooled import PROJECTION, shares_space
from homodistil.distill.student import Student
from homodistil.distill.teacher import load_config
from homodistil.distributed import ranks
from homodistil.engine.engine import TrainingEngine
from homodistil.export.cross_encoder_folder import copy_cross_encoder_files
from homodistil.export.inference_speed import inference_speed
from homodistil.export.model_card import describe_widths
from homodistil.export.sentence_folder import write_sentence_folder
from homodistil.export.stock_model import save_checkpoint, stock_model
from homodistil.models.axes import Widths
from homodistil.models.sentence_head import load_sentence_head
from homodistil.resize import master_weights
from homodistil.training.inputs import RunInputs
from homodistil.training.run_card import run_card


class Exporter:
    """Exports the student of a run as a stock checkpoint with a model card.

    Args:
        student: at its widths of the moment whenever something is exported.
        command: the command line of the run, for the card.
    """

    def __init__(
        self, config: RunConfig, run_inputs: RunInputs, student: Student, teacher_widths: Widths, command: str
    ) -> None:
        self.config, self.run_inputs, self.student = config, run_inputs, student
        self.teacher_widths, self.command = teacher_widths, command

    def export(
        self, engine: TrainingEngine, folder: Path, measured: dict, with_speed: bool = False
    ) -> dict[str, float]:
        """Write the engine's student into `folder`. Every rank calls it.

        Args:
            measured: for the model card; "name" is left out.
            with_speed: also time the exported model on rank 0's device, for the card and the caller.

        Returns:
            What has been timed (`inference_speed`), on every rank.
        """
        self.run_inputs.require_intact()
        weights = master_weights(engine.deepspeed)
        return ranks.on_rank_zero(lambda: self._write(weights, folder, measured, with_speed))

    def _write(self, weights: dict[str, Tensor], folder: Path, measured: dict, with_speed: bool) -> dict[str, float]:
        device = self.run_inputs.device
        with _own_random_state(device):  # a fresh model draws its weights first
            model = stock_model(weights, self.student, load_config(self.run_inputs.teacher))
            speed = inference_speed(model, self.config.data.seq_len, device) if with_speed else {}
        card = run_card(
            self.config, self.student.family, self._facts(folder, measured | speed), self.command, ranks.world_size()
        )
        save_checkpoint(model.cpu(), self.run_inputs.tokenizer, card, folder, self._sentence_files(weights))
        return speed

    def _sentence_files(self, weights: dict[str, Tensor]) -> Callable[[Path], None]:
        """What writes the files of sentence-transformers beside the Transformer of an embedder or cross-encoder."""
        modules, teacher = self.run_inputs.sentence_modules, self.run_inputs.teacher
        if self.run_inputs.head == "classifier":
            return lambda folder: copy_cross_encoder_files(teacher, folder)
        if modules is None:
            return lambda folder: None
        head, projection = load_sentence_head(modules, "teacher.name"), weights.get(f"projections.{PROJECTION}.weight")
        sizes = self.student.widths["hidden"], projection, shares_space(self.student)
        return lambda folder: write_sentence_folder(folder, head, *sizes)

    def teacher_speed(self) -> dict[str, float]:
        """Speed of a stock model of the teacher's shape (rank 0 alone): its weights do not matter for it."""
        config, device = load_config(self.run_inputs.teacher), self.run_inputs.device
        with _own_random_state(device):
            family = self.student.family
            model = family.empty(config, self.run_inputs.head).eval()
            model = family.backbone(model) if self.run_inputs.head == "none" else model
            return inference_speed(model, self.config.data.seq_len, device)

    def _facts(self, folder: Path, measured: dict) -> dict[str, object]:
        facts = {"parameters": self.student.num_parameters(), "hidden_size": self.student.widths["hidden"]}
        facts |= {"widths": describe_widths(self.teacher_widths, self.student.widths)}
        if self.run_inputs.vocabulary is not None:
            facts["vocabulary"] = str(self.run_inputs.vocabulary)
        facts |= {"folder": folder.name, "data": self.run_inputs.corpus.description}
        return facts | {name: value for name, value in measured.items() if name not in ("name", *facts)}


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """A run continues as if nothing had been drawn inside: one that does not export here again draws the same."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
