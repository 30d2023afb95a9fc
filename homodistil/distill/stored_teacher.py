"""A teacher that has run already: its pooled states of whole texts come with the batch, read from files.

Nothing of it is loaded but its shape and what stands behind the backbone: the Dense layers of a sentence embedder, the
head of a classifier. These run in each step as they would behind a running backbone, for their products are of a few
rows, whose last bits depend on how many these are; the backbone's do not. `training/stored_outputs.py` makes the files;
`compute_outputs` is what they hold.
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
from homodistil.models.classifier import Classifier
from homodistil.models.sentence_head import SentenceHead


class StoredTeacher(Teacher):
    """Makes vectors or scores of the pooled states that a batch brings along (`Batch.teacher_outputs`).

    Args:
        shape: the teacher's model without weights, on the meta device.
        device: of batches.
        sentence_head: of a sentence embedder.
        classifier: the head of a sequence classifier, with its weights on `device`.
    """

    shows_layers = False

    def __init__(
        self,
        shape: nn.Module,
        device: torch.device,
        sentence_head: SentenceHead | None = None,
        classifier: Classifier | None = None,
    ) -> None:
        super().__init__(shape, runtime=_NoPass(shape), sentence_head=sentence_head and sentence_head.to(device))
        self._device, self._classifier = device, classifier

    @property
    def device(self) -> torch.device:
        return self._device

    def forward(self, batch: Batch) -> StoredOutputs:
        return StoredOutputs(self, batch)

    def for_several(self, batch: Batch, num_students: int) -> list[TeacherOutputs]:
        return [self(batch) for _ in range(num_students)]

    def pooled_states(self, batch: Batch) -> Tensor:
        return batch.teacher_outputs

    @torch.no_grad()
    def scores(self, batch: Batch) -> Tensor:
        dtype = self._classifier.linear.weight.dtype
        return self._classifier.logits_of(self.pooled_states(batch).to(dtype))


class StoredOutputs(TeacherOutputs):
    """For terms that take nothing else (`Term.takes_stored`)."""

    def __init__(self, teacher: StoredTeacher, batch: Batch) -> None:
        super().__init__(teacher.model, teacher.family, batch, teacher.scale)
        self._teacher, self.sentence_head = teacher, teacher.sentence_head

    def take_embedding(self) -> Tensor:
        raise _never()

    def take_layer(self, _i: int) -> LayerActivations:
        return LayerActivations(None, None, None)

    def take_values(self) -> LayerActivations:
        raise _never()

    def _last(self, is_done: bool) -> Tensor:
        raise _never()

    def vectors(self) -> Tensor:
        return self._teacher.embed(self.batch)

    def scores(self) -> Tensor:
        return self._teacher.scores(self.batch)


class _NoPass:
    """A runtime of a model that has no weights."""

    def __init__(self, shape: nn.Module) -> None:
        self.scale = family_of(shape.config.model_type).softmax_scale(shape)

    def __call__(self, *_args: Tensor | None) -> Activations:
        raise _never()


def _never() -> RuntimeError:
    return RuntimeError("teacher.outputs=stored: something asks for what only a running teacher has")


def head_alone(model: nn.Module, device: torch.device) -> Classifier:
    """The head of a sequence classifier on `device`, frozen; the rest of `model` may go."""
    classifier = family_of(model.config.model_type).classifier(model.eval().requires_grad_(False))
    for part in (classifier.linear, classifier.decoder, *([classifier.norm.module] if classifier.norm else [])):
        part.to(device)
    return classifier


@torch.no_grad()
def compute_outputs(
    teacher: Teacher, to_batch: BatchMaker, blocks: Rows, samples: np.ndarray, batch_size: int
) -> np.ndarray:
    """A running teacher's pooled states of these texts.

    Every pass has the shape that passes have in training, so that its kernels are those of training: the last batch is
    filled up with texts of before.

    Args:
        blocks: of a split, one text each.
        samples: numbers of the blocks, int64 (n,); at least one.
        batch_size: texts of a pass.

    Returns:
        (n, D) fp32, exact.
    """
    rows = []
    for first in range(0, len(samples), batch_size):
        here = samples[first : first + batch_size]
        whole = np.resize(here, batch_size)
        batch = to_batch(blocks[whole], whole, np.zeros_like(whole)).to(teacher.device)
        rows.append(teacher.pooled_states(batch)[: len(here)].float().cpu().numpy())
    return np.concatenate(rows)
