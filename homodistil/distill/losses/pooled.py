"""The terms on vectors of texts, those of a sentence embedder (loss.pooled_cosine, pooled_mse, pooled_similarity).

Both sides are pooled as the teacher's modules say (models/sentence_head.py), and pass its Dense layers. The student's
pooled states go through a W (teacher's hidden size x student's) first, so that its vectors are in the teacher's space;
only where similarities alone are compared, its vectors may have dims of their own. B texts of a micro-batch, E dims of
a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from homodistil.distill.layer_map import LayerMap
from homodistil.distill.losses.projection import StudentProjection
from homodistil.distill.losses.term import BatchSizes, Step, StudentSide, Term, Weighted
from homodistil.models.sentence_head import SentenceHead, pooled

_FP32_BYTES = 4


class Pooled(Term):
    """Distances between the vectors of student and teacher: one class, because all three need the same vectors."""

    names = ("pooled_cosine", "pooled_mse", "pooled_similarity")
    needs = frozenset({"last"})
    takes_stored = True
    module_prefix = "pooled_"

    @property
    def has_space_of_its_own(self) -> bool:
        """Whether the student's vectors need not be in the teacher's space."""
        return set(self.weights) == {"pooled_similarity"}

    def at_end(self, last: Tensor, step: Step) -> Weighted | None:
        if step.teacher is None:
            return None
        head, mask = step.teacher.sentence_head, step.batch.attention_mask
        ours = student_vectors(last, mask, step.student, head)
        theirs = step.teacher.vectors()
        return self.weighted({name: self._value(name, ours, theirs, head) for name in self.weights})

    def _value(self, name: str, ours: Tensor, theirs: Tensor, head: SentenceHead) -> Tensor:
        if name == "pooled_similarity":
            return similarity_divergence(ours, theirs, self.loss.similarity_temperature)
        if name == "pooled_cosine":
            return cosine_distance(ours, theirs)
        return functional.mse_loss(head.finish(ours), head.finish(theirs))

    def modules(self, layer_map: LayerMap, hidden_size: int) -> dict[str, nn.Module]:
        if layer_map.keeps_width or self.has_space_of_its_own:
            return {}
        learned = self.loss.projection_learned
        return {"end": PooledProjection(layer_map.hidden_size, hidden_size, learned, layer_map.is_origin)}

    def flops(self, sizes: BatchSizes) -> float:
        """W on one row a text, and the similarities of both models; those of the teacher's Dense are left out."""
        texts, student, teacher = sizes.num_sequences, sizes.student["hidden"], sizes.teacher["hidden"]
        projects = not self.has_space_of_its_own and student != teacher
        product = (2 + self.loss.projection_learned) * 2 * texts * student * teacher if projects else 0
        if "pooled_similarity" not in self.weights:
            return product
        return product + 2 * texts * texts * (3 * (student if self.has_space_of_its_own else teacher) + teacher)

    def saved_bytes(self, sizes: BatchSizes) -> float:
        """Pooled states, the vectors behind W and the teacher's, each as they are and normalised, in fp32."""
        vectors = sizes.student["hidden"] + 4 * sizes.teacher["hidden"]
        return sizes.num_sequences * vectors * _FP32_BYTES


PROJECTION = "pooled_end"
"""Name of W among the modules that a student learns."""


def shares_space(student: StudentSide) -> bool:
    """Whether the student's vectors are in the teacher's space, so that the teacher's Dense layers apply to them."""
    return PROJECTION in student.projections or student.layer_map.keeps_width


def student_vectors(last: Tensor, attention_mask: Tensor, student: StudentSide, head: SentenceHead) -> Tensor:
    """Vectors of a student before they are normalised, fp32 (B, E): pooled, through W and the teacher's Dense layers.

    Args:
        last: what its backbone puts out, (B, T, D).
        head: the teacher's.
    """
    vectors = pooled(last, attention_mask, head.pooling)
    if PROJECTION in student.projections:
        vectors = student.projections[PROJECTION](vectors, None, None)
    return head.transform(vectors) if shares_space(student) else vectors


class PooledProjection(StudentProjection):
    """W between the pooled states of the student and the teacher."""

    def forward(self, vectors: Tensor, _teacher: Tensor | None, _mask: Tensor | None) -> Tensor:
        """(..., Ds) -> (..., Dt) in the dtype of `vectors`. What other terms are called with is not used."""
        return functional.linear(vectors.to(self.weight.dtype), self.weight).to(vectors.dtype)


def cosine_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 - cosine of each text's vectors (B, E), mean over texts; 0-dim."""
    return (1 - functional.cosine_similarity(ours, theirs, dim=-1)).mean()


def similarity_divergence(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of each text's similarities to the others, mean over texts; 0-dim.

    Args:
        ours: (B, Es). theirs: (B, Et); no gradient.
        temperature: by which cosines are divided before the softmax.
    """
    if len(ours) < 2:  # a text alone has no others
        return ours.sum() * 0
    itself = torch.eye(len(ours), dtype=torch.bool, device=ours.device)
    logs = [
        (unit @ unit.T / temperature).masked_fill(itself, -torch.inf).log_softmax(-1).masked_fill(itself, 0)
        for unit in (functional.normalize(vectors, dim=-1) for vectors in (ours, theirs.detach()))
    ]
    return (logs[1].exp().masked_fill(itself, 0) * (logs[1] - logs[0])).sum(-1).mean()
