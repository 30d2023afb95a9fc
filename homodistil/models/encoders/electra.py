"""ELECTRA's generator (Clark et al. 2020): Hugging Face's `ElectraForMaskedLM`.

BERT's layers. What differs: embeddings may be narrower or wider than the residual stream. Then a linear leads from one
to the other, the head goes back to the embeddings' width, and that width stays as it is. Where both are equal the stock
class has no such linear: the embeddings are on the residual stream, as in BERT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig

from homodistil.models.axes import AxisUse, Widths, embedding_width, linear_uses
from homodistil.models.encoders.block_names import ROBERTA_CLASSIFIER, HeadNames
from homodistil.models.encoders.post_norm import PostNormEncoder

_PROJECTION = "embeddings_project"


@dataclass(frozen=True, kw_only=True)
class FactorisedEncoder(PostNormEncoder):
    """A family whose embeddings may have a width of their own."""

    refit_condition = "where `embedding_size` is `hidden_size`"

    def embeddings(self, model: nn.Module) -> nn.Module:
        backbone = self.backbone(model)
        return getattr(backbone, _PROJECTION, backbone.embeddings)

    def embedding_entry(self, model: nn.Module) -> nn.Module:
        return self.backbone(model).embeddings

    def embed(self, model: nn.Module, input_ids: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        embedded = self.embedding_entry(model)(*args, **kwargs)
        return self.embeddings(model)(embedded) if self._has_projection(model) else embedded

    def _has_projection(self, model: nn.Module) -> bool:
        return self.embeddings(model) is not self.embedding_entry(model)

    def _shared_widths(self, model: nn.Module) -> dict[str, int]:
        if not self._has_projection(model):
            return super()._shared_widths(model)
        projection = self.embeddings(model)
        return {"hidden": projection.out_features, "embedding": projection.in_features}

    def _shared_uses(self, model: nn.Module, embedding: str = "hidden") -> list[AxisUse]:
        if not self._has_projection(model):
            return super()._shared_uses(model)
        uses = super()._shared_uses(model, "embedding")
        return uses + linear_uses(f"{self.backbone_name}.{_PROJECTION}", out=("hidden",), into=("embedding",))

    def layer_norms(self, model: nn.Module) -> dict[str, nn.LayerNorm]:
        norms, is_apart = super().layer_norms(model), self._has_projection(model)
        return {name: norm for name, norm in norms.items() if not (is_apart and name.startswith("embeddings."))}

    def refresh(self, model: nn.Module, widths: Widths) -> None:
        super().refresh(model, widths)
        model.config.embedding_size = embedding_width(widths)

    def student_config(self, teacher: PretrainedConfig, widths: Widths) -> PretrainedConfig:
        config = super().student_config(teacher, widths)
        config.embedding_size = embedding_width(widths)
        return config

    def stock_head_dim(self, widths: Widths) -> int | None:
        """As in BERT; and a linear behind the embeddings exists only where its sides differ."""
        return None if widths["hidden"] == widths.get("embedding") else super().stock_head_dim(widths)

    def refit_obstacle(self, config: PretrainedConfig) -> str | None:
        if config.embedding_size == config.hidden_size:
            return None
        return f"whose embeddings ({config.embedding_size}) are not as wide as its layers ({config.hidden_size})"


ELECTRA = FactorisedEncoder(
    name="electra",
    model_types=("electra",),
    backbone_name="electra",
    backbone_parts=("embeddings.", f"{_PROJECTION}.", "encoder."),
    head_names=HeadNames(
        head=None,
        linear="generator_predictions.dense",
        norm="generator_predictions.LayerNorm",
        decoder="generator_lm_head",
        transform="generator_predictions",
        activation="generator_predictions.activation",
    ),
    classifier_names=ROBERTA_CLASSIFIER._replace(activation="classifier.activation"),
    head_prefix="generator_",
    unused=(
        "electra.embeddings.position_ids",
        "electra.embeddings.token_type_ids",
        "discriminator_predictions.",
    ),
)
