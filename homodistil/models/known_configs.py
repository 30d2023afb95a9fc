"""Configurations of checkpoints that many start from, so that a plan needs no hub: it takes its time to be unreachable.

A run itself reads the checkpoint's config.json. Only sizes are listed here; tests compare their parameter counts with
the published ones.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    PretrainedConfig,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)


def known_config(name: str) -> PretrainedConfig | None:
    """The configuration of the hub's model `name`; None for one that is not listed here."""
    make = _KNOWN.get(name)
    return None if make is None else make()


def _minilm(layers: int, vocab_size: int = 30522) -> PretrainedConfig:
    return BertConfig(
        vocab_size=vocab_size, hidden_size=384, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=12
    )


def _reranker() -> PretrainedConfig:
    config = _minilm(6)
    config.num_labels, config.architectures = 1, ["BertForSequenceClassification"]
    return config


def _ner() -> PretrainedConfig:
    config = BertConfig(vocab_size=28996)
    config.num_labels, config.architectures = 9, ["BertForTokenClassification"]
    return config


def _roberta(kind: type[PretrainedConfig], vocab_size: int) -> PretrainedConfig:
    return kind(vocab_size=vocab_size, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)


def _modernbert_large() -> PretrainedConfig:
    return ModernBertConfig(hidden_size=1024, intermediate_size=2624, num_hidden_layers=28, num_attention_heads=16)


def _ettin(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> PretrainedConfig:
    return ModernBertConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=7999,
        global_rope_theta=160000.0,
        local_rope_theta=160000.0,
    )


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


def _gemma3(hidden_size: int, intermediate_size: int, layers: int) -> PretrainedConfig:
    return Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        sliding_window=512,
    )


_KNOWN: dict[str, Callable[[], PretrainedConfig]] = {
    **dict.fromkeys(("bert-base-uncased", "google-bert/bert-base-uncased"), BertConfig),
    "BAAI/bge-small-en-v1.5": lambda: _minilm(12),
    "intfloat/multilingual-e5-small": lambda: _minilm(12, vocab_size=250037),
    "cross-encoder/ms-marco-MiniLM-L6-v2": _reranker,
    "dslim/bert-base-NER": _ner,
    **dict.fromkeys(("distilbert-base-uncased", "distilbert/distilbert-base-uncased"), DistilBertConfig),
    "google/electra-small-generator": ElectraConfig,
    "google/electra-base-generator": lambda: ElectraConfig(embedding_size=768),
    "microsoft/mpnet-base": lambda: MPNetConfig(max_position_embeddings=514, layer_norm_eps=1e-5),
    **dict.fromkeys(("roberta-base", "FacebookAI/roberta-base"), lambda: _roberta(RobertaConfig, 50265)),
    **dict.fromkeys(("xlm-roberta-base", "FacebookAI/xlm-roberta-base"), lambda: _roberta(XLMRobertaConfig, 250002)),
    **dict.fromkeys(("answerdotai/ModernBERT-base", "nomic-ai/modernbert-embed-base"), ModernBertConfig),
    "answerdotai/ModernBERT-large": _modernbert_large,
    "jhu-clsp/ettin-encoder-17m": lambda: _ettin(256, 384, 7, 4),
    "jhu-clsp/ettin-encoder-32m": lambda: _ettin(384, 576, 10, 6),
    "jhu-clsp/ettin-encoder-68m": lambda: _ettin(512, 768, 19, 8),
    "jhu-clsp/ettin-encoder-150m": lambda: _ettin(768, 1152, 22, 12),
    **dict.fromkeys(
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"), lambda: _smollm2(576, 1536, 30, 9, 3)
    ),
    **dict.fromkeys(
        ("HuggingFaceTB/SmolLM2-360M", "HuggingFaceTB/SmolLM2-360M-Instruct"), lambda: _smollm2(960, 2560, 32, 15, 5)
    ),
    "meta-llama/Llama-3.2-1B": _llama_1b,
    **dict.fromkeys(("gpt2", "openai-community/gpt2"), GPT2Config),
    **dict.fromkeys(("distilgpt2", "distilbert/distilgpt2"), lambda: GPT2Config(n_layer=6)),
    **dict.fromkeys(("google/gemma-3-270m", "google/gemma-3-270m-it"), lambda: _gemma3(640, 2048, 18)),
    **dict.fromkeys(("google/gemma-3-1b-pt", "google/gemma-3-1b-it"), lambda: _gemma3(1152, 6912, 26)),
    **dict.fromkeys(("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B-Base"), _qwen3_600m),
}
