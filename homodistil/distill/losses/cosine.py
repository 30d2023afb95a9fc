"""DistilBERT's third term: 1 - cosine of the last hidden states (arXiv 1910.01108, section 2; loss.cosine).

Their student is as wide as the teacher. A narrower one goes through a projection first, which is learned with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from homodistil.distill.layer_map import LayerMap
from homodistil.distill.losses.projection import StudentProjection, one_product
from homodistil.distill.losses.term import BatchSizes, Step, Term
from homodistil.models.activations import LayerActivations

_FP32_BYTES, _INT64_BYTES = 4, 8


class Cosine(Term):
    """The distance of the last layer's outputs, mean over valid tokens."""

    names = ("cosine",)
    needs = frozenset({"hidden"})
    module_prefix = ""

    def on_last_layer(self, student: LayerActivations, teacher: LayerActivations, step: Step) -> Tensor:
        projects = self.module_name("last") in step.student.projections
        compare = self.module(step, "last") if projects else cosine_distance
        return compare(student.hidden, teacher.hidden, step.batch.attention_mask) / step.batch.counts.tokens

    def modules(self, layer_map: LayerMap, hidden_size: int) -> dict[str, nn.Module]:
        if layer_map.keeps_width:
            return {}
        learned = self.loss.projection_learned
        return {"last": CosineProjection(layer_map.hidden_size, hidden_size, learned, layer_map.is_origin)}

    def flops(self, sizes: BatchSizes) -> float:
        """W is always the student's; of equal widths it may not even be there."""
        if sizes.student["hidden"] == sizes.teacher["hidden"]:
            return 0
        return (2 + self.loss.projection_learned) * one_product(sizes)

    def saved_bytes(self, sizes: BatchSizes) -> float:
        """What enters W, the states behind it and the teacher's in fp32, their norms and the mask."""
        states = sizes.student["hidden"] * sizes.student_bytes + 2 * sizes.teacher["hidden"] * _FP32_BYTES
        return sizes.tokens * (states + 2 * _FP32_BYTES + _INT64_BYTES)


def cosine_distance(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """1 - cosine of each token's states, summed over valid tokens. Count: tokens.

    Args:
        student: (B, T, D). teacher: (B, T, D), any float dtype; no gradient.
        attention_mask: (B, T), 1 = token, 0 = padding, which contributes nothing.

    Returns:
        fp32 0-dim (float64 for float64 students).
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    distances = 1 - functional.cosine_similarity(student.to(dtype), teacher.detach().to(dtype), dim=-1)
    return (distances * attention_mask).sum()


class CosineProjection(StudentProjection):
    """W, and the distance behind it: under ZeRO-3 its weight exists only inside this call."""

    def forward(self, student: Tensor, teacher: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """`cosine_distance` of (B, T, Ds) and (B, T, Dt). No teacher: nothing but its place in the order of calls."""
        if teacher is None:
            return None
        return cosine_distance(functional.linear(student, self.weight), teacher, attention_mask)
