"""The hidden-state term: distance of layer outputs of student and teacher, through a W for each layer (loss.hidden)."""

from __future__ import annotations

from torch import Tensor, nn

from homodistil.distill.layer_map import LayerMap
from homodistil.distill.losses.projection import gradient_bytes, make_projection, projection_flops
from homodistil.distill.losses.term import BatchSizes, Step, Term
from homodistil.models.activations import LayerActivations


class Hidden(Term):
    """MSE(H_s W, H_t) of every layer, mean over dims and valid tokens (HomoDistil's L_hidden), by loss.hidden_space and
    behind loss.skip_first_tokens."""

    names = ("hidden",)
    needs = frozenset({"hidden"})
    module_prefix = ""

    def on_layer(self, i: int, student: LayerActivations, teacher: LayerActivations, step: Step) -> Tensor:
        projection, (mask, tokens) = self.module(step, f"layer_{i}"), step.batch.behind(self.loss.skip_first_tokens)
        return projection(student.hidden, teacher.hidden, mask) / tokens

    def modules(self, layer_map: LayerMap, hidden_size: int) -> dict[str, nn.Module]:
        return {f"layer_{i}": make_projection(self.loss, layer_map, hidden_size) for i in range(len(layer_map.layers))}

    def flops(self, sizes: BatchSizes) -> float:
        return len(sizes.student_layers) * projection_flops(self.loss, sizes)

    def saved_bytes(self, sizes: BatchSizes) -> float:
        return len(sizes.student_layers) * gradient_bytes(sizes)
