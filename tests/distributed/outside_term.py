"""A loss term as an outsider writes it: which tokens of a sequence resemble which, in every layer."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

from homodistil.distill.losses.term import BatchSizes, Step, Term, register
from homodistil.models.activations import LayerActivations


@register
class Similarity(Term):
    """Squared difference of the cosines between tokens; of any two hidden sizes."""

    names = ("similarity",)
    needs = frozenset({"hidden"})

    def on_layer(self, i: int, student: LayerActivations, teacher: LayerActivations, step: Step) -> Tensor:
        mask = step.batch.attention_mask[:, :, None].float()
        ours, theirs = (normalize(states.hidden.float(), dim=-1) * mask for states in (student, teacher))
        difference = ours @ ours.transpose(1, 2) - theirs @ theirs.transpose(1, 2)
        return difference.square().sum() / step.batch.counts.pairs

    def flops(self, sizes: BatchSizes) -> float:
        dims = 3 * sizes.student["hidden"] + sizes.teacher["hidden"]
        return 2 * sizes.tokens * sizes.seq_len * dims * len(sizes.student_layers)

    def saved_bytes(self, sizes: BatchSizes) -> float:
        return 4 * sizes.tokens * (2 * sizes.student["hidden"] + sizes.seq_len) * len(sizes.student_layers)
