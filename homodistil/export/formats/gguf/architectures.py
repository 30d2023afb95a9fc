"""Which stock models llama.cpp computes as transformers does, under which name, and what their settings must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from homodistil.errors import UserError
from homodistil.models import family_of
from homodistil.models.checkpoint_files import short

FIELD = "--format gguf"
"""Begins every message."""
_GEMMA3_PERIOD = 6
"""Of Gemma 3's layers the last of so many sees all tokens; llama.cpp has this number in its code."""
_GEMMA3_LOCAL_THETA = 10_000.0
"""Of the layers with a window; llama.cpp has this number in its code."""
_GEMMA3_27B_LAYERS = 62
"""With so many layers llama.cpp scales the queries by the hidden size instead of the size of a head."""


class Architecture(NamedTuple):
    """A model type as llama.cpp has it."""

    name: str
    """general.architecture."""
    prefix: str
    """Of the backbone's parameters in the names that `gguf.get_tensor_name_map` knows."""
    activation: str
    is_causal: bool = True
    rotates_neighbours: bool = False
    """llama.cpp rotates dims (2i, 2i + 1) of a head where transformers rotates (i, i + H/2)."""
    norm_offset: float = 0.0
    """What llama.cpp adds to the gains of norms beforehand."""
    needs_whole_heads: bool = False
    """llama.cpp reads it with hidden size = heads x dims of a head alone."""
    needs_output: bool = False
    """The output matrix is stored even where it is the embeddings'."""
    has_windows: bool = False
    """llama.cpp has layers of it that see the last tokens alone."""


ARCHITECTURES = {
    "llama": Architecture("llama", "model.", "silu", rotates_neighbours=True),
    "mistral": Architecture("llama", "model.", "silu", rotates_neighbours=True),
    "qwen2": Architecture("qwen2", "model.", "silu", needs_whole_heads=True),
    "qwen3": Architecture("qwen3", "model.", "silu"),
    "gemma": Architecture("gemma", "model.", "gelu_pytorch_tanh", norm_offset=1.0),
    "gemma3_text": Architecture("gemma3", "model.", "gelu_pytorch_tanh", norm_offset=1.0, has_windows=True),
    "olmo2": Architecture("olmo2", "model.", "silu", needs_whole_heads=True, needs_output=True),
    "gpt2": Architecture("gpt2", "transformer.", "gelu_new"),
    # llama.cpp's GELU is the approximation by tanh, at most 5e-4 from this one.
    "bert": Architecture("bert", "", "gelu", is_causal=False),
}
"""By model_type."""


def architecture_of(config: PretrainedConfig, has_head: bool) -> Architecture:
    """How llama.cpp has a model.

    Args:
        has_head: it is exported with its head.

    Raises:
        UserError: another model type, or a setting or head that llama.cpp would compute differently.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{FIELD}: found model_type {short(repr(kind))}, allowed are {', '.join(ARCHITECTURES)}; take another "
            f"format"
        )
    architecture = ARCHITECTURES[kind]
    if has_head and not architecture.is_causal:
        raise UserError(
            f"{FIELD}: llama.cpp takes vectors from a {kind} and has none of its heads; add --no-head to export the "
            f"backbone"
        )
    if architecture.needs_output and not has_head:
        raise UserError(f"{FIELD}: llama.cpp reads no {kind} without its head; leave --no-head out")
    _check_values(config, architecture)
    _check_rotary(config)
    _check_layers(config)
    return architecture


def _check_values(config: PretrainedConfig, architecture: Architecture) -> None:
    expected = {family_of(config.model_type).field("hidden_act"): architecture.activation}
    expected |= {name: False for name in ("attention_bias", "mlp_bias") if hasattr(config, name)}
    if config.model_type == "gemma3_text" and config.num_hidden_layers != _GEMMA3_27B_LAYERS:
        expected["query_pre_attn_scalar"] = config.head_dim
    if architecture.needs_whole_heads:
        expected["hidden_size"] = config.num_attention_heads * family_of(config.model_type).shape(config).head_dim
    for name, value in expected.items():
        if (actual := getattr(config, name)) != value:
            raise _refused(name, actual, repr(value))


def _check_rotary(config: PretrainedConfig) -> None:
    for settings in rotary_settings(config):
        kind = settings.get("rope_type", "default")
        allowed = ("default", "llama3") if config.model_type == "llama" else ("default",)
        if kind not in allowed:
            raise _refused("rope_type", kind, " and ".join(allowed))
        if (share := settings.get("partial_rotary_factor", 1.0)) != 1.0:
            raise _refused("partial_rotary_factor", share, "1.0")


def _check_layers(config: PretrainedConfig) -> None:
    kinds = getattr(config, "layer_types", None) or []
    if config.model_type == "gemma3_text":
        expected = [
            "full_attention" if number % _GEMMA3_PERIOD == 0 else "sliding_attention"
            for number in range(1, config.num_hidden_layers + 1)
        ]
        if kinds != expected:
            raise _refused("layer_types", kinds, f"windows in all but every {_GEMMA3_PERIOD}th layer")
        if (theta := config.rope_parameters["sliding_attention"]["rope_theta"]) != _GEMMA3_LOCAL_THETA:
            raise _refused("rope_theta of layers with a window", theta, f"{_GEMMA3_LOCAL_THETA:g}")
    elif config.model_type != "mistral" and "sliding_attention" in kinds:
        raise _refused("layer_types", kinds, "full_attention in all layers")


def rotary_settings(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """Of each kind of layer, the one that sees all tokens first; empty: positions are learned."""
    settings = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in settings:
        return [settings["full_attention"], settings["sliding_attention"]]
    return [settings] if settings else []


def _refused(name: str, value: Any, allowed: str) -> UserError:
    return UserError(
        f"{FIELD}: found {name} {short(repr(value))}, llama.cpp computes {allowed} alone; take another format"
    )
