"""MiniLMv2's term: relations of queries, keys and values of one layer each (arXiv 2012.15828; loss.relations).

The dims of all heads side by side are split anew into relation heads, so that student and teacher need neither equally
many heads nor equally wide ones. A relation of A (queries, keys or values) is softmax(A A^T / sqrt(dims of a relation
head)): what an attention map would be if A were queries and keys at once, and so it is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from homodistil.config.schema import LossConfig
from homodistil.distill.losses.term import BatchSizes, Step, Term
from homodistil.errors import UserError
from homodistil.kernels.attention_map import attention_map_loss
from homodistil.models.activations import LayerActivations
from homodistil.models.axes import Widths, layer_widths, num_layers


class Relations(Term):
    """KL(teacher || student) of the student's last layer and of the teacher's loss.relation_layer, mean over tokens."""

    names = ("relations",)
    needs = frozenset({"queries_keys", "values"})

    def on_last_layer(self, student: LayerActivations, teacher: LayerActivations, step: Step) -> Tensor:
        num_heads = num_relation_heads(self.loss, step.student.layer_map.num_heads)
        layers = step.student.layer_map.layers
        kind = step.mask_kind(len(layers) - 1, relation_layer(self.loss, layers[-1] + 1))
        options = {"implementation": self.loss.kernels, "causal": kind.causal, "window": kind.window}
        loss = relation_loss(student, teacher, step.batch.attention_mask, num_heads, **options)
        return loss / step.batch.counts.tokens

    def check(self, teacher: Widths, student: Sequence[Widths]) -> None:
        """Relation layer and heads have to fit."""
        relation_layer(self.loss, num_layers(teacher))
        num_heads = num_relation_heads(self.loss, layer_widths(teacher, 0).num_heads)
        last, current = num_layers(student[0]) - 1, {}
        for widths in (teacher, *student):
            current |= widths
            layer = layer_widths(current, last)
            for dims in (
                layer.num_heads * layer.qk_dim,
                layer.num_kv_heads * layer.qk_dim,
                layer.num_kv_heads * layer.vo_dim,
            ):
                _check_divides(dims, num_heads)

    def flops(self, sizes: BatchSizes) -> float:
        """A A^T of queries, keys and values of one layer: of the student (forward and backward) and of the teacher."""
        student, teacher = (dims_of_last_layer(widths) for widths in (sizes.student, sizes.teacher))
        return 2 * sizes.tokens * sizes.seq_len * (3 * student + teacher)

    def saved_bytes(self, sizes: BatchSizes) -> float:
        """Gradients of queries, keys and values, twice, as either factor of A A^T."""
        return sizes.tokens * 2 * dims_of_last_layer(sizes.student) * sizes.student_bytes


def dims_of_last_layer(widths: Widths) -> int:
    """Dims of queries, keys and values of all heads of the last layer together."""
    layer = layer_widths(widths, num_layers(widths) - 1)
    return layer.num_heads * layer.qk_dim + layer.num_kv_heads * (layer.qk_dim + layer.vo_dim)


def relation_loss(
    student: LayerActivations,
    teacher: LayerActivations,
    attention_mask: Tensor,
    num_heads: int,
    implementation: str = "auto",
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """KL(teacher || student) of Q-Q, K-K and V-V, summed over the three and over valid query rows, mean over relation
    heads. Count: tokens.

    Args:
        student, teacher: with values; (B, N, T, H) each, of N and H of their own.
        attention_mask: (B, T), 1 = token, 0 = padding.
        num_heads: relation heads.
        implementation, causal, window: of the kernel, see `attention_map_loss`.

    Returns:
        fp32 0-dim.

    Raises:
        UserError: the dims of all heads cannot be split into so many.
    """
    total = 0.0
    for part in ("queries", "keys", "values"):
        ours, theirs = (regrouped(getattr(tap, part), num_heads) for tap in (student, teacher))
        scales = (heads.shape[-1] ** -0.5 for heads in (ours, theirs))
        total = total + attention_map_loss(
            ours,
            ours,
            theirs,
            theirs,
            *scales,
            attention_mask,
            target="probabilities_kl",
            implementation=implementation,
            causal=causal,
            window=window,
        )
    return total


def regrouped(heads: Tensor, num_heads: int) -> Tensor:
    """(B, N, T, H) -> (B, num_heads, T, N x H / num_heads), in the order of dims; a view where strides allow."""
    dims = heads.shape[1] * heads.shape[3]
    _check_divides(dims, num_heads)
    return heads.transpose(1, 2).flatten(2).unflatten(2, (num_heads, dims // num_heads)).transpose(1, 2)


def num_relation_heads(loss: LossConfig, num_teacher_heads: int) -> int:
    return loss.relation_heads or num_teacher_heads


def relation_layer(loss: LossConfig, count: int) -> int:
    """The layer of a teacher of `count` layers, counted from 0. Raises `UserError` when there is none."""
    if not -count <= loss.relation_layer < count:
        raise UserError(
            f"loss.relation_layer: found {loss.relation_layer}, the teacher has {count} layers; allowed "
            f"{-count} .. {count - 1}"
        )
    return loss.relation_layer % count


def _check_divides(dims: int, num_heads: int) -> None:
    if dims % num_heads:
        raise UserError(
            f"loss.relation_heads: {num_heads} relation heads cannot share the {dims} dims of all heads of a layer "
            f"(hidden size) equally; choose a divisor of that number in teacher, student and all widths between "
            f"(pruning.head_dim_multiple), or another student.num_attention_heads"
        )
