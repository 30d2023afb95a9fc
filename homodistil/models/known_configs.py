"""Configurations of checkpoints that many start from, so that a plan needs no hub: it takes its time to be unreachable.

A run itself reads the checkpoint's config.json. Only sizes are listed here; tests compare their parameter counts with
the published ones.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import BertConfig, LlamaConfig, PretrainedConfig, Qwen3Config, RobertaConfig, XLMRobertaConfig


def known_config(name: str) -> PretrainedConfig | None:
    """The configuration of the hub's model `name`; None for one that is not listed here."""
    make = _KNOWN.get(name)
    return None if make is None else make()


def _roberta(kind: type[PretrainedConfig], vocab_size: int) -> PretrainedConfig:
    return kind(vocab_size=vocab_size, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)


def _smollm2(hidden_size: int, intermediate_size: int, layers: int, heads: int, groups: int) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def _llama_1b() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )


def _qwen3_600m() -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )


_KNOWN: dict[str, Callable[[], PretrainedConfig]] = {
    **dict.fromkeys(("bert-base-uncased", "google-bert/bert-base-uncased"), BertConfig),
    **dict.fromkeys(("roberta-base", "FacebookAI/roberta-base"), lambda: _roberta(RobertaConfig, 50265)),
    **dict.fromkeys(("xlm-roberta-base", "FacebookAI/xlm-roberta-base"), lambda: _roberta(XLMRobertaConfig, 250002)),
    **dict.fromkeys(
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"), lambda: _smollm2(576, 1536, 30, 9, 3)
    ),
    **dict.fromkeys(
        ("HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M-Instruct"), lambda: _smollm2(960, 2560, 32, 15, 5)
    ),
    "meta-llama/Llama-3.2-1B": _llama_1b,
    **dict.fromkeys(("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base"), _qwen3_600m),
}
