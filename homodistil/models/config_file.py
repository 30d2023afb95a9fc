"""A checkpoint's config.json: what it says is refused by name where no model of ours could be built of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig
from transformers.activations import ACT2FN

from homodistil.errors import UserError, nearest
from homodistil.models import FAMILIES
from homodistil.models.checkpoint_files import first_line, local_folder, read_json, short

MAX_LAYERS = 1024
"""More would take minutes to build, and no published encoder has a tenth of it."""
_MAX_SIZE = 2**31 - 1
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "head_dim",
)
_DECODERS = ("is_decoder", "add_cross_attention", "is_encoder_decoder")
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def read_config(name: str, field: str):
    """The Hugging Face configuration of a folder or hub name; nothing is built and no code beside it is run.

    Args:
        field: what the user gave `name` as, for messages: teacher.name or --checkpoint.

    Raises:
        UserError: no config.json, damaged, or with values that no run could use.
    """
    folder = local_folder(name, field)
    if folder is not None:
        check_values(read_json(folder / "config.json", field), f"{field}: {folder / 'config.json'}")
    try:
        config = AutoConfig.from_pretrained(str(folder or name), trust_remote_code=False)
    except Exception as error:  # the hub client, its transport and the strict configs raise types of their own
        raise UserError(
            f"{field}: no model at {short(name)!r} ({first_line(error)}); "
            f"give a folder with config.json and weights, a reachable hub name, or embedded:bert-tiny"
        ) from None
    if folder is None:
        check_values(config.to_dict(), f"{field}: config.json of {name!r}")
    return config


def check_values(values: Mapping[str, Any], where: str) -> None:
    """Raise `UserError` for what is wrong in a config.json. Fields that are not there have their library's default.

    Args:
        where: begins the message.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{where}: found model_type {model_type!r}; give a Hugging Face config (model_type: bert, say)")
    if values.get("auto_map"):
        raise UserError(
            f"{where}: found auto_map, a model with code of its own, which is never run; give a model of a stock class"
        )
    if values.get("quantization_config"):
        raise UserError(
            f"{where}: found quantization_config: quantised weights cannot be trained or cut; give the checkpoint that "
            f"they were made from (float32, float16 or bfloat16)"
        )
    if model_type in FAMILIES:
        _check_kind(values, where)
        _check_sizes(values, where)
        _check_numbers(values, where)


def _check_kind(values: Mapping[str, Any], where: str) -> None:
    for name in _DECODERS:
        if values.get(name, False) is not False:
            raise UserError(
                f"{where}: found {name} {values[name]!r}, allowed is false: only encoders that look at both sides can "
                f"be used; give a masked language model"
            )
    if (kind := values.get("position_embedding_type")) not in (None, "absolute"):
        raise UserError(
            f"{where}: found position_embedding_type {short(repr(kind))}, allowed is absolute: relative positions "
            f"would be ignored; give a model with absolute positions"
        )
    name = values.get("hidden_act", "gelu")
    if not isinstance(name, str) or name not in ACT2FN:
        known = nearest(name, ACT2FN) if isinstance(name, str) else ""
        raise UserError(
            f"{where}: found hidden_act {short(repr(name))}, which is no activation of transformers{known}; set the "
            f"one that the model was trained with (gelu, say)"
        )


def _check_sizes(values: Mapping[str, Any], where: str) -> None:
    for name in _SIZES:
        largest = MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE
        size = 1 if name == "head_dim" and values.get(name) is None else values.get(name, 1)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= largest:
            raise UserError(
                f"{where}: found {name} {short(repr(size))}, allowed are whole numbers 1 .. {largest}; set the size "
                f"that the weights have"
            )
    hidden, heads, groups = (values.get(n) for n in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if groups and heads and heads % groups:
        raise UserError(
            f"{where}: found num_attention_heads {heads} with num_key_value_heads {groups}, which does not divide it; "
            f"set the numbers that the model was trained with"
        )
    if hidden and heads and not values.get("head_dim") and hidden % heads:
        raise UserError(
            f"{where}: found hidden_size {hidden} with num_attention_heads {heads}, which does not divide it; set the "
            f"numbers that the model was trained with"
        )
    words, pad = values.get("vocab_size"), values.get("pad_token_id")
    if words and pad is not None and (not isinstance(pad, int) or not 0 <= pad < words):
        raise UserError(
            f"{where}: found pad_token_id {short(repr(pad))}, allowed are 0 .. {words - 1} (vocab_size) or null; set "
            f"the tokenizer's"
        )


def _check_numbers(values: Mapping[str, Any], where: str) -> None:
    for name in _PROBABILITIES:
        if not _is_number(value := values.get(name, 0.0)) or not 0 <= value < 1:
            raise UserError(f"{where}: found {name} {short(repr(value))}, allowed [0, 1); set 0.1, say")
    if not _is_number(value := values.get("layer_norm_eps", 1e-12)) or value <= 0:
        raise UserError(f"{where}: found layer_norm_eps {short(repr(value))}, allowed are numbers > 0; set 1e-12, say")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
