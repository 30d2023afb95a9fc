"""A checkpoint's config.json: what it says is refused by name where no model of ours could be built of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from homodistil.errors import UserError, nearest
from homodistil.models import FAMILIES
from homodistil.models.checkpoint_files import first_line, local_folder, read_json, short

MAX_LAYERS = 1024
"""More would take minutes to build, and no published encoder has a tenth of it."""
_MAX_SIZE = 2**31 - 1
_SIZES = (
    "vocab_size",
    "hidden_size",
    "embedding_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_key_value_heads",
    "head_dim",
)
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "n_inner")
"""Of these sizes: they follow from the others then."""
_DECODERS = ("is_decoder", "add_cross_attention", "is_encoder_decoder")
_EPSILONS = {"layer_norm_eps": 1e-12, "rms_norm_eps": 1e-6}
"""Field -> what many models have."""


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
        fields = _Fields(values)
        _check_kind(fields, where)
        _check_required(values, where)
        _check_sizes(fields, where)
        _check_numbers(fields, where)
        _check_rotary(values, where)


class _Fields:
    """The values of a config.json of a supported architecture, by the common names of the fields."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.family = FAMILIES[values["model_type"]]
        self._values = values

    def name(self, common: str) -> str:
        """What the file calls the field."""
        special = self.family.config_names.get(common)
        return special if special is not None and common not in self._values else common

    def get(self, common: str, default: Any = None) -> Any:
        return self._values.get(self.name(common), default)


def _check_kind(values: _Fields, where: str) -> None:
    for name in _DECODERS:
        if values.get(name, False) is not False:
            raise UserError(
                f"{where}: found {name} {values.get(name)!r}, allowed is false: only encoders that look at both sides "
                f"can be used; give a masked language model"
            )
    rotates = values.family.architecture.has_rotary_positions  # such a model does not read the field
    if not rotates and (kind := values.get("position_embedding_type")) not in (None, "absolute"):
        raise UserError(
            f"{where}: found position_embedding_type {short(repr(kind))}, allowed is absolute: relative positions "
            f"would be ignored; give a model with absolute positions"
        )
    name = values.get("hidden_act", "gelu")
    if not isinstance(name, str) or name not in ACT2FN:
        known = nearest(name, ACT2FN) if isinstance(name, str) else ""
        raise UserError(
            f"{where}: found {values.name('hidden_act')} {short(repr(name))}, which is no activation of "
            f"transformers{known}; set the one that the model was trained with (gelu, say)"
        )


def _check_required(values: Mapping[str, Any], where: str) -> None:
    for name, required in FAMILIES[values["model_type"]].required_values.items():
        value = values.get(name, required.allowed[0])
        if value not in required.allowed:
            allowed = " or ".join(json.dumps(each) for each in required.allowed)
            raise UserError(f"{where}: found {name} {short(repr(value))}, allowed is {allowed}: {required.reason}")


def _check_sizes(values: _Fields, where: str) -> None:
    for common in _SIZES:
        largest = MAX_LAYERS if common == "num_hidden_layers" else _MAX_SIZE
        name = values.name(common)
        size = 1 if name in _MAY_BE_NULL and values.get(common) is None else values.get(common, 1)
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
            f"{where}: found {values.name('hidden_size')} {hidden} with {values.name('num_attention_heads')} {heads}, "
            f"which does not divide it; set the numbers that the model was trained with"
        )
    words, pad = values.get("vocab_size"), values.get("pad_token_id")
    if words and pad is not None and (not isinstance(pad, int) or not 0 <= pad < words):
        raise UserError(
            f"{where}: found pad_token_id {short(repr(pad))}, allowed are 0 .. {words - 1} (vocab_size) or null; set "
            f"the tokenizer's"
        )


def _check_numbers(values: _Fields, where: str) -> None:
    for name in values.family.dropout_fields:
        if not _is_number(value := values.get(name, 0.0)) or not 0 <= value < 1:
            raise UserError(f"{where}: found {name} {short(repr(value))}, allowed [0, 1); set 0.1, say")
    for common, usual in _EPSILONS.items():
        if not _is_number(value := values.get(common, usual)) or value <= 0:
            name = values.name(common)
            raise UserError(f"{where}: found {name} {short(repr(value))}, allowed are numbers > 0; set {usual:g}, say")


def _check_rotary(values: Mapping[str, Any], where: str) -> None:
    """One setting for all layers, or one for each kind of layer."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        return  # the configuration's class refuses it
    settings = [one for one in given.values() if isinstance(one, Mapping)] or [given]
    kinds = ("default", *ROPE_INIT_FUNCTIONS)
    for one in (values, *settings):
        kind, theta = one.get("rope_type", "default"), one.get("rope_theta", 1.0)
        if kind not in kinds:
            raise UserError(
                f"{where}: found rope_type {short(repr(kind))}, allowed are {', '.join(kinds)}; set the one that the "
                f"model was trained with"
            )
        if not _is_number(theta) or theta <= 0:
            raise UserError(
                f"{where}: found rope_theta {short(repr(theta))}, allowed are numbers > 0; set the one that the model "
                f"was trained with (10000, say)"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
