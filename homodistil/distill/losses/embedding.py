"""The embedding term: distance of what enters layer 0 of student and teacher, through W (loss.embedding)."""

from __future__ import annotations

from torch import Tensor, nn

from homodistil.distill.layer_map import LayerMap
from homodistil.distill.losses.projection import gradient_bytes, make_projection, projection_flops
from homodistil.distill.losses.term import BatchSizes, Step, Term


class Embedding(Term):
    """MSE(E_s W, E_t), mean over dims and valid tokens (HomoDistil's L_emb), by loss.hidden_space.

    Of all tokens, whatever loss.skip_first_tokens is: a token becomes a sink in the layers.
    """

    names = ("embedding",)
    needs = frozenset({"embedding"})
    module_prefix = ""

    def on_embedding(self, student: Tensor, teacher: Tensor, step: Step) -> Tensor:
        projection, batch = self.module(step, "embedding"), step.batch
        return projection(student, teacher, batch.attention_mask) / batch.counts.tokens

    def modules(self, layer_map: LayerMap, hidden_size: int) -> dict[str, nn.Module]:
        return {"embedding": make_projection(self.loss, layer_map, hidden_size)}

    def flops(self, sizes: BatchSizes) -> float:
        return projection_flops(self.loss, sizes)

    def saved_bytes(self, sizes: BatchSizes) -> float:
        return gradient_bytes(sizes)
