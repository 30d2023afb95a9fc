"""OLMo 2 (arXiv 2501.00656): Llama's block with norms behind the blocks, and norms over all queries and all keys."""

from __future__ import annotations

from dataclasses import dataclass

from homodistil.models.axes import AxisUse
from homodistil.models.decoders.pre_norm import LLAMA_LIKE, PreNormDecoder


@dataclass(frozen=True, kw_only=True)
class Olmo2Decoder(PreNormDecoder):
    """Heads that go take their part of the norms of queries and keys with them."""

    def _layer_uses(self, i: int) -> list[AxisUse]:
        uses = super()._layer_uses(i)
        axes = {use.parameter: use.axes for use in uses if use.dim == 0}
        attention = f"{self.backbone_name}.{self.layers_name}.{i}.{self.attention_name}"
        return uses + [AxisUse(f"{attention}.{x}_norm.weight", 0, axes[f"{attention}.{x}_proj.weight"]) for x in "qk"]


OLMO2 = Olmo2Decoder(
    name="olmo2",
    model_types=("olmo2",),
    stream_norms=(),
    output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    architecture=LLAMA_LIKE._replace(scales_in_fp32=True, has_head_norms=True),
)
