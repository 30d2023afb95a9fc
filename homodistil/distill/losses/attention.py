"""The attention term: maps of every layer of student and teacher, head by head (loss.attention, attention_target)."""

from __future__ import annotations

from torch import Tensor

from homodistil.config.schema import LossConfig
from homodistil.distill.losses.term import BatchSizes, Step, Term
from homodistil.errors import UserError
from homodistil.kernels.attention_map import attention_map_loss
from homodistil.kernels.attention_map_inputs import SCORE_TARGETS
from homodistil.models.activations import LayerActivations
from homodistil.models.architecture import Architecture
from homodistil.models.axes import layer_widths


class Attention(Term):
    """Distance of q.k / sqrt(d), or of its softmax. A head is compared with the teacher's head that it came from, over
    the keys that both see."""

    names = ("attention",)
    needs = frozenset({"queries_keys"})

    def on_layer(self, i: int, student: LayerActivations, teacher: LayerActivations, step: Step) -> Tensor:
        kind, counts = step.mask_kind(i), step.batch.counts
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
            causal=kind.causal,
            window=kind.window,
        )
        if self.loss.attention_target == "probabilities_kl":
            return loss / counts.tokens
        return loss / (counts.pairs if kind.window is None else counts.window_pairs)

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


def check_target(loss: LossConfig, architecture: Architecture) -> None:
    """Raise `UserError` where the maps to compare do not follow from queries and keys: the term would compare others.

    Scores are q.k without the bias, with or without a constant for each query; probabilities are not those of q.k.
    Whatever the term's weight: the gap probe measures it in any case.
    """
    if architecture.has_position_bias and loss.attention_target not in SCORE_TARGETS:
        raise UserError(
            f"loss.attention_target: found {loss.attention_target}, allowed is {' or '.join(SCORE_TARGETS)} for this "
            f"teacher: its attention adds a bias by distance before the softmax, which the term does not see; set it "
            f"to scores"
        )
