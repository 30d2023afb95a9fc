"""A teacher that has spoken already: its vectors or scores of whole texts come with the batch, read from files.

Nothing of it is loaded but its shape, and the modules behind the backbone of a sentence embedder, which the student's
vectors pass as well. `training/stored_outputs.py` makes the files; `compute_outputs` is what they hold.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from homodistil.data.batch import Batch
from homodistil.data.rows import Rows
from homodistil.data.task import BatchMaker
from homodistil.distill.teacher import Teacher
from homodistil.distill.teacher_outputs import TeacherOutputs
from homodistil.models import family_of
from homodistil.models.activations import Activations, LayerActivations
from homodistil.models.sentence_head import SentenceHead


class StoredTeacher(Teacher):
    """Gives each batch what it brings along (`Batch.teacher_outputs`).

    Args:
        shape: the teacher's model without weights, on the meta device.
        device: of batches.
        sentence_head: of a sentence embedder.
    """

    def __init__(self, shape: nn.Module, device: torch.device, sentence_head: SentenceHead | None = None) -> None:
        super().__init__(shape, runtime=_NoPass(shape), sentence_head=sentence_head and sentence_head.to(device))
        self._device = device

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def shows_layers(self) -> bool:
        return False

    def forward(self, batch: Batch) -> StoredOutputs:
        outputs = StoredOutputs(self.model, self.family, batch, self.scale)
        outputs.sentence_head = self.sentence_head
        return outputs

    def for_several(self, batch: Batch, num_students: int) -> list[TeacherOutputs]:
        return [self(batch) for _ in range(num_students)]

    def embed(self, batch: Batch) -> Tensor:
        return batch.teacher_outputs

    def scores(self, batch: Batch) -> Tensor:
        return batch.teacher_outputs


class StoredOutputs(TeacherOutputs):
    """For terms that take nothing else (`Term.takes_stored`)."""

    def take_embedding(self) -> Tensor:
        raise _never()

    def take_layer(self, _i: int) -> LayerActivations:
        return LayerActivations(None, None, None)

    def take_values(self) -> LayerActivations:
        raise _never()

    def _last(self, is_done: bool) -> Tensor:
        raise _never()

    def vectors(self) -> Tensor:
        return self.batch.teacher_outputs

    def scores(self) -> Tensor:
        return self.batch.teacher_outputs


class _NoPass:
    """A runtime of a model that has no weights."""

    def __init__(self, shape: nn.Module) -> None:
        self.scale = family_of(shape.config.model_type).softmax_scale(shape)

    def __call__(self, *_args: Tensor | None) -> Activations:
        raise _never()


def _never() -> RuntimeError:
    return RuntimeError("teacher.outputs=stored: something asks for what only a running teacher has")


@torch.no_grad()
def compute_outputs(
    teacher: Teacher, to_batch: BatchMaker, blocks: Rows, samples: np.ndarray, batch_size: int
) -> np.ndarray:
    """What a running teacher says of these texts: its vectors before they are normalised, or the logits of its labels.

    Every pass has the shape that passes have in training, so that its kernels are those of training: the last batch is
    filled up with texts of before.

    Args:
        blocks: of a split, one text each.
        samples: numbers of the blocks, int64 (n,); at least one.
        batch_size: texts of a pass.

    Returns:
        (n, E) fp32.
    """
    rows = []
    for first in range(0, len(samples), batch_size):
        here = samples[first : first + batch_size]
        whole = np.resize(here, batch_size)
        batch = to_batch(blocks[whole], whole, np.zeros_like(whole)).to(teacher.device)
        outputs = teacher.scores(batch) if teacher.sentence_head is None else teacher.embed(batch)
        rows.append(outputs[: len(here)].float().cpu().numpy())
    return np.concatenate(rows)
