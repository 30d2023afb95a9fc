"""The attention term: maps of every layer of student and teacher, head by head (loss.attention, attention_target)."""

from __future__ import annotations

from torch import Tensor

from homodistil.distill.losses.term import BatchSizes, Step, Term
from homodistil.kernels.attention_map import attention_map_loss
from homodistil.models.activations import LayerActivations
from homodistil.models.axes import layer_widths


class Attention(Term):
    """Distance of q.k / sqrt(d), or of its softmax. A head is compared with the teacher's head that it came from."""

    names = ("attention",)
    needs = frozenset({"queries_keys"})

    def on_layer(self, i: int, student: LayerActivations, teacher: LayerActivations, step: Step) -> Tensor:
        counts = step.batch.counts
        loss = attention_map_loss(
            student.queries,
            student.keys,
            teacher.queries,
            teacher.keys,
            step.student.softmax_scale,
            step.teacher.scale,
            step.batch.attention_mask,
            heads=step.student.pruned_heads(i, student.queries.device),
            target=self.loss.attention_target,
            implementation=self.loss.kernels,
            causal=step.student.family.is_causal,
        )
        return loss / (counts.tokens if self.loss.attention_target == "probabilities_kl" else counts.pairs)

    def flops(self, sizes: BatchSizes) -> float:
        """q.k of the student (forward and backward) and of the teacher's heads that the student still has."""
        total = 0
        for i in sizes.student_layers:
            student, teacher = (layer_widths(widths, i) for widths in (sizes.student, sizes.teacher))
            per_head = 3 * student.qk_dim + teacher.qk_dim
            total += 2 * sizes.tokens * sizes.seq_len * student.num_heads * per_head
        return total

    def saved_bytes(self, sizes: BatchSizes) -> float:
        """The gradients of each layer's queries and keys, made in the forward; in fp32 where the model runs in fp16."""
        layers = (layer_widths(sizes.student, i) for i in sizes.student_layers)
        elements = (sizes.tokens * (layer.num_heads + layer.num_kv_heads) * layer.qk_dim for layer in layers)
        return sum(elements) * sizes.student_bytes
