"""W between the residual streams of student and teacher, and the distance that it is there for: what the terms hidden
and embedding share.

A module whose call gives the loss: under ZeRO-3 its weight exists only inside that call.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from homodistil.config.schema import LossConfig
from homodistil.distill.layer_map import LayerMap
from homodistil.distill.losses.term import BatchSizes
from homodistil.kernels.hidden_mse import hidden_mse
from homodistil.kernels.normalised_hidden_mse import normalised_hidden_mse

_DISTANCES = {"raw": hidden_mse, "normalised": normalised_hidden_mse}
"""loss.hidden_space, once it is settled (settled.py) -> the distance."""


class Projection(nn.Linear):
    """W, at first the identity: every distillation term starts at exactly 0, and slicing W makes it a selection.

    Args:
        hidden_size: of the teacher, and at first of the student.
        config: `projection` says on which side W stands, `projection_learned` whether it is trained, `hidden_space`
            whether rows are normalised, behind W, before they are compared.
        own_size: hidden size of a student that was not cut out of the teacher: W then starts as nn.Linear does.
    """

    def __init__(self, hidden_size: int, config: LossConfig, own_size: int | None = None) -> None:
        sizes = (hidden_size if own_size is None else own_size, hidden_size)
        super().__init__(*(sizes if config.projection == "student" else reversed(sizes)), bias=False)
        if own_size is None:
            nn.init.eye_(self.weight)
        # torch keeps (out, in): a student-side W reads the shrinking width, a teacher-side W writes it.
        self.student_dim = 1 if config.projection == "student" else 0
        self.weight.requires_grad_(config.projection_learned)
        self._side = config.projection
        self._distance = _DISTANCES[config.hidden_space]
        self._selection = None if config.projection_learned else torch.arange(hidden_size)

    def forward(self, student: Tensor, teacher: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """Squared distance, mean over dims, summed over valid tokens (L_hidden and L_emb). Count: tokens.

        Args:
            student: (B, T, Ds). teacher: (B, T, Dt). attention_mask: (B, T), 1 = token, 0 = padding.
                No teacher: a call for the sake of its place in the order of calls, which gives nothing.
        """
        if teacher is None:
            return None
        if self._selection is None:
            return self._distance(student, teacher, attention_mask, self.weight, self._side)
        self._selection = self._selection.to(student.device)  # at the first call only
        return self._distance(student, teacher, attention_mask, None, self._side, self._selection)

    def after_resize(self, kept: Tensor) -> None:
        """`kept`: teacher index of each residual dim of the student now, int64 (Ds,)."""
        if self._side == "student":
            self.in_features = len(kept)
        else:
            self.out_features = len(kept)
        if self._selection is not None:  # a frozen W is nothing but the selection of these dims: gathering is cheaper
            self._selection = kept.to(self._selection.device)


class StudentProjection(nn.Linear):
    """W on the student's side alone, from its dims to the teacher's. What it is called with is up to a subclass.

    Args:
        hidden_size: of the teacher.
        student_size: of the student now.
        learned: whether W is trained.
        is_origin: the student has the teacher's dims, so W starts as the identity; otherwise as nn.Linear does.
    """

    student_dim = 1
    """Dimension of the weight that runs over the student's dims."""

    def __init__(self, hidden_size: int, student_size: int, learned: bool, is_origin: bool) -> None:
        super().__init__(student_size, hidden_size, bias=False)
        if is_origin:
            nn.init.eye_(self.weight)
        self.weight.requires_grad_(learned)

    def after_resize(self, kept: Tensor) -> None:
        """`kept`: teacher index of each residual dim of the student now, int64 (Ds,)."""
        self.in_features = len(kept)


def make_projection(loss: LossConfig, layer_map: LayerMap, hidden_size: int) -> Projection:
    """Between the teacher and a student that starts with `hidden_size`."""
    return Projection(layer_map.hidden_size, loss, None if layer_map.is_origin else hidden_size)


def projection_flops(loss: LossConfig, sizes: BatchSizes) -> float:
    """H_s W or H_t W once, forward and backward."""
    # The teacher's states need no gradient; a frozen W needs none either.
    passes = 1 + (loss.projection == "student") + loss.projection_learned
    return passes * one_product(sizes)


def one_product(sizes: BatchSizes) -> float:
    """FLOPs of (tokens, Ds) x (Ds, Dt)."""
    return 2 * sizes.tokens * sizes.student["hidden"] * sizes.teacher["hidden"]


def gradient_bytes(sizes: BatchSizes) -> float:
    """Bytes of the gradient of one comparison, which is made in the forward pass."""
    return sizes.tokens * sizes.student["hidden"] * sizes.student_bytes
