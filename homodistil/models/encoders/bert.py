"""BERT's table of axes, and where its parts are. The model itself is Hugging Face's `BertForMaskedLM`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from homodistil.models.axes import AxisTable, AxisUse, Widths

MODEL_TYPE = "bert"

_BACKBONE, _HEAD = "bert.", "cls.predictions."
# Of BERT's own pretraining, and what older checkpoints kept beside the parameters.
_UNUSED = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
_OWN_PARTS = ("embeddings.", "encoder.", "pooler.")


def axis_table(model: BertForMaskedLM) -> AxisTable:
    """Axes and uses of `model` at its widths of today (tied parameters appear once, under their first name)."""
    config = model.config
    names = {name for name, _ in model.named_parameters()}
    uses = _shared_uses() + [u for i in range(config.num_hidden_layers) for u in _layer_uses(i)]
    return AxisTable(_widths(model), tuple(u for u in uses if u.parameter in names))


def _widths(model: BertForMaskedLM) -> dict[str, int]:
    # From what `refresh` keeps, not from the weights: under ZeRO-3 these are empty between uses.
    widths = {"hidden": embeddings(model).word_embeddings.embedding_dim}
    for i, layer in enumerate(layers(model)):
        attention = layer.attention.self
        widths[f"layer.{i}.ffn"] = layer.intermediate.dense.out_features
        widths[f"layer.{i}.heads"] = attention.num_attention_heads
        widths[f"layer.{i}.qk_dim"] = attention.attention_head_size
        widths[f"layer.{i}.vo_dim"] = attention.attention_head_size
    return widths


def _shared_uses() -> list[AxisUse]:
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    uses = [AxisUse(f"bert.embeddings.{table}.weight", 1, ("hidden",)) for table in tables]
    uses += _vector("bert.embeddings.LayerNorm")
    head = "cls.predictions.transform"
    uses += [AxisUse(f"{head}.dense.weight", dim, ("hidden",)) for dim in (0, 1)]
    uses += [AxisUse(f"{head}.dense.bias", 0, ("hidden",))]
    uses += _vector(f"{head}.LayerNorm")
    # Present only when the decoder is not tied to the word embeddings.
    return uses + [AxisUse("cls.predictions.decoder.weight", 1, ("hidden",))]


def _layer_uses(i: int) -> list[AxisUse]:
    layer = f"bert.encoder.layer.{i}"
    qk = (f"layer.{i}.heads", f"layer.{i}.qk_dim")
    vo = (f"layer.{i}.heads", f"layer.{i}.vo_dim")
    ffn = (f"layer.{i}.ffn",)
    uses = _linear(f"{layer}.attention.self.query", out=qk, into=("hidden",))
    uses += _linear(f"{layer}.attention.self.key", out=qk, into=("hidden",))
    uses += _linear(f"{layer}.attention.self.value", out=vo, into=("hidden",))
    uses += _linear(f"{layer}.attention.output.dense", out=("hidden",), into=vo)
    uses += _vector(f"{layer}.attention.output.LayerNorm")
    uses += _linear(f"{layer}.intermediate.dense", out=ffn, into=("hidden",))
    uses += _linear(f"{layer}.output.dense", out=("hidden",), into=ffn)
    return uses + _vector(f"{layer}.output.LayerNorm")


def _linear(name: str, out: tuple[str, ...], into: tuple[str, ...]) -> list[AxisUse]:
    return [AxisUse(f"{name}.weight", 0, out), AxisUse(f"{name}.weight", 1, into), AxisUse(f"{name}.bias", 0, out)]


def _vector(name: str) -> list[AxisUse]:
    return [AxisUse(f"{name}.weight", 0, ("hidden",)), AxisUse(f"{name}.bias", 0, ("hidden",))]


def refresh(model: BertForMaskedLM, widths: Widths) -> None:
    """Make the sizes that modules remember agree with parameters that have just been sliced to `widths`.

    `BertSelfAttention.scaling` is left alone on purpose: the softmax scale stays 1/sqrt(teacher head_dim) during
    training and is folded into query at export (design decision 3).
    """
    hidden = widths["hidden"]
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = (hidden,)
    for table in (m for m in embeddings(model).modules() if isinstance(m, nn.Embedding)):
        table.embedding_dim = hidden
    head = model.cls.predictions
    head.transform.dense.in_features = head.transform.dense.out_features = head.decoder.in_features = hidden
    for i, layer in enumerate(layers(model)):
        _refresh_layer(layer, hidden, widths[f"layer.{i}.ffn"], widths[f"layer.{i}.heads"], widths[f"layer.{i}.qk_dim"])
    model.config.hidden_size = hidden


def _refresh_layer(layer: nn.Module, hidden: int, ffn: int, heads: int, head_dim: int) -> None:
    attention = layer.attention.self
    attention.num_attention_heads, attention.attention_head_size = heads, head_dim
    attention.all_head_size = heads * head_dim
    for projection in (attention.query, attention.key, attention.value):
        projection.in_features, projection.out_features = hidden, heads * head_dim
    layer.attention.output.dense.in_features, layer.attention.output.dense.out_features = heads * head_dim, hidden
    layer.intermediate.dense.in_features, layer.intermediate.dense.out_features = hidden, ffn
    layer.output.dense.in_features, layer.output.dense.out_features = ffn, hidden


def backbone(model: BertForMaskedLM) -> nn.Module:
    """Token ids -> last hidden states."""
    return model.bert


def embeddings(model: BertForMaskedLM) -> nn.Module:
    """Token ids -> what enters layer 0, shape (batch, tokens, hidden)."""
    return model.bert.embeddings


def layers(model: BertForMaskedLM) -> nn.ModuleList:
    return model.bert.encoder.layer


def attentions(model: BertForMaskedLM) -> list[nn.Module]:
    """The module of every layer that calls the attention function."""
    return [layer.attention.self for layer in layers(model)]


def mlm_head(model: BertForMaskedLM) -> nn.Module:
    """Rows of the last hidden states (rows, hidden) -> logits (rows, vocabulary)."""
    return model.cls


def mlm_transform(model: BertForMaskedLM) -> nn.Module:
    """First part of the MLM head: rows of the last hidden states (rows, hidden) -> rows that enter the decoder."""
    return model.cls.predictions.transform


def decoder(model: BertForMaskedLM) -> nn.Linear:
    """Second part: -> logits (rows, vocabulary). Its weight is the word embeddings' where they are tied.

    Under ZeRO-3 weight and bias exist only inside a call of this module.
    """
    return model.cls.predictions.decoder


class LayerParts(NamedTuple):
    """One layer: `attend`, then `attention_output`, `ffn` and `ffn_output`, and the linears and LayerNorms in these.

    Each output block is LayerNorm(linear(input) + residual), dropout aside.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_linear: nn.Linear
    attention_output: nn.Module
    """(heads side by side, residual) -> residual stream after attention."""
    attention_norm: nn.LayerNorm
    ffn_linear: nn.Linear
    ffn: nn.Module
    """Residual stream -> activated neurons."""
    ffn_output_linear: nn.Linear
    ffn_output: nn.Module
    """(activated neurons, residual) -> residual stream after the layer."""
    ffn_norm: nn.LayerNorm


def layer_parts(model: BertForMaskedLM) -> list[LayerParts]:
    return [_layer_parts(layer) for layer in layers(model)]


def _layer_parts(layer: nn.Module) -> LayerParts:
    attention, output = layer.attention.self, layer.attention.output
    return LayerParts(
        query=attention.query,
        key=attention.key,
        value=attention.value,
        attention_linear=output.dense,
        attention_output=output,
        attention_norm=output.LayerNorm,
        ffn_linear=layer.intermediate.dense,
        ffn=layer.intermediate,
        ffn_output_linear=layer.output.dense,
        ffn_output=layer.output,
        ffn_norm=layer.output.LayerNorm,
    )


def attend(model: BertForMaskedLM, i: int, hidden: Tensor, seen: Tensor | None) -> Tensor:
    """Attention of layer `i` before its output projection: (B, T, hidden) -> (B, T, heads x dims of a head).

    Args:
        seen: bool, (B, 1, 1 or T, T), True = looked at; None: everything is. For SDPA, as `layers` take it.
    """
    return attentions(model)[i](hidden, attention_mask=seen)[0]


class HeadParts(NamedTuple):
    """The MLM head before the decoder: LayerNorm(activation(linear(hidden)))."""

    linear: nn.Linear
    activation: nn.Module
    norm: nn.LayerNorm


def head_parts(model: BertForMaskedLM) -> HeadParts:
    transform = mlm_transform(model)
    return HeadParts(transform.dense, transform.transform_act_fn, transform.LayerNorm)


def embedding_norm(model: BertForMaskedLM) -> nn.LayerNorm:
    """The LayerNorm that ends the embeddings."""
    return embeddings(model).LayerNorm


def layer_norms(model: BertForMaskedLM) -> dict[str, nn.LayerNorm]:
    """LayerNorms that read the residual stream itself (the MLM head's transform is not one of them)."""
    inside = backbone(model).named_modules()
    return {name: module for name, module in inside if isinstance(module, nn.LayerNorm)}


def keep_layers(model: BertForMaskedLM, kept: Sequence[int]) -> None:
    """Leave out all layers but these, in place. `kept`: ascending. Call before anything holds on to layers."""
    encoder = model.bert.encoder
    encoder.layer = nn.ModuleList(encoder.layer[i] for i in kept)
    model.config.num_hidden_layers = len(kept)


def student_config(teacher: BertConfig, widths: Widths) -> BertConfig:
    """Stock configuration of a model with these (uniform) widths and their layers; the rest as in `teacher`."""
    values = teacher.to_dict()
    values |= {
        "hidden_size": widths["hidden"],
        "intermediate_size": widths["layer.0.ffn"],
        "num_attention_heads": widths["layer.0.heads"],
        "num_hidden_layers": sum(axis.endswith(".ffn") for axis in widths),
    }
    return BertConfig(**values)


def empty_model(config: BertConfig) -> BertForMaskedLM:
    """A freshly initialised model of this shape (put it on the meta device to look at shapes only)."""
    return BertForMaskedLM(config)


def tensor_name(stored: str) -> str:
    """Today's name of a tensor in a file of any age: LayerNorms had gamma and beta, an encoder alone no prefix."""
    name = f"{_BACKBONE}{stored}" if stored.startswith(_OWN_PARTS) else stored
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{_NORM_NAMES[m[1]]}", name)


_NORM_NAMES = {"gamma": "weight", "beta": "bias"}


def is_head(name: str) -> bool:
    """Whether a parameter is the MLM head's own (a tied decoder weight is not)."""
    return name.startswith(_HEAD)


def is_unused(name: str) -> bool:
    """Whether a masked LM leaves a tensor of this name out as a matter of course (pooler, next-sentence head)."""
    return name.startswith(_UNUSED)


def num_stored_layers(names: Iterable[str]) -> int:
    """Layers that the tensors in a checkpoint's files belong to."""
    numbers = [re.match(r"bert\.encoder\.layer\.(\d+)\.", tensor_name(name)) for name in names]
    return 1 + max((int(found[1]) for found in numbers if found), default=-1)
