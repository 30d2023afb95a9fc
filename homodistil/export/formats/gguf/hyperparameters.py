"""A model's sizes and settings as the metadata of a GGUF file, and a configuration made of them again."""

from __future__ import annotations

import copy

import gguf
from gguf import GGUFValueType
from transformers import PretrainedConfig

from homodistil.data.sources.gguf import metadata
from homodistil.data.sources.gguf.container import GgufFile
from homodistil.export.formats.gguf.architectures import Architecture, rotary_settings
from homodistil.models import family_of

Value = int | float | bool | str | list
Metadata = dict[str, tuple[GGUFValueType, Value]]
"""Key -> its type and value."""
_POOLING = {
    None: gguf.PoolingType.NONE,
    "mean": gguf.PoolingType.MEAN,
    "cls": gguf.PoolingType.CLS,
    "last": gguf.PoolingType.LAST,
}
"""homodistil.models.sentence_modules.PoolingMode -> llama.cpp's."""
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
"""Key without the architecture -> the common name of a field of config.json."""
_CAUSAL_SIZES = {"attention.head_count_kv": "num_key_value_heads", "vocab_size": "vocab_size"}
_ROTARY_SIZES = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
}
_EPSILONS = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
}
_CONTEXT, _WINDOW, _THETA = "context_length", "attention.sliding_window", "rope.freq_base"


def hyperparameters(config: PretrainedConfig, architecture: Architecture, pooling: str | None) -> Metadata:
    """The metadata that begin with the architecture's name.

    Args:
        pooling: of a sentence embedder's hidden states (`PoolingMode`); None: the model is none.
    """
    family = family_of(config.model_type)
    shape = family.shape(config)
    window, context = _window(config), getattr(config, family.field("max_position_embeddings"))
    numbers = {key: getattr(shape, field) for key, field in _sizes(config).items()}
    if window is not None and not architecture.has_windows:
        # llama.cpp sees all tokens, which is the same as long as they fit into the window.
        context = min(context, window)
    elif window is not None:
        numbers[_WINDOW] = window
    numbers[_CONTEXT] = context
    if pooling is not None or not architecture.is_causal:
        numbers["pooling_type"] = int(_POOLING[pooling])
    values: Metadata = {key: (GGUFValueType.UINT32, number) for key, number in numbers.items()}
    values |= {key: (GGUFValueType.FLOAT32, getattr(config, field)) for key, field in _epsilons(config).items()}
    if rotary := rotary_settings(config):
        values[_THETA] = (GGUFValueType.FLOAT32, rotary[0]["rope_theta"])
    if not architecture.is_causal:
        values["attention.causal"] = (GGUFValueType.BOOL, False)
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


def config_of(file: GgufFile, config: PretrainedConfig, architecture: Architecture) -> PretrainedConfig:
    """A copy of `config` with the sizes and settings that a file has. Raises `UserError`: one is missing or damaged."""
    config, family, prefix = copy.deepcopy(config), family_of(config.model_type), f"{architecture.name}."
    for key, field in _sizes(config).items():
        setattr(config, family.field(field), metadata.integer(file, prefix + key))
    for key, field in _epsilons(config).items():
        setattr(config, field, metadata.positive(file, prefix + key))
    if _window(config) is not None and architecture.has_windows:
        config.sliding_window = metadata.integer(file, prefix + _WINDOW)
    for settings in rotary_settings(config)[:1]:
        settings["rope_theta"] = metadata.positive(file, prefix + _THETA)
    return config


def _sizes(config: PretrainedConfig) -> dict[str, str]:
    family = family_of(config.model_type)
    rotary = _ROTARY_SIZES if family.architecture.has_rotary_positions else {}
    return _SIZES | (_CAUSAL_SIZES if family.is_causal else {}) | rotary


def _epsilons(config: PretrainedConfig) -> dict[str, str]:
    """Key -> the field's name in this configuration."""
    names = {key: family_of(config.model_type).field(field) for key, field in _EPSILONS.items()}
    return {key: name for key, name in names.items() if hasattr(config, name)}


def _window(config: PretrainedConfig) -> int | None:
    """Tokens that the layers with a window see; None: all layers see all tokens."""
    kinds = getattr(config, "layer_types", None) or []
    return config.sliding_window if config.model_type == "mistral" or "sliding_attention" in kinds else None
